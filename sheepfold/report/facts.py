"""A run's folder as one value: everything that its report shows. What a run did not write down is None."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sheepfold.data.table import Counts
from sheepfold.errors import CheckpointError
from sheepfold.evaluation.benchmarks.after_run import FILE as END_OF_RUN
from sheepfold.joining import Closing
from sheepfold.journal import RunFolder
from sheepfold.local.store import folder_name
from sheepfold.report.adapters import AdapterFiles, read_adapter
from sheepfold.report.benchmarks import Benchmark, read_benchmarks
from sheepfold.report.lines import Round, numbers, read_round

SLACK_S = 2.0
"""A closing table older than the journal by more than this was made before the run went on."""

Phase = Literal["waiting", "training", "comparing", "judging", "finished", "stopped early"]
"""comparing: training baselines, and the closing table; judging: benchmarks (evaluation.tasks)."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What one run's report shows."""

    path: Path
    name: str
    settings: Mapping[str, Any]
    """The experiment, every option resolved."""
    text: str
    """experiment.yaml"""
    rounds: Sequence[Round]
    participants: frozenset[str]
    """Clients that took part so far."""
    phase: Phase
    heard: float | None
    """When the journal was last written, seconds since 1970."""
    data: Mapping[str, Any] | None
    table: Counts | None
    """Training rows of each client in each category."""
    closing: Closing | None
    stale_closing: bool
    """Whether closing.json was there, and older than the last rounds."""
    hash: str | None
    adapters: Mapping[str, AdapterFiles] = field(default_factory=dict)
    """federated, best, and 'personal: ' and a client's name"""
    benchmarks: Sequence[Benchmark] = ()

    @property
    def planned(self) -> int:
        """Rounds asked for."""
        return int(self.settings["federation"]["rounds"])

    @property
    def done(self) -> int:
        """Rounds in the journal."""
        return self.rounds[-1].round if self.rounds else 0

    @property
    def trained(self) -> Sequence[Round]:
        """The rounds after the start."""
        return [r for r in self.rounds if r.round]

    @property
    def evaluated(self) -> Sequence[Round]:
        """The rounds with a held-out loss, the start among them."""
        return [r for r in self.rounds if r.loss]

    @property
    def key(self) -> str:
        """The held-out loss that the report follows: over all clients' tokens, or what there is."""
        keys = self.evaluated[0].loss if self.evaluated else {}
        return next((k for k in ("weighted", "global") if k in keys), "weighted")

    @property
    def best(self) -> Round | None:
        """The evaluated round of the lowest held-out loss, the first of equal ones."""
        scored = [r for r in self.evaluated if self.key in r.loss]
        return min(scored, key=lambda r: r.loss[self.key], default=None)

    @property
    def target(self) -> str:
        """What a loss is a mean over, one of: token, row (each has one label)."""
        return "row" if self.settings.get("task") == "classification" else "token"

    @property
    def where(self) -> str:
        """On what the figures that the report follows were taken."""
        return "on the global test set" if self.key == "global" else f"over all clients' {self.target}s"

    @property
    def where_taught(self) -> str:
        """On what the teacher's figures were taken."""
        has_test_set = any("global" in r.loss for r in self.rounds)
        return "on the global test set" if has_test_set else f"over all clients' {self.target}s"

    @property
    def strategy(self) -> str:
        """The method, outermost first."""
        named = self.settings["federation"]["strategy"]
        return named if isinstance(named, str) else " over ".join(named)

    @property
    def clients(self) -> Mapping[str, Mapping[str, int]]:
        """Each client's rows by split, as the run began."""
        return dict((self.data or {}).get("clients", {}))

    def seconds(self, stage: str) -> float:
        """Return a stage's seconds over all rounds."""
        return sum(r.seconds.get(stage, 0.0) for r in self.rounds)

    def quiet_after(self) -> float:
        """Return how many seconds without a new round are longer than this run's rounds explain."""
        took = [r.seconds.get("round", 0.0) + r.seconds.get("evaluation", 0.0) for r in self.trained]
        return max(60.0, 5 * statistics.median(took)) if took else 600.0


def read_run(path: Path) -> RunFacts:
    """Return what a run's folder tells; raises CheckpointError with one line where it is no run's or is damaged."""
    folder = RunFolder(path)
    experiment = folder.experiment()
    settings = experiment.model_dump(mode="json")
    lines = folder.lines()
    try:
        rounds = [read_round(line) for line in lines]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path / 'rounds.jsonl'}: a line is not one of a run ({error!r}); was it edited?"
        ) from None
    participants = frozenset(client for line in lines for client in line.get("clients", {}))
    data = folder.data() if (path / "data.json").exists() else None
    closing, stale = _closing(path)
    phase = _phase(path, settings, rounds, closing, stale)
    current = phase in ("finished", "stopped early", "comparing", "judging")
    return RunFacts(
        path=path,
        name=str(settings["name"]),
        settings=settings,
        text=(path / "experiment.yaml").read_text(encoding="utf-8"),
        rounds=rounds,
        participants=participants,
        phase=phase,
        heard=_written(path / "rounds.jsonl"),
        data=data,
        table=_table(data),
        closing=closing if current and not stale else None,
        stale_closing=closing is not None and (stale or not current),
        hash=lines[-1].get("adapter") if lines else None,
        adapters=_adapters(path, (data or {}).get("clients", {})) if current else {},
        benchmarks=read_benchmarks(path / "eval"),
    )


def _written(path: Path) -> float | None:
    return path.stat().st_mtime if path.is_file() else None


def _closing(path: Path) -> tuple[Closing | None, bool]:
    """Return the closing table without figures that were not finite, and whether the journal went on since."""
    file = path / "closing.json"
    if not file.is_file():
        return None, False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        scores = {
            measure: {rows: numbers(who) for rows, who in table.items()} for measure, table in found["scores"].items()
        }
        closing = Closing(scores, found["clients"], found["shared_rows"], [m for m in scores if m != "loss"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a closing table ({error}); was it edited?") from None
    return closing, file.stat().st_mtime < (_written(path / "rounds.jsonl") or 0) - SLACK_S


def _phase(
    path: Path, settings: Mapping[str, Any], rounds: Sequence[Round], closing: Closing | None, stale: bool
) -> Phase:
    """Return where a run stands, from what is in its folder: no process says that it ended."""
    if not rounds:
        return "waiting"
    exported = _written(path / "adapter") is not None or (path / "adapter").is_dir()
    all_done = rounds[-1].round >= settings["federation"]["rounds"]
    if not exported or not (all_done or _stopped_itself(path, settings)):
        return "training"
    compares = settings["baselines"] or settings["evaluation"]["metrics"] or any(settings["personal"].values())
    if compares and (closing is None or stale):
        return "comparing"
    benchmarks = _written(path / "eval" / END_OF_RUN) or 0.0
    if settings["evaluation"].get("tasks") and benchmarks < (_written(path / "rounds.jsonl") or 0) - SLACK_S:
        return "judging"
    return "finished" if all_done else "stopped early"


def _stopped_itself(path: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether early stopping ended the run: its export is newer than its journal."""
    newest = max((f.stat().st_mtime for f in (path / "adapter").iterdir()), default=0.0)
    return bool(settings["stop"]["key"]) and newest >= (_written(path / "rounds.jsonl") or 0) - SLACK_S


def _table(data: Mapping[str, Any] | None) -> Counts | None:
    """Return training rows by client and category; None for runs that did not count them."""
    if not data or "categories" not in data:
        return None
    names, held = data["categories"]["names"], data["categories"]["rows"]
    rows = np.zeros((len(held), len(names)), dtype=np.int64)
    for i, counted in enumerate(held.values()):
        for index, count in counted.items():
            rows[i, int(index)] = count
    return Counts(tuple(held), tuple(names), rows)


def _adapters(path: Path, clients: Iterable[str]) -> dict[str, AdapterFiles]:
    """Return the adapters by name; a client's own by the client's, which its folder's name need not show."""
    places = {"federated": path / "adapter", "best": path / "best"}
    if (path / "personal").is_dir():
        whose = {folder_name(client): client for client in clients}
        folders = sorted((path / "personal").iterdir())
        places |= {f"personal: {whose.get(folder.name, folder.name)}": folder for folder in folders}
    found = {name: read_adapter(place) for name, place in places.items()}
    return {name: files for name, files in found.items() if files is not None}
