"""Which of the harness's tasks we know by heart: their local files, their shots, and what we add to their metrics.

The definitions stay the harness's own. From local files only the rows' origin is replaced; GSM8K is also compared as
numbers; MMLU gets its five examples, which the harness gives only on request. Any other name is the harness's business.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from sheepfold.errors import ConfigError, missing_extra
from sheepfold.evaluation.benchmarks import local_data, numbers

MMLU_SHOTS = 5
TRUTHFULQA = ("truthfulqa_mc1", "truthfulqa_mc2")
"""What `truthfulqa` means: the harness's own tag also generates, and judges by BLEU and ROUGE."""
ABOUT = {
    "gsm8k": "grade-school mathematics, 5 worked examples, compared as numbers",
    "gsm8k_cot": "the same, 8 chains of thought, as in FederatedScope-LLM",
    "mmlu": "four-choice questions in 57 subjects, 5 examples; also mmlu_stem, mmlu_anatomy, ...",
    "truthfulqa": "multiple choice with one (mc1) and several (mc2) right answers",
    "humaneval": "Python functions, run against their tests: pass@k (needs --allow-code)",
    "humaneval_x": "the same in the languages that this machine has (needs --allow-code)",
}
WRITTEN = re.compile(r"""^\s*(?:-|["']?(?:task|group|tag)["']?\s*:)\s*["']?([\w.\-]+)["']?\s*$""", re.MULTILINE)
"""What a file of the harness may call a task, a group or a tag."""
_NUMERIC = {"metric": numbers.numeric_match, "aggregation": "mean", "higher_is_better": True}
_ANSWER_IS = {
    "name": "answer-is",
    "filter": [{"function": "custom", "filter_fn": numbers.take_answer_numbers}, {"function": "take_first"}],
}


@dataclass(frozen=True, slots=True)
class Local:
    """Where a task's rows are in a folder."""

    read: Callable[..., Mapping[str, Any]]
    """(folder, **ignored) -> {split: datasets.Dataset}"""
    files: Callable[[str], list[Path]]


def local(name: str, config: Mapping[str, Any]) -> Local | None:
    """Return how a task is read from a folder; None for one that only the hub has."""
    if config.get("dataset_path") == "openai/gsm8k":
        return Local(local_data.gsm8k, local_data.gsm8k_files)
    if config.get("dataset_path") == "cais/mmlu" and config.get("output_type") == "multiple_choice":
        subject = str(config["dataset_name"])
        return Local(partial(local_data.mmlu, subject=subject), partial(local_data.mmlu_files, subject=subject))
    if name in TRUTHFULQA:
        return Local(local_data.truthfulqa, local_data.truthfulqa_files)
    return None


def manager(names: Sequence[str]) -> Any:
    """Return the harness's index of tasks; that of everything takes 20 seconds, so it is read for unknown names alone.

    Raises ConfigError for a name that is nobody's, with the nearest ones.
    """
    tasks = _harness()
    root = Path(tasks.__file__).parent
    ours = [root / "gsm8k", root / "mmlu" / "default", root / "truthfulqa"]
    index = tasks.TaskManager(include_defaults=False, include_path=ours)
    if all(name in index.task_index for name in names):
        return index
    _check_written(names, root)
    index = tasks.TaskManager()
    _refuse([name for name in names if name not in index.task_index], index.all_tasks)
    return index


def _check_written(names: Sequence[str], root: Path) -> None:
    """Raise ConfigError for a name that stands in none of the harness's files: found in a second, not in twenty."""
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in root.rglob("*")
        if path.suffix in ("", ".yaml", ".yml") and path.is_file()
    )
    written = set(WRITTEN.findall(text))
    _refuse([name for name in names if name not in written], written)


def _refuse(unknown: Sequence[str], known: Iterable[str]) -> None:
    if unknown:
        near = get_close_matches(unknown[0], {*known, *ABOUT}, n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ConfigError(f"no task {unknown[0]!r}; {hint}`sheepfold eval --tasks list` shows what there is")


def _harness() -> Any:
    try:
        import lm_eval.tasks
    except ModuleNotFoundError:
        raise missing_extra("this task", "lm-eval", "eval") from None
    return lm_eval.tasks


def leaves(index: Mapping[str, Any], name: str) -> list[str]:
    """Return the names of the tasks that a group, a tag or a task comes to."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    members = (m if isinstance(m, str) else m.get("task", m.get("group")) for m in entry.cfg.get("task") or ())
    return [leaf for member in members if member in index for leaf in leaves(index, member)]


def adjust(index: dict[str, Any], names: Iterable[str], folder: str | None) -> dict[str, list[Path]]:
    """Let the tasks that we know read from the folder (None: the hub), with our shots and metrics.

    Returns the files of every task that reads from the folder. Raises DataError for one that is not there.
    """
    read: dict[str, list[Path]] = {}
    for name in names:
        config = dict(index[name].cfg)
        place = local(name, config)
        if place is None:
            continue
        changed = config | _ours(name, config)
        if folder is not None:
            read[name] = place.files(folder)
            changed |= {"custom_dataset": partial(place.read, folder), "dataset_path": None, "dataset_name": None}
        index[name] = replace(index[name], yaml_path=None, cfg=changed)
    return read


def _ours(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what we change in a task's definition."""
    if name in ("gsm8k", "gsm8k_cot"):
        more = {"filter_list": [*config["filter_list"], _ANSWER_IS]} if name == "gsm8k_cot" else {}
        return {"metric_list": [*config["metric_list"], _NUMERIC], **more}
    if name == f"mmlu_{config.get('dataset_name')}":
        return {"num_fewshot": MMLU_SHOTS}
    if name == "truthfulqa_mc2":  # the index knows the function only by a name relative to the harness's file
        from lm_eval.tasks.truthfulqa.utils import process_results_mc2

        return {"process_results": process_results_mc2}
    return {}
