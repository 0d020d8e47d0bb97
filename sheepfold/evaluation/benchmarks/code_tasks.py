"""HumanEval and HumanEval-X as tasks of the harness, with problems from local files and our own runner of programs.

The harness asks the model and counts; sheepfold.evaluation.code cuts the answers, runs them held in, and estimates
pass@k. The harness's own HumanEval fetches its scorer from a hub, and runs programs in this process's surroundings.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from sheepfold.errors import ConfigError, DataError
from sheepfold.evaluation.benchmarks.quiet import quiet_harness
from sheepfold.evaluation.benchmarks.settings import Settings
from sheepfold.evaluation.code import harness_tasks as code
from sheepfold.evaluation.code.pass_at_k import pass_at_ks
from sheepfold.loading import first_line

LANGUAGES = ("python", "js", "cpp", "go", "java", "rust")
HUB = "openai/openai_humaneval"
NAMES = ("humaneval", "humaneval_x", *(f"humaneval_x_{language}" for language in LANGUAGES))
KS = (1, 5, 10, 100)
NEW_TOKENS = 512
TOP_P = 0.95
"""Of sampled programs, as in Chen et al., arXiv:2107.03374."""


def check(name: str, settings: Settings) -> None:
    """Raise ConfigError without the user's word or the language's tools, DataError where the problems are not there."""
    code.allowed(settings.allow_code, name)
    if (language := _language(name)) and (why := code.skipped(language)):
        raise ConfigError(f"{name}: {why}; leave it out, or install it")
    for suite, spoken in _parts(name):
        if settings.data is not None:
            code.documents(_folder(suite, settings.data), spoken, suite)
        elif suite == "humaneval_x":
            raise ConfigError(
                f"{name}: its problems are on the hub only as a program, which is never run; --data FOLDER reads "
                "humaneval_x/humaneval_<language>.jsonl.gz"
            )


def tasks(names: Sequence[str], settings: Settings) -> tuple[list[Any], list[str]]:
    """Return the harness's task objects, and a line about each language and problem that had to be left out."""
    if not names:
        return [], []
    parts = list(dict.fromkeys(part for name in names for part in _parts(name)))
    missing = {language: why for suite, language in parts if (why := code.skipped(language)) and suite != "humaneval"}
    notes, made = [f"{language} is skipped: {why}" for language, why in missing.items()], []
    with quiet_harness():
        for suite, language in (part for part in parts if part[1] not in missing):
            documents, left_out = code.scorable(_documents(suite, language, settings.data))
            made.append(_task(suite, language, documents, settings))
            notes += left_out
    return made, notes


def _parts(name: str) -> list[tuple[str, str]]:
    """Return (suite, language) of everything that a name comes to."""
    if name == "humaneval":
        return [("humaneval", "python")]
    one = _language(name)
    return [("humaneval_x", language) for language in ([one] if one else LANGUAGES)]


def _language(name: str) -> str | None:
    return name.removeprefix("humaneval_x_") if name.startswith("humaneval_x_") else None


def _task(suite: str, language: str, documents: Sequence[dict[str, Any]], settings: Settings) -> Any:
    """Return one language's problems as a task of the harness."""
    from lm_eval.api.task import ConfigurableTask

    sampled = {"do_sample": True, "top_p": TOP_P} if settings.temperature else {"do_sample": False}
    task = ConfigurableTask(
        config={
            "task": suite if suite == "humaneval" else f"{suite}_{language}",
            "custom_dataset": partial(_dataset, documents),
            "test_split": "test",
            "output_type": "generate_until",
            "num_fewshot": 0,
            "doc_to_text": code.prompt,
            "doc_to_target": "",
            "repeats": settings.samples,
            "generation_kwargs": {
                "until": code.stop(documents[0]),
                "max_gen_toks": NEW_TOKENS,
                "temperature": settings.temperature,
                **sampled,
            },
            "filter_list": [{"name": "none", "filter": [{"function": "custom", "filter_fn": _verdicts}]}],
            "process_results": _pass_at_k,
            "metric_list": [
                {"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in _ks(settings.samples)
            ],
            "metadata": {"version": 1.0},
        }
    )
    task.sandboxed = True  # programs are run by sheepfold.evaluation.code
    task.extra_facts = {
        "samples": settings.samples,
        "isolation": code.isolation(),
        "data": _data(suite, language, settings.data),
    }
    return task


def _documents(suite: str, language: str, folder: str | None) -> list[dict[str, Any]]:
    if folder is not None:
        return code.documents(_folder(suite, folder), language, suite)
    import datasets

    try:
        rows = datasets.load_dataset(HUB, split="test")
    except Exception as error:  # hub, network, parsing: each library has its own
        raise DataError(f"{suite}: {HUB} cannot be had ({first_line(error)}); --data reads it from a folder") from None
    return [{"suite": suite, "language": language, **row} for row in rows]


def _folder(suite: str, data: str) -> Path:
    return Path(data).expanduser() / suite


def _data(suite: str, language: str, folder: str | None) -> dict[str, Any]:
    from sheepfold.evaluation.benchmarks.local_data import find, fingerprint

    if folder is None:
        return {"source": HUB}
    name = "HumanEval" if suite == "humaneval" else f"humaneval_{language}"
    path = find(folder, f"{suite}/{name}.jsonl")
    return {"source": "files", "files": [path.name], "sha256": fingerprint([path])}


def _dataset(documents: Sequence[Mapping[str, Any]], **_: Any) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list([dict(doc) for doc in documents])}


def _verdicts(responses: Sequence[Sequence[str]], documents: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """Return, for every problem, whether each of its answers passed; as many run at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda doc, own: code.verdicts(doc, own), documents, responses))


def _pass_at_k(document: Any, results: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Return {"pass@k": estimate} of one problem, for each k up to the number of its answers."""
    (verdicts,) = results
    return pass_at_ks(len(verdicts), sum(bool(v["passed"]) for v in verdicts), _ks(len(verdicts)))


def _ks(samples: int) -> list[int]:
    """Return the k of pass@k that so many answers can tell, their own number among them."""
    return sorted({*(k for k in KS if k <= samples), samples})
