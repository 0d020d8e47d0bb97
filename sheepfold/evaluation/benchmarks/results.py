"""What an evaluation came to: values, and what is written of them."""

import importlib.metadata
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheepfold.errors import ConfigError
from sheepfold.evaluation.benchmarks.settings import Settings
from sheepfold.folders import replace_file, writing
from sheepfold.journal import plain

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
HEAD = {"gsm8k": "numeric_match,flexible-extract", "gsm8k_cot": "numeric_match,answer-is"}
"""The figure that stands for a task, where it is not the first."""


@dataclass(frozen=True, slots=True)
class Score:
    """One figure. `stderr` is of its mean over rows; None where there is none."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task, or a group of tasks, under one adapter."""

    scores: Mapping[str, Score]
    """'metric' or 'metric,filter' -> its figure"""
    rows: int
    members: tuple[str, ...] = ()
    """The tasks of a group."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured: shots, prompts, decoding, data, isolation, ..."""

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        scores = {name: {"value": s.value, "stderr": s.stderr} for name, s in self.scores.items()}
        return {
            "metrics": scores,
            "rows": self.rows,
            **({"members": list(self.members)} if self.members else {}),
        } | dict(self.facts)


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation: every adapter's results, and all that they depend on."""

    asked: tuple[str, ...]
    """The tasks that were asked for, in order."""
    adapters: Mapping[str, str | None]
    """name -> hash; None for the bare base"""
    results: Mapping[str, Mapping[str, TaskResult]]
    """name -> task -> result"""
    facts: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON; see docs/evaluate.md."""
        return plain(  # type: ignore[no-any-return]
            {
                "format": FORMAT,
                **self.facts,
                "tasks": list(self.asked),
                "adapters": {
                    name: {"hash": mark, "results": {task: r.as_dict() for task, r in self.results[name].items()}}
                    for name, mark in self.adapters.items()
                },
            }
        )

    def answers(self, settings: Settings, adapters: Mapping[str, str | None]) -> bool:
        """Return whether asking these adapters (name -> hash) so, with the libraries of today, is what was done."""
        same = self.facts.get("settings") == settings.as_dict() and self.facts.get("versions") == versions()
        return same and dict(self.adapters) == dict(adapters)

    def data(self, task: str) -> str | None:
        """Return the sha256 of the rows that a task was asked on; None where it has none of its own."""
        first = next(iter(self.results.values()))
        return first[task].facts["data"].get("sha256") if task in first and "data" in first[task].facts else None

    def write(self, path: Path) -> None:
        """Write the JSON, whole or not at all. Raises CheckpointError where the disk refuses."""
        with writing(path):
            replace_file(path, (json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n").encode())

    def table(self) -> "Table":
        """Return what was asked for as a table: a line a figure, a column an adapter."""
        from rich.markup import escape

        from sheepfold.terminal import table

        view = table("benchmarks", "task", "metric", "rows", *map(escape, self.adapters))
        first = next(iter(self.results.values()))
        for task in self._shown(first):
            for metric in first[task].scores:
                figures = [_figure(self.results[name][task].scores.get(metric)) for name in self.adapters]
                view.add_row(escape(task), escape(metric), f"{first[task].rows:,}", *figures)
        return view

    def notes(self) -> list[str]:
        """Return what a reader should know before the figures: prompts that were shortened, what could not be run."""
        first = next(iter(self.results.values()))
        top = self._shown(first, deep=False)
        return [note for task in top for note in _notes(task, first[task])]

    def headline(self) -> dict[str, dict[str, Any]]:
        """Return {task: {"metric": name, "values": {adapter: figure}}} of what was asked for, one metric a task."""
        first, made = next(iter(self.results.values())), {}
        for task in self._shown(first, deep=False):
            metric = HEAD.get(task, next(iter(first[task].scores)))
            values = {name: self.results[name][task].scores[metric].value for name in self.adapters}
            made[task] = {"metric": metric, "values": values}
        return made

    def _shown(self, results: Mapping[str, TaskResult], deep: bool = True) -> Sequence[str]:
        """Return the tasks asked for and, of groups, their groups or few members: all others are in the JSON."""
        inside = {member for result in results.values() for member in result.members}
        shown = []
        for task, result in results.items():
            if task not in inside:
                shown.append(task)
                shown += [m for m in result.members if deep and (results[m].members or len(result.members) <= 8)]
        return [task for task in dict.fromkeys(shown) if results[task].scores]


def read(path: Path) -> Report | None:
    """Return the report that `Report.write` wrote; None where there is none, or none of ours."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        results = {name: {t: _task(r) for t, r in own["results"].items()} for name, own in told["adapters"].items()}
        adapters = {name: own["hash"] for name, own in told["adapters"].items()}
        facts = {key: value for key, value in told.items() if key not in ("format", "tasks", "adapters")}
        return Report(tuple(told["tasks"]), adapters, results, facts) if told["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _task(told: Mapping[str, Any]) -> TaskResult:
    facts = {key: value for key, value in told.items() if key not in ("metrics", "rows", "members")}
    scores = {
        name: Score(float("nan") if s["value"] is None else s["value"], s["stderr"])
        for name, s in told["metrics"].items()
    }
    return TaskResult(scores, told["rows"], tuple(told.get("members", ())), facts)


def _notes(task: str, result: TaskResult) -> list[str]:
    prompts, shots = result.facts.get("prompts"), int(result.facts.get("shots") or 0)
    notes = list(result.facts.get("notes", ()))
    if prompts and any(int(given) < shots for given in prompts["rows_by_shots"]):
        fewer = sum(rows for given, rows in prompts["rows_by_shots"].items() if int(given) < shots)
        text = f"{fewer:,} of {result.rows:,} prompts were too long for {shots} shots and had fewer"
        notes.append(text + (f"; {prompts['cut']:,} lost their beginning even without" if prompts["cut"] else ""))
    elif prompts and prompts["cut"]:
        notes.append(f"{prompts['cut']:,} of {result.rows:,} prompts did not fit and lost their beginning")
    return [f"{task}: {note}" for note in notes]


def _figure(score: Score | None) -> str:
    if score is None or not math.isfinite(score.value):
        return ""
    margin = f" ± {score.stderr:.4f}" if score.stderr is not None else ""
    return f"{score.value:.4f}{margin}"


def versions() -> dict[str, str | None]:
    """Return the versions of what the figures depend on; None for what is not installed."""
    return {name: _version(name) for name in ("sheepfold", "lm-eval", "transformers", "torch", "datasets")}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def new_file(folder: Path, words: Sequence[str]) -> Path:
    """Return a results file that is not there yet: <words>.json, or <words>-2.json, -3, ..."""
    short = [*words[:4], *(["more"] if len(words) > 4 else [])]
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in "-".join(short))[:100]
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for path in (folder / f"{name}.json" for name in names) if not path.exists())


def check_place(out: Path) -> None:
    """Raise ConfigError where a results file cannot be: better before an evaluation than after it."""
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name a file, such as {out / 'results.json'}")
