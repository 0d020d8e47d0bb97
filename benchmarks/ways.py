"""Ways to train the same clients on the same rows: each is set up once, and then trains all of them when called.

    trainer    a transformers.Trainer for each client on a shared PEFT model (as Shepherd, FlexLoRA, OpenFedLLM do)
    autocast   the same with bf16=True, which a GPU may be faster or slower with
    sft        TRL's SFTTrainer for each client on a shared PEFT model, where trl is installed
    loop       a bare loop for each client on a shared PEFT model (as FederatedScope-LLM does)
    reference  our peft_model engine
    alone      our cohort engine, one client a pass
    cohort     our cohort engine, as many clients a pass as it plans
    compiled   the same with train.compile: a GPU may be faster with it; the first pass, which warms up, compiles

All see the same rows in the same order, the same batches in the same micro-batches, AdamW at a constant rate, clipping
at 1, and a loss that is the token mean of a step. No way evaluates, saves or logs; caches of keys and values are off;
every way has the same threads. Trainers get what costs them least here: the data as tensors, no workers, no pinning
where there is no GPU.
"""

import contextlib
import importlib.util
import io
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import NotHere, Workload
from sheepfold.adapter import Adapter
from sheepfold.data.rows import IGNORED
from sheepfold.engines.carriers import LoraCarrier
from sheepfold.local.steps import step_rows, steps_in_round
from sheepfold.messages import Update
from sheepfold.models import Base

STAGES = ("data", "forward", "backward", "step")


@dataclass(frozen=True, slots=True)
class Trained:
    """What one call of a way came to."""

    adapters: Mapping[str, Adapter]
    """By client"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By stage, as the journal counts them; empty where a way has no stages"""


Train = Callable[[], Trained]


def ours(work: Workload, **train: Any) -> tuple[Train, Base]:
    """Return training with an engine of ours; train: options of that section."""
    engine, base = work.engine(**train)
    assignments = work.assignments()

    def run() -> Trained:
        done, seconds = {}, dict.fromkeys(STAGES, 0.0)
        for answer in engine.train(assignments):
            assert isinstance(answer, Update), answer
            done[answer.client] = answer.adapter
            for stage, s in answer.measurements.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + s
        return Trained(done, seconds)

    return run, base


@dataclass(frozen=True, slots=True)
class Shared:
    """One PEFT model that the clients of a plain way take in turns, and their rows."""

    work: Workload
    base: Base
    carrier: LoraCarrier

    def steps(self, client: str) -> Iterator[np.ndarray]:
        """Yield the row numbers of each of a client's steps."""
        settings, rows = self.work.experiment.train, self.work.data.clients[client].train
        for step in range(steps_in_round(settings, len(rows))):
            yield step_rows(self.work.experiment.seed, client, rows, settings.batch_rows, step)

    def each(self, train: Callable[[str], None]) -> Trained:
        """Train every client from the same start."""
        start, done = self.work.start(), {}
        for client in self.work.data.clients:
            self.carrier.write(start)
            train(client)
            done[client] = self.carrier.read()
        return Trained(done)


def shared_model(work: Workload) -> Shared:
    """Return a PEFT model of the workload's base."""
    base = work.load()
    base.model.config.use_cache = False  # type: ignore[union-attr]
    start = work.start()
    carrier = LoraCarrier(base.model, list(start.pairs), 0.0)
    carrier.write(start)
    return Shared(work, base, carrier)


def loop(work: Workload) -> tuple[Train, Base]:
    """Return the bare loop: forward, backward, clip, step."""
    shared = shared_model(work)
    settings, tokens = work.experiment.train, work.data.tokens
    model, device = shared.carrier.model, shared.base.device
    params = list(shared.carrier.factors().values())
    micro = settings.micro_rows or settings.batch_rows

    def client(name: str) -> None:
        model.train()
        optimizer = torch.optim.AdamW(params, lr=settings.lr, weight_decay=0.0, fused=True)
        for rows in shared.steps(name):
            pairs = [tokens.row(int(n)) for n in rows]
            targets = sum(int((labels[1:] != IGNORED).sum()) for _, labels in pairs)
            for first in range(0, len(pairs), micro):
                batch = {k: t.to(device) for k, t in padded(pairs[first : first + micro]).items()}
                model(**batch, num_items_in_batch=targets).loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return lambda: shared.each(client), shared.base


def trainer(work: Workload, **own: Any) -> tuple[Train, Base]:
    """Return a transformers.Trainer for each client; own: further arguments."""
    import transformers

    return _trainers(work, transformers.Trainer, transformers.TrainingArguments, {"data_collator": _collate}, own)


def sft(work: Workload) -> tuple[Train, Base]:
    """Return TRL's SFTTrainer for each client, with its own collator; raises NotHere where trl is not installed."""
    if importlib.util.find_spec("trl") is None:
        raise NotHere("trl not installed")
    from trl import SFTConfig, SFTTrainer

    from sheepfold.models import load_tokenizer

    tokenizer = load_tokenizer(work.experiment.model)
    own = {"gradient_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return _trainers(work, SFTTrainer, SFTConfig, {"processing_class": tokenizer}, own)


def _trainers(
    work: Workload, kind: Any, arguments: Any, given: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> tuple[Train, Base]:
    """Return a trainer of this kind for each client; given: what it is made with, own: further arguments."""
    import transformers
    from datasets import Dataset, disable_progress_bars
    from torch.utils.data import SequentialSampler

    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    shared = shared_model(work)
    settings, tokens = work.experiment.train, work.data.tokens
    cuda = shared.base.device.type == "cuda"
    micro = min(settings.micro_rows or settings.batch_rows, settings.batch_rows)
    # the base has its dtype already, and adapters stay in float32 in every way
    options = {
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": math.ceil(settings.batch_rows / micro),
        "num_train_epochs": 1, "learning_rate": settings.lr, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "save_strategy": "no", "eval_strategy": "no",
        "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "remove_unused_columns": False,
        "dataloader_pin_memory": cuda, "use_cpu": not cuda, "bf16": False, "fp16": False, **(own or {}),
    }  # fmt: skip

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    def client(name: str) -> None:
        pairs = [tokens.row(int(n)) for rows in shared.steps(name) for n in rows]
        rows = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
        if kind is not transformers.Trainer:  # it reads columns
            rows = Dataset.from_list([{k: t.tolist() for k, t in row.items()} for row in rows])
        made = arguments(output_dir=output, **options)
        one = InOrder(model=shared.carrier.model, args=made, train_dataset=rows, **given)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # a summary for each client
            warnings.simplefilter("ignore")
            one.train()

    output = tempfile.mkdtemp(dir=work.folder)
    return lambda: shared.each(client), shared.base


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return padded([(row["input_ids"], row["labels"]) for row in rows])


def padded(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return rows as a right-padded batch with its mask."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row for row, _ in pairs], batch_first=True)
    labels = pad([labels for _, labels in pairs], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(row) for row, _ in pairs])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


WAYS: dict[str, Callable[[Workload], tuple[Train, Base]]] = {
    "trainer": trainer,
    "autocast": lambda work: trainer(work, bf16=True),
    "sft": sft,
    "loop": loop,
    "reference": lambda work: ours(work, engine="peft_model"),
    "alone": lambda work: ours(work, clients_per_pass=1),
    "cohort": ours,
    "compiled": lambda work: ours(work, compile=True),
}


Tensors = Mapping[str, Tensor]


def gap(left: Mapping[str, Tensors], right: Mapping[str, Tensors], start: Tensors) -> float:
    """Return the norm of the difference of two ways' adapters as a share of what training changed, over all clients.

    left, right: {client: {flat name: tensor}}, start: where everybody started.
    Single numbers say less: AdamW's first steps go by a gradient's sign, so one that is zero up to rounding may go
    either way by a whole learning rate. In float64 the ways agree to 1e-14 (tests/engines/test_cohort.py).
    """
    apart = moved = 0.0
    for client, one in left.items():
        for name, a in one.items():
            apart += float((a - right[client][name]).double().square().sum())
            moved += float((a - start[name]).double().square().sum())
    return (apart / moved) ** 0.5
