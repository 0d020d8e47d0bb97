"""Benchmark results beside a run, eval/*.json: what `sheepfold eval` writes, and lm-evaluation-harness's own files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One figure of one task."""

    file: str
    subject: str
    """What was scored: base, federated, ...; '' where the file does not say"""
    task: str
    measure: str
    value: float | None
    error: float | None = None
    """Standard error of its mean over rows, where the file has one."""
    rows: int | None = None
    """Rows that were scored, where the file says it."""
    inside: bool = False
    """Whether the task is a part of another in the file, as a subject is of MMLU."""
    problem: str = ""
    """Why a file shows no figure."""


def read_benchmarks(folder: Path) -> list[Benchmark]:
    """Return the figures of every JSON file in the folder, by file name; a file that cannot be read says so."""
    found: list[Benchmark] = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            figures = list(_figures(path.name, json.loads(path.read_text(encoding="utf-8"))))
            found += figures or [_problem(path, "no task's figures were found in it")]
        except (OSError, ValueError) as error:
            found.append(_problem(path, f"cannot be read: {error}"))
        except (AttributeError, KeyError, TypeError):
            found.append(_problem(path, "its results are not laid out as sheepfold or lm-eval write them"))
    return found


def _problem(path: Path, words: str) -> Benchmark:
    return Benchmark(path.name, "", "", "", None, problem=words)


def _figures(file: str, content: Mapping[str, Any]) -> Iterator[Benchmark]:
    """Yield ours, {adapters: {name: {results: {task: {metrics, rows}}}}}, or lm-eval's, {results: {task: figures}}."""
    for name, scored in content.get("adapters", {}).items():
        members = {member for result in scored["results"].values() for member in result.get("members", ())}
        for task, result in scored["results"].items():
            for key, score in result["metrics"].items():
                rows, inside = result.get("rows"), task in members
                value, error = score["value"], score.get("stderr")
                yield Benchmark(file, name, task, _measure(key), value, error, rows, inside)
    if "adapters" in content:
        return
    members = {member for group in content.get("group_subtasks", {}).values() for member in group}
    for task, scores in content.get("results", {}).items():
        for key, value in scores.items():
            measure, _, way = key.partition(",")
            if isinstance(value, int | float) and not measure.endswith("_stderr") and measure != "sample_len":
                error = scores.get(f"{measure}_stderr,{way}")
                error = error if isinstance(error, int | float) else None  # lm-eval writes 'N/A' where it has none
                yield Benchmark(file, "", task, _measure(key), float(value), error, None, task in members)


def _measure(key: str) -> str:
    """Return 'acc' for 'acc,none', 'exact_match (strict-match)' for 'exact_match,strict-match'."""
    measure, _, way = key.partition(",")
    return measure if way in ("", "none") else f"{measure} ({way})"
