"""HumanEval and HumanEval-X as plain functions that an evaluation harness can call.

    allowed(flag)                 first: nothing generated runs without the user's word
    skipped(language)             why a language cannot be scored on this machine, or None
    documents(place, language)    the problems, as dicts: suite, language, task_id, prompt, test, entry_point, ...
    unscorable(doc)               why one problem cannot be scored on this machine (a library it needs), or None
    scorable(docs)                the problems that can be, and a line about each that cannot: ask before generating
    prompt(doc)                   the text that the model continues
    stop(doc)                     the strings that end its answer
    score(doc, completions, k)    {"pass@1": 0.2, "pass@5": ...}, floats only, ready for process_results
    verdicts(doc, completions)    [{"passed": False, "reason": "failed: AssertionError", ...}] in the answers' order
    isolation()                   what held the programs in, for the results file

No hub is asked for anything. `completions` are the model's answers as generated, without the prompt; cutting them is
done here (and again does no harm). `style` is "published", or "fs-llm" for how FederatedScope-LLM cuts Python. The
programs of a call run side by side where `workers` is more than one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sheepfold.errors import ConfigError
from sheepfold.evaluation.code.cutting import Style
from sheepfold.evaluation.code.humaneval import Problem, check_all, read
from sheepfold.evaluation.code.languages import missing_toolchain
from sheepfold.evaluation.code.limits import Limits
from sheepfold.evaluation.code.pass_at_k import pass_at_ks
from sheepfold.evaluation.code.runner import isolation as found_isolation

Document = dict[str, Any]


def allowed(flag: bool, task: str = "this task") -> None:
    """Return where the user allowed generated programs to run; else raise ConfigError."""
    if not flag:
        raise ConfigError(
            f"{task} runs programs that the model wrote: add --allow-code to agree "
            "(docs/code-evaluation.md says what holds them in)"
        )


def skipped(language: str) -> str | None:
    """Return why problems in the language cannot be scored on this machine; None where they can."""
    return missing_toolchain(language)


def documents(place: Path, language: str = "python", suite: str = "humaneval") -> list[Document]:
    """Return the problems of a file, or of a folder that has HumanEval.jsonl or humaneval_<language>.jsonl (or .gz).

    suite: humaneval (Python alone) or humaneval_x. Raises DataError, ConfigError.
    """
    return [problem.as_dict() for problem in read(place, language, suite)]


def unscorable(doc: Document) -> str | None:
    """Return why no answer to a problem could pass on this machine, such as a missing library; None where one could."""
    return Problem.of(doc).missing()


def scorable(docs: Sequence[Document]) -> tuple[list[Document], list[str]]:
    """Return the problems that can be scored here, and a line about each one that cannot; scoring those raises."""
    reasons = [unscorable(doc) for doc in docs]
    left_out = [f"{doc['task_id']} is skipped: {why}" for doc, why in zip(docs, reasons, strict=True) if why]
    return [doc for doc, why in zip(docs, reasons, strict=True) if not why], left_out


def prompt(doc: Document) -> str:
    """Return the text that the model continues: as published, for HumanEval-X under a line that names the language."""
    return Problem.of(doc).prompt_text()


def stop(doc: Document, style: Style = "published") -> list[str]:
    """Return the strings that end an answer. For brace languages that is the function's last brace, put back later."""
    return list(Problem.of(doc).stop(style))


def verdicts(
    doc: Document,
    completions: Sequence[str],
    limits: Limits | None = None,
    workers: int = 1,
    style: Style = "published",
) -> list[dict[str, Any]]:
    """Return whether each answer passed and why not, in the answers' order. Runs generated programs: see `allowed`."""
    return [verdict.as_dict() for verdict in check_all(Problem.of(doc), completions, limits, workers, style)]


def score(
    doc: Document,
    completions: Sequence[str],
    k: Sequence[int] = (1, 5, 10),
    limits: Limits | None = None,
    workers: int = 1,
    style: Style = "published",
) -> dict[str, float]:
    """Return {"pass@k": estimate} for each k up to the number of answers. Runs generated programs: see `allowed`."""
    passed = sum(verdict["passed"] for verdict in verdicts(doc, completions, limits, workers, style))
    return pass_at_ks(len(completions), passed, k)


def isolation() -> dict[str, Any]:
    """Return what holds programs in on this machine, for the results: network, processes, files, user, limits, why."""
    found = found_isolation()
    return {**found.as_dict(), "sentence": found.sentence()}
