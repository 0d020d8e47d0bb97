"""A run's folder: what was asked, what happened, and where it stands.

    experiment.yaml   the experiment, every option resolved
    data.json         what the data amounts to: fingerprint, sizes, training rows by category, ranks, rows left out
    rounds.jsonl      one line for the evaluated start and for each round
    clients/          what clients keep from round to round, where the method has them keep something
    halvings.jsonl    where memory ran out, and how work was cut from there on
    offsite/          what clients get instead of the base, where that is closed
    personal/         a PEFT folder a client, where clients end with adapters of their own
    state/            latest.safetensors, best.safetensors, round-0003.safetensors (every file is always whole)
    adapter/, best/   PEFT folders, written at the end
    results.json      arguments, test figures by round, seconds: what a table or a plot of one's own needs
    model_card.md     what all of it amounts to, for whoever gets the adapter
    .running          there and locked while a process is at the run
    tracking/         what each tracker was sent, where the run has any

The journal's line goes to disk before the state does: a run that dies between the two drops the line when it resumes.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepfold import state as states
from sheepfold.config import EvaluationSettings, Experiment, build, dump, read_yaml
from sheepfold.errors import CheckpointError, ConfigError

MAY_CHANGE = {"name", "output", "cache", "keep_rounds", "baselines", "trackers", "tracker_args", "card"}
MAY_CHANGE |= {"train.gradient_checkpointing"}
MAY_CHANGE |= {"network.deadline", "network.quorum"}  # nobody should have to wait for a machine that is gone for good
MAY_CHANGE |= {f"evaluation.{name}" for name in EvaluationSettings.model_fields if name.startswith(("task", "allow"))}
"""Options, or sections of them, that a resumed run may set anew: they change no number of the training."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's folder."""

    path: Path

    @property
    def latest(self) -> Path:
        """The state to resume from."""
        return self.path / "state" / "latest.safetensors"

    @property
    def best(self) -> Path:
        """The state of the best evaluation, where one is watched."""
        return self.path / "state" / "best.safetensors"

    @property
    def clients(self) -> Path:
        """What clients keep from round to round."""
        return self.path / "clients"

    @property
    def halvings(self) -> Path:
        """Where memory ran out, and the plan from there on (halving.py)."""
        return self.path / "halvings.jsonl"

    @property
    def emulator(self) -> Path:
        """The model that clients get instead of the base, where that is closed."""
        return self.path / "offsite" / "emulator"

    @property
    def personal(self) -> Path:
        """Clients' own adapters, written at the end."""
        return self.path / "personal"

    def kept(self, round: int) -> Path:
        """The state after a round, where it was kept."""
        return self.path / "state" / f"round-{round:04d}.safetensors"

    def kept_rounds(self) -> list[int]:
        """Return the rounds whose states were kept."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.latest.parent.glob("round-*.safetensors"))

    def create(self, experiment: Experiment) -> None:
        """Make the folder and write the experiment down. Raises CheckpointError where the disk refuses."""
        states.write_atomic(self.path / "experiment.yaml", dump(experiment).encode())

    def experiment(self) -> Experiment:
        """Return the experiment that the run was started with."""
        try:
            return build(read_yaml(self.path / "experiment.yaml"), source=str(self.path / "experiment.yaml"))
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: not a run's folder, or a damaged one ({error})") from None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one JSON file into the folder."""
        states.write_atomic(self.path / name, (json.dumps(plain(value), indent=1) + "\n").encode())

    def data(self) -> dict[str, Any]:
        """Return what the run's data amounted to when it began; raises CheckpointError where that is not to be had."""
        try:
            return dict(json.loads((self.path / "data.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / 'data.json'}: cannot be read ({error}); start a new run") from None

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to the journal, on disk before this returns. Raises CheckpointError where the disk refuses."""
        path = self.path / "rounds.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(plain(line)) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be written ({error.strerror}); free some space, then --resume"
            ) from None

    def lines(self) -> list[dict[str, Any]]:
        """Return the journal; a last line that a dying process left half-written is dropped."""
        try:
            text = (self.path / "rounds.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        try:
            return [json.loads(line) for line in whole]
        except ValueError:
            raise CheckpointError(f"{self.path / 'rounds.jsonl'}: a line is not JSON; was it edited?") from None

    def rewind(self, round: int) -> None:
        """Drop the journal's lines and the kept states from after this round: what clients kept then goes too."""
        for later in (r for r in self.kept_rounds() if r > round):
            self.kept(later).unlink()
        kept = [line for line in self.lines() if line["round"] <= round]
        content = "".join(json.dumps(line) + "\n" for line in kept)
        states.write_atomic(self.path / "rounds.jsonl", content.encode())


def plain(value: Any) -> Any:
    """Return the value with null for numbers that JSON has no word for: nan and infinities."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_folder(experiment: Experiment) -> RunFolder:
    """Make and return a folder that is this run's alone: <output>/<name>, or <name>-2, <name>-3, ...

    Nothing is overwritten, and of two runs that start together each gets its own. Raises CheckpointError where the
    place refuses.
    """
    for path in _names(experiment):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if path.parent.is_dir():
                continue
            raise CheckpointError(f"{path.parent}: is a file; set another output folder") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be made ({error.strerror}); set another output folder") from None
        return RunFolder(path)
    raise AssertionError("names do not end")


def last_folder(experiment: Experiment) -> RunFolder:
    """Return the newest folder of this experiment's name. Raises CheckpointError where there is none."""
    found = None
    for path in _names(experiment):
        if not path.exists():
            break
        folder = RunFolder(path)
        if (path / "experiment.yaml").is_file() and folder.experiment().name == experiment.name:
            found = folder  # another experiment may be called foo-2 itself
    if found is None:
        path = Path(experiment.output) / experiment.name
        if (path / "experiment.yaml").is_file():
            other = RunFolder(path).experiment().name
            raise CheckpointError(f"{path}: is a run of the name {other}; resume it with name={other}, its newest one")
        raise CheckpointError(f"{path}: no run to resume; start without --resume")
    return found


def _names(experiment: Experiment) -> Iterator[Path]:
    root = Path(experiment.output)
    yield root / experiment.name
    for number in itertools.count(2):
        yield root / f"{experiment.name}-{number}"


def check_same(folder: RunFolder, now: Experiment) -> None:
    """Raise ConfigError, naming the option, where a resumed run would not be the one that began.

    More rounds may follow, unless the learning rate was planned over the number of rounds.
    """
    if changed := difference(folder.experiment(), now):
        key, was, is_ = changed
        raise ConfigError(
            f"--resume {folder.path}: {key} was {was!r} and is now {is_!r}; set it back, or start a new run"
        )


def difference(before: Experiment, now: Experiment) -> tuple[str, Any, Any] | None:
    """Return (option, what it was, what it is) where a run could not go on with other options; None where it could."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    planned = before.train.round_schedule in ("linear", "cosine")
    for key, was, is_ in _differences(old, new):
        parts = key.split(".")
        sections = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if not (sections & MAY_CHANGE or (key == "federation.rounds" and not planned)):
            return key, was, is_
    return None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], at: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in old.keys() | new.keys():
        was, is_ = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(is_, dict):
            found += _differences(was, is_, f"{at}{key}.")
        elif was != is_:
            found.append((f"{at}{key}", was, is_))
    return sorted(found, key=lambda d: d[0])
