"""Centralised fine-tuning, `sheepfold finetune`: one model, a share of the rows in one place, no rounds.

    experiment ── data, task, base as in a run ── rows of --on ── one client, `everyone` ── epochs ── model folder
                                                                       one optimizer, one decay for all of them

It makes fedkd's teacher (on the public rows) and the centralised baseline (on the clients' rows). The steps are the
peft_model engine's, as long as all the epochs are; what an experiment says of clients, rounds and folds is left aside.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sheepfold.adapter import Adapter
from sheepfold.assembly import Parts, assemble
from sheepfold.config import Experiment
from sheepfold.engines import spreading
from sheepfold.engines.common import Local
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.errors import ConfigError, TrainingError, suggest
from sheepfold.finetuning_facts import facts_of, write
from sheepfold.folders import fresh_folder
from sheepfold.joining import EVERYONE
from sheepfold.journal import plain
from sheepfold.local.steps import steps_per_epoch
from sheepfold.marks import evaluation_rows, judged, shared_rows
from sheepfold.memory import is_out_of_memory
from sheepfold.messages import Assignment
from sheepfold.metrics import Mean

ON = ("public", "clients", "all")
METHODS = ("full", "lora")
SCHEDULES = ("linear", "constant", "cosine")

Listener = Callable[[str, Mapping[str, Any]], None]
"""Is told what happens: (event, facts). Events: start, step, epoch."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the experiment does not say."""

    on: str | None = None
    """public: the rows of data.public; clients: all clients' training rows; all: both; None: public, else clients"""
    epochs: int = 1
    """Passes over the rows"""
    method: str = "full"
    """full: all weights; lora: an adapter, as adapter.* describes it"""
    schedule: str = "linear"
    """Learning rate over the whole of training, from train.lr to zero (linear, cosine) or constant"""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that there are not."""
        for option, value, known in (
            ("--on", self.on, ON),
            ("--method", self.method, METHODS),
            ("--schedule", self.schedule, SCHEDULES),
        ):
            if value is not None and value not in known:
                raise ConfigError(f"{option} {value!r}: {suggest(value, known)}")
        if self.epochs < 1:
            raise ConfigError(f"--epochs {self.epochs}: expected at least 1")


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What was made."""

    folder: Path
    facts: Mapping[str, Any]
    """What finetune.json holds"""


def silent(event: str, facts: Mapping[str, Any]) -> None:
    """Tell nobody."""


def finetune(
    experiment: Experiment,
    out: str | os.PathLike[str],
    arguments: Arguments = Arguments(),
    listener: Listener = silent,
) -> Finetuned:
    """Train the experiment's base on the rows asked for, and write it as a folder that plain transformers loads.

    The folder is there when all is done, or not at all. Raises ConfigError for arguments that do not fit the
    experiment, CheckpointError for a folder that is there and not empty, TrainingError where no step could be taken,
    and what a run raises for data and bases.
    """
    asked = _centralised(experiment, arguments)
    with fresh_folder(out) as fresh:
        try:
            parts = assemble(asked)
            taken = _rows(parts, arguments.on)
            facts, adapter = _train(parts, taken, listener)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise TrainingError(
                f"out of memory ({said}); set train.micro_rows lower, train.gradient_checkpointing, or --method lora"
            ) from None
        given = {**asdict(arguments), "on": "all" if len(taken) > 1 else next(iter(taken))}
        facts = {"arguments": given, **facts, "experiment": experiment.model_dump(mode="json")}
        write(parts, adapter, fresh, facts, Path(out).resolve().name)
    return Finetuned(Path(out), facts)


def _centralised(experiment: Experiment, arguments: Arguments) -> Experiment:
    """Return the experiment without rounds: all its epochs are one client's one round. Raises ConfigError."""
    adapter, model, data = experiment.adapter, experiment.model, experiment.data
    spreading.check_alone(experiment, "finetune")
    if arguments.on in ("public", "all") and not data.public.wanted and not data.partition.by.endswith(".json"):
        raise ConfigError(
            f"--on {arguments.on}: the experiment has no public rows; give --share, such as 0.2, or set "
            "data.public.share or data.public.source, or take --on clients"
        )
    if arguments.method == "full":
        if adapter.start:
            raise ConfigError(
                f"adapter.start {adapter.start} has no effect with --method full; merge it into the base first "
                "(sheepfold export --to merged), or take --method lora"
            )
        if model.bits:
            raise ConfigError(
                f"model.bits {model.bits} with --method full: quantised weights stay as they are; set model.bits=null, "
                "or take --method lora"
            )
        if model.dtype in ("bfloat16", "float16"):
            raise ConfigError(
                f"model.dtype {model.dtype} with --method full: small steps vanish in half precision; set model.dtype "
                "to float32, or take --method lora"
            )
        model = model.model_copy(update={"dtype": "float32"} if model.dtype == "auto" else {})
    elif adapter.ranks is not None:
        raise ConfigError(
            "adapter.ranks says ranks of clients, and here is none; set adapter.ranks=null adapter.rank=8"
        )
    train: dict[str, Any] = {"engine": "peft_model", "steps": None, "epochs": arguments.epochs}
    train |= {"schedule": arguments.schedule, "clients_per_pass": None, "local_rule": None, "local_rule_args": {}}
    usual = Experiment()
    return experiment.model_copy(
        update={
            "model": model,
            "adapter": adapter.model_copy(update={"method": arguments.method, "options": {}, "ranks": None}),
            "train": experiment.train.model_copy(update=train),
            **{name: getattr(usual, name) for name in ("federation", "personal", "stop", "offsite")},
        }
    )


def _rows(parts: Parts, on: str | None) -> dict[str, np.ndarray]:
    """Return the rows to train on by where they come from. Raises ConfigError where there are none."""
    public = parts.data.public
    on = on or ("public" if len(public) else "clients")
    if on != "clients" and not len(public):
        raise ConfigError(f"--on {on}: none of the rows is public; raise data.public.share, or take --on clients")
    found = {"public": public, "clients": np.concatenate([c.train for c in parts.data.clients.values()])}
    return {name: rows for name, rows in found.items() if on in (name, "all")}


def _train(parts: Parts, taken: Mapping[str, np.ndarray], listener: Listener) -> tuple[dict[str, Any], Adapter]:
    """Go through all epochs; return what there is to say of them, and what was learned."""
    engine, settings, began = parts.engine, parts.experiment.train, time.perf_counter()
    assert isinstance(engine, PeftModelEngine)
    rows = np.concatenate(list(taken.values()))
    engine.train_rows = {EVERYONE: rows}
    client = engine.local(Assignment(EVERYONE, 0, parts.initial, settings.lr))
    engine.carrier.write(parts.initial)
    watch = _Watch(parts, engine, client, steps_per_epoch(len(rows), settings.batch_rows), listener)
    facts = facts_of(parts, taken, client.steps, len(watch.rows))
    listener("start", facts)
    watch.measure({"epoch": 0})
    engine.on_step = watch.step
    engine.train_pass([client], None)
    if why := client.absent():
        raise TrainingError(f"finetune: {why.reason}")
    if watch.epochs[-1]["held_out"].get("loss", 0.0) is None:
        raise TrainingError("finetune: the held-out loss is no longer finite; lower train.lr")
    facts |= {"epochs": watch.epochs, "hash": client.adapter.hash(), "seconds": time.perf_counter() - began}
    return facts, client.adapter


class _Watch:
    """Measures the model after every epoch, from inside its training: the optimizer lives through all of them."""

    def __init__(self, parts: Parts, engine: PeftModelEngine, client: Local, steps: int, listener: Listener) -> None:
        """steps: of one epoch."""
        self.parts, self.engine, self.client, self.listener = parts, engine, client, listener
        self.rows = shared_rows(parts, evaluation_rows(parts))
        self.epochs: list[dict[str, Any]] = []
        self._steps, self._taken, self._good, self._before = steps, 0, 0, Mean()
        self._began = time.perf_counter()

    def step(self, steps: int) -> None:
        """Count a step; at an epoch's end, measure."""
        self._taken += steps
        self.listener("step", {"steps": self._taken})
        if self._taken % self._steps:
            return
        loss, good, before = self.client.loss, self.client.good_steps, self._before
        line: dict[str, Any] = {"epoch": self._taken // self._steps}
        line["train_loss"] = Mean(loss.total - before.total, loss.count - before.count).value
        if skipped := self._steps - (good - self._good):
            line |= {"skipped_steps": skipped, "why_skipped": self.client.why_skipped}
        self._before, self._good = loss, good
        self.measure(line)

    def measure(self, line: dict[str, Any]) -> None:
        """Add the held-out figures to an epoch's line, and tell it."""
        model, began = self.engine.carrier.model, time.perf_counter()
        held_out: dict[str, float] = {}
        if len(self.rows):
            model.eval()
            held_out = judged(self.parts, model, self.rows)
            model.train()
        line["held_out"] = held_out
        now = time.perf_counter()
        line["seconds"] = {"training": began - self._began, "evaluation": now - began}
        self._began = now
        self.epochs.append(plain(line))
        self.listener("epoch", line)
