"""HumanEval and HumanEval-X: problems, and whether an answer passes their tests.

    problem ─ prompt ─▶ model ─ answer ─▶ cut ─▶ program with tests ─▶ runner ─▶ Verdict(passed, reason)

Sources: Chen et al., arXiv:2107.03374; Zheng et al. (CodeGeeX), arXiv:2303.17568.
"""

import gzip
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepfold.errors import ConfigError, DataError
from sheepfold.evaluation.code import runner
from sheepfold.evaluation.code.cutting import FS_LLM_STOP, Style, cut_braces, cut_python
from sheepfold.evaluation.code.languages import Language, language, missing_toolchain
from sheepfold.evaluation.code.limits import Limits, Outcome

SUITES = ("humaneval", "humaneval_x")
_REQUIRED = ("task_id", "prompt", "canonical_solution", "test")
_FURTHER = {"humaneval": ("entry_point",), "rust": ("declaration",), "go": ("test_setup", "import")}


@dataclass(frozen=True, slots=True)
class Problem:
    """One function to complete."""

    suite: str
    language: Language
    fields: Mapping[str, str]  # as published

    @property
    def task_id(self) -> str:
        return self.fields["task_id"]

    @property
    def canonical(self) -> str:
        return self.fields["canonical_solution"]

    def missing(self) -> str | None:
        """Return why no answer could pass on this machine, or None."""
        return missing_toolchain(self.language.name) or self.language.missing(self.fields)

    def prompt_text(self) -> str:
        """Return what the model continues: as published; for HumanEval-X after a comment that names the language.

        The published Rust prompt is a comment alone, without the function's name, so the declaration follows it.
        """
        if self.suite == "humaneval":
            return self.fields["prompt"]
        declaration = self.fields["declaration"] if self.language.name == "rust" else ""
        return f"{self.language.comment} language: {self.language.title}\n{self.fields['prompt']}{declaration}"

    def stop(self, style: Style = "published") -> tuple[str, ...]:
        """Return what ends an answer while it is generated."""
        return FS_LLM_STOP if self.language.name == "python" and style == "fs-llm" else self.language.stop

    def cut(self, completion: str, style: Style = "published") -> str:
        """Return the function's own part of an answer."""
        if self.language.name == "python":
            return cut_python(completion, style)
        return cut_braces(completion, self.language.name, self.language.closing)

    def as_dict(self) -> dict[str, Any]:
        return {"suite": self.suite, "language": self.language.name, **self.fields}

    @classmethod
    def of(cls, doc: Mapping[str, Any]) -> "Problem":
        """Return the problem that `as_dict` wrote."""
        fields = {name: value for name, value in doc.items() if name not in ("suite", "language")}
        return cls(doc["suite"], language(doc["language"]), fields)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one answer passed."""

    passed: bool
    reason: str  # passed, timed out, out of memory, did not compile: ..., ended before its tests did, failed: ...
    outcome: Outcome

    def as_dict(self) -> dict[str, Any]:
        """Return what results keep of it."""
        return {"passed": self.passed, "reason": self.reason, "seconds": self.outcome.seconds}


def read(place: Path, language_name: str = "python", suite: str = "humaneval") -> list[Problem]:
    """Return the problems of a file, or of a folder with the published file's name. Raises DataError, ConfigError."""
    if suite not in SUITES or (suite == "humaneval" and language_name != "python"):
        raise ConfigError(f"no problems in {language_name} in {suite}: humaneval is Python, humaneval_x has the others")
    spoken = language(language_name)
    path = _find(place, "HumanEval" if suite == "humaneval" else f"humaneval_{language_name}")
    needed = (*_REQUIRED, *_FURTHER.get(suite, ()), *_FURTHER.get(language_name, ()))
    problems = [Problem(suite, spoken, row) for row in _rows(path, needed)]
    if not problems:
        raise DataError(f"{path}: no problems in it")
    return problems


def check(problem: Problem, completion: str, limits: Limits | None = None, style: Style = "published") -> Verdict:
    """Return whether one answer passes its problem's tests. Runs it: see runner.py."""
    return check_all(problem, [completion], limits, style=style)[0]


def check_all(
    problem: Problem,
    completions: Sequence[str],
    limits: Limits | None = None,
    workers: int = 1,
    style: Style = "published",
) -> list[Verdict]:
    """Return the verdicts on a problem's answers in their order, `workers` of them running at a time."""
    if reason := problem.missing():
        raise ConfigError(f"{problem.task_id}: {reason}; install it, or leave the problem out")
    # A token for each program, so that none can have learnt another's.
    tokens = [secrets.token_hex(16) for _ in completions]
    jobs = [
        problem.language.job(problem.fields, problem.cut(answer, style), limits or Limits(), token)
        for answer, token in zip(completions, tokens, strict=True)
    ]
    outcomes = runner.run_all(jobs, workers)
    return [
        _verdict(outcome, len(job.steps), token) for outcome, job, token in zip(outcomes, jobs, tokens, strict=True)
    ]


def _verdict(outcome: Outcome, steps: int, token: str) -> Verdict:
    built = outcome.step == steps - 1
    if built and outcome.ok and token in outcome.stdout:
        return Verdict(True, "passed", outcome)
    return Verdict(False, _reason(outcome, built), outcome)


_MEMORY = re.compile(r"\bMemoryError\b|heap out of memory|OutOfMemoryError|std::bad_alloc|memory allocation of")
_ERROR = re.compile(
    r'^(?:Exception in thread "[^"]*" )?((?:[\w.]*(?:Error|Exception)|SystemExit|Keyboard\w+)\b.*)$', re.M
)
_COMPILER = re.compile(r"^.*\berror\b.*$", re.MULTILINE)
_FAILED_ASSERTION = re.compile(
    r"Assertion `.*' failed|^panic: .*|assertion failed: .*|(?<=panicked at ).*\n.*", re.MULTILINE
)


def _reason(outcome: Outcome, built: bool) -> str:
    """Return why a program did not pass, in one line."""
    if outcome.killed == "time":
        return "timed out"
    if outcome.killed == "memory" or (built and _MEMORY.search(outcome.stderr)):
        return "out of memory"
    if outcome.killed == "processes":
        return "too many processes"
    if outcome.killed == "guard":
        return "failed: it ended the process that watched it"
    if not built:
        return f"did not compile: {_line(_COMPILER.findall(outcome.stderr)[:1] or outcome.stderr.splitlines()[-1:])}"
    if outcome.ok:
        return "failed: it ended before its tests did"
    text = outcome.stderr + outcome.stdout
    lines = _ERROR.findall(text)[-1:] or _FAILED_ASSERTION.findall(text)[:1] or outcome.stderr.strip().splitlines()[-1:]
    ending = f"signal {outcome.signal}" if outcome.signal else f"exit code {outcome.exit_code}"
    return f"failed: {_line(lines) or ending}"


def _line(lines: Sequence[str]) -> str:
    return " ".join(lines[0].split())[:200] if lines else ""


def _find(place: Path, name: str) -> Path:
    if place.is_file():
        return place
    for candidate in (place / f"{name}.jsonl", place / f"{name}.jsonl.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(f"{place}: neither a file nor a folder with {name}.jsonl or {name}.jsonl.gz")


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_row(json.loads(line), needed, f"{path}, line {number}"))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON lines: {error}") from error
    return rows


def _row(row: Any, needed: Sequence[str], where: str) -> dict[str, str]:
    missing = [name for name in needed if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    if missing:
        raise DataError(f"{where}: no text in {', '.join(missing)}; expected a HumanEval problem")
    return {name: value for name, value in row.items() if isinstance(value, str)}
