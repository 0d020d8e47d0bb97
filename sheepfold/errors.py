"""Everything sheepfold raises on purpose.

SheepfoldError
├── ConfigError          an experiment file, a key, a value, or a combination that cannot work
├── DataError            rows, files, fields, partitions
├── ModelError           bases, tokenizers, weights, target modules
├── AdapterMismatch      two adapters that should have the same shape and do not
├── CheckpointError      a run's folder that cannot be read, written or resumed
├── TrainingError        a round that cannot go on
├── WireError            a message that is damaged, or not what its receiver asked for
└── PolicyError          an experiment that asks a data owner for more than it gives

A message says where (round, client, module, setting or file), what was found, what was expected, and a way on.
The command line prints it as one line and exits with code 2.
"""

import importlib.util
from collections.abc import Iterable
from difflib import get_close_matches


class SheepfoldError(Exception):
    """The root: catch this to catch all of ours and nothing else."""


class ConfigError(SheepfoldError):
    """An experiment file, a key, a value, or a combination that cannot work."""


class DataError(SheepfoldError):
    """Rows, files, fields or partitions that cannot be used."""


class ModelError(SheepfoldError):
    """A base, a tokenizer, weights or target modules that cannot be used."""


class AdapterMismatch(SheepfoldError):
    """Adapters whose modules, ranks or shapes differ where they must agree."""


class CheckpointError(SheepfoldError):
    """A run's folder that cannot be read, written or resumed."""


class TrainingError(SheepfoldError):
    """A round that cannot go on, such as one in which no client took a good step."""


class WireError(SheepfoldError):
    """A message that is damaged, or not what its receiver asked for."""


class PolicyError(SheepfoldError):
    """An experiment that asks a data owner for more than its policy gives."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return 'did you mean ...? known: ...' with the nearest names first."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(near + [n for n in names if n not in near])}"


def missing_extra(what: str, library: str, extra: str) -> ConfigError:
    """Return the error for a part whose optional library is not installed."""
    return ConfigError(f"{what} needs {library}, which is not installed: pip install 'sheepfold[{extra}]'")


def require(what: str, extra: str, *libraries: str) -> None:
    """Raise the error of `missing_extra` for the first of a part's libraries that is not installed; imports none."""
    for library in libraries:
        if importlib.util.find_spec(library.replace("-", "_")) is None:
            raise missing_extra(what, library, extra)
