"""Running the harness's tasks: loaded once, then evaluated under one adapter after another."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sheepfold.data.turns import Template
from sheepfold.errors import ConfigError, DataError, SheepfoldError
from sheepfold.evaluation.benchmarks import local_data, suite
from sheepfold.evaluation.benchmarks.quiet import quiet_harness, seeded
from sheepfold.evaluation.benchmarks.results import Score, TaskResult
from sheepfold.evaluation.benchmarks.settings import Settings
from sheepfold.evaluation.benchmarks.shots import Shots, giving_way
from sheepfold.loading import first_line

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What the harness's tasks call the longest answer."""


@dataclass(slots=True)
class Tasks:
    """The harness's tasks, ready to be asked."""

    loaded: dict[str, Any]
    """As the harness's TaskManager.load returns them: tasks, groups."""
    files: Mapping[str, list[Path]]
    """Local files of the tasks that have some."""
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, Any]:
        """Every single task by name."""
        return dict(self.loaded["tasks"])


def check(names: Sequence[str], folder: str | None) -> tuple[Any, dict[str, list[Path]]]:
    """Return the index with these tasks in it and their local files; raises ConfigError or DataError. Loads no rows."""
    with quiet_harness():
        index = suite.manager(names)
    entries = index.task_index
    single: dict[str, str] = {}
    for name in names:
        for leaf in suite.leaves(entries, name):
            if leaf in single:
                raise ConfigError(f"{leaf} is part of {single[leaf]} and of {name}; leave one of them out")
            single[leaf] = name
            _refuse_unsafe(leaf, entries[leaf].cfg.get("unsafe_code"))
    files = suite.adjust(entries, single, folder)
    if folder is not None and names and not files:
        raise ConfigError(f"--data {folder} has no effect on {', '.join(names)}, whose rows come from the hub")
    return index, files


def load(names: Sequence[str], settings: Settings, more: Sequence[Any] = ()) -> Tasks:
    """Return the tasks with their rows; `more`: tasks that we defined ourselves.

    Raises DataError for rows that cannot be had, ConfigError for options that no task takes.
    """
    index, files = check(names, settings.data) if names else (suite.manager([]), {})
    with quiet_harness(), seeded(settings.seed):
        try:
            loaded = index.load([*names, *more])
        except SheepfoldError:
            raise
        except Exception as error:  # the hub, the network, parsing and overlapping groups: each raises its own
            raise DataError(
                f"{', '.join(names)}: the rows cannot be had ({first_line(error)}); --data reads them from local files"
            ) from None
    tasks = Tasks(loaded, files)
    for name, task in tasks.tasks.items():
        _refuse_unsafe(name, getattr(task, "UNSAFE_CODE", False) and not getattr(task, "sandboxed", False))
    _set_shots(tasks, settings)
    return tasks


def _refuse_unsafe(name: str, unsafe: Any) -> None:
    if unsafe:
        raise ConfigError(
            f"{name}: the harness would run generated programs in this process; only humaneval and humaneval_x run "
            "them held in"
        )


def _set_shots(tasks: Tasks, settings: Settings) -> None:
    takes = []
    for name, task in tasks.tasks.items():
        usual = task.config.num_fewshot
        if settings.shots is None or usual == 0:
            task.set_config("num_fewshot", usual or 0)
            continue
        held = len(task.sampler.df)
        if settings.shots > held:
            raise ConfigError(f"--shots {settings.shots}: {name} has {held} examples")
        task.set_config("num_fewshot", settings.shots)
        takes.append(name)
    if settings.shots is not None and tasks.tasks and not takes:
        raise ConfigError(f"--shots has no effect: {', '.join(list(tasks.tasks)[:4])} are asked without examples")


def evaluate(
    tasks: Tasks, model: Any, tokenizer: Any, template: Template | None, settings: Settings
) -> dict[str, TaskResult]:
    """Return every task's and group's result under the model that is handed in. template None: plain prompts."""
    from lm_eval.evaluator import evaluate as harness_evaluate

    from sheepfold.evaluation.benchmarks.harness_model import Model

    with quiet_harness(), seeded(settings.seed), contextlib.ExitStack() as open_:
        asked = Model(model, tokenizer, settings.batch_rows, template)
        counts = {name: open_.enter_context(_prepared(task, asked, settings)) for name, task in tasks.tasks.items()}
        found = harness_evaluate(
            lm=asked,
            task_dict=tasks.loaded,
            limit=settings.limit,
            apply_chat_template=template is not None,
            fewshot_as_multiturn=False,
            log_samples=False,
            confirm_run_unsafe_code=settings.allow_code,
        )
        how = {name: _how(tasks, name, counts[name], asked) for name in tasks.tasks}
    return {name: _result(name, row, found, how) for name, row in found["results"].items()}


@contextlib.contextmanager
def _prepared(task: Any, model: Any, settings: Settings) -> Iterator[Shots]:
    """Seed the task's draws, let its answers fit the model, and let its shots give way."""
    task.set_fewshot_seed(settings.seed)
    before = task.config.generation_kwargs
    if task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", _lengths(before or {}, model, settings))
    try:
        with giving_way(task, model) as shots:
            yield shots
    finally:
        task.set_config("generation_kwargs", before)


def _lengths(usual: Mapping[str, Any], model: Any, settings: Settings) -> dict[str, Any]:
    """Return the generation settings with an answer that leaves half of the positions to the prompt."""
    most = model.max_length // 2
    if settings.new_tokens is None and model.new_tokens(usual) <= most:
        return dict(usual)
    settings.check_positions(model.max_length)
    return {k: v for k, v in usual.items() if k not in LENGTHS} | {"max_gen_toks": settings.new_tokens or most}


def _how(tasks: Tasks, name: str, shots: Shots, model: Any) -> dict[str, Any]:
    """Return how a task was asked."""
    task = tasks.tasks[name]
    how: dict[str, Any] = {"kind": task.OUTPUT_TYPE, "shots": task.config.num_fewshot, "prompts": shots.as_dict()}
    if task.OUTPUT_TYPE == "generate_until":
        used = dict(task.config.generation_kwargs or {})
        how["decoding"] = {k: v for k, v in used.items() if k not in LENGTHS} | {
            "max_new_tokens": model.new_tokens(used)
        }
    how["data"] = _data(task, tasks.files.get(name))
    how |= getattr(task, "extra_facts", {})
    return how


def _data(task: Any, files: Sequence[Path] | None) -> dict[str, Any]:
    if files:
        return {"source": "files", "files": [path.name for path in files], "sha256": local_data.fingerprint(files)}
    text = "".join(json.dumps(dict(doc), sort_keys=True, default=str) + "\n" for doc in task.eval_docs)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"source": task.config.dataset_path, "config": task.config.dataset_name, "rows_sha256": digest}


def _result(
    name: str, row: Mapping[str, Any], found: Mapping[str, Any], how: Mapping[str, dict[str, Any]]
) -> TaskResult:
    scores = {}
    for key, value in row.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{filter_}")
        scores[metric if filter_ == "none" else key] = Score(
            float(value), float(error) if isinstance(error, int | float) else None
        )
    members = tuple(found.get("group_subtasks", {}).get(name, ()))
    rows = row.get("sample_len") or sum(found["results"][m].get("sample_len", 0) for m in _below(name, found))
    return TaskResult(scores, int(rows), members, how.get(name, {}) or _group(name, found, how))


def _below(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return the single tasks of a group."""
    members = found.get("group_subtasks", {}).get(name, ())
    return [leaf for m in members for leaf in (_below(m, found) or [m])]


def _group(name: str, found: Mapping[str, Any], how: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a group's shots and prompts: the sums of its members'."""
    own = [how[leaf] for leaf in _below(name, found) if leaf in how]
    total = Shots()
    for one in own:
        total.given.update({int(n): rows for n, rows in one["prompts"]["rows_by_shots"].items()})
        total.cut += one["prompts"]["cut"]
    return {"kind": "group", "shots": max(one["shots"] for one in own), "prompts": total.as_dict()} if own else {}
