"""What a run's server tells every client's machine, with every message: the whole experiment, and who takes part."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sheepfold.config import Experiment, build
from sheepfold.errors import WireError


@dataclass(frozen=True, slots=True)
class Charter:
    """One run, the same for all its machines."""

    run: str
    """Its name in every message, 16 hex digits; a run that goes on after a crash keeps it"""
    experiment: Mapping[str, Any]
    """Every option resolved, labels included"""
    clients: tuple[str, ...]
    """Everybody, in the order that draws of cohorts and ranks go by"""
    base: str
    """Fingerprint of the base's weights"""
    version: str
    """Of sheepfold"""

    def settings(self) -> Experiment:
        """Return the experiment. Raises ConfigError where this release does not know it."""
        return build(self.experiment, source="the server's experiment")

    def as_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))


def read_charter(text: str) -> Charter:
    """Return the charter of a text. Raises WireError for what is none."""
    try:
        found = json.loads(text)
        return Charter(**{**found, "clients": tuple(found["clients"])})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WireError(f"no charter of a run ({error})") from None
