"""The cohort engine: LoRA for all sampled clients in one pass through one frozen base.

It cuts a cohort into passes of as many clients as memory allows (cohort_pass.py is one pass), and evaluates and
generates with any number of adapters at once.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sheepfold.adapter import Adapter
from sheepfold.config import AdapterSettings, GenerationSettings, TrainSettings
from sheepfold.data.rows import TokenRows
from sheepfold.engines.batches import Row, batches
from sheepfold.engines.cohort_pass import Pass
from sheepfold.engines.common import Local, LocalEngine, Work
from sheepfold.engines.compiling import Compiled
from sheepfold.engines.injection import CohortModel, Selection
from sheepfold.engines.packing import may_pack
from sheepfold.engines.recomputing import can_recompute, recomputing
from sheepfold.engines.stack import stacked
from sheepfold.errors import ModelError
from sheepfold.local.rules import LocalRule
from sheepfold.metrics import Mean, Score
from sheepfold.state import BatchPlan


class CohortEngine(LocalEngine):
    """Trains and evaluates LoRA adapters on one frozen base, many at a time."""

    cuts_by_tokens = True

    def __init__(
        self,
        cohort: CohortModel,
        tokens: TokenRows,
        train_rows: Mapping[str, np.ndarray],
        train: TrainSettings,
        adapter: AdapterSettings,
        *,
        seed: int,
        plan: BatchPlan,
        **client: Any,
    ) -> None:
        """Make an engine over clients' training rows, {client: row numbers}; `client`: see LocalEngine.

        Raises ConfigError for the optimizer.
        """
        super().__init__(tokens, train_rows, train, elementwise=True, seed=seed, plan=plan, **client)
        self.cohort = cohort
        self.head = self.task.head(cohort.model)
        self.dropout = adapter.dropout
        first = next(cohort.model.parameters())
        self.device, self.dtype, self.half = first.device, first.dtype, first.dtype == torch.float16
        self.packs = self._packs(train.packing)
        self.compiled = Compiled(cohort.model) if train.compile else None
        self.can_recompute = can_recompute(cohort.model)

    def _packs(self, wanted: bool | None) -> bool:
        """Return whether training packs its rows. Raises ModelError where it is to, and the base's family cannot."""
        fast = self.device.type == "cuda" and self.dtype == torch.bfloat16  # where kernels take packed rows
        if wanted is False or (wanted is None and not fast):
            return False
        may = not self.task.labels and not self.cohort.whole and may_pack(self.cohort.model)
        if wanted and not may:
            raise ModelError(
                f"train.packing: rows of {type(self.cohort.model).__name__} cannot be packed: they would see each "
                "other, or be read whole; leave it null"
            )
        return may

    def train_pass(self, clients: Sequence[Local], rule: LocalRule | None) -> None:
        """Take these clients through their round, together."""
        compiled = self.compiled.on() if self.compiled else contextlib.nullcontext()
        with recomputing([self.cohort.model], self.plan.recompute), compiled:
            Pass(self, clients, rule).run()

    @torch.no_grad()
    def _scores(self, adapters: Sequence[Adapter], work: Work, rows: int) -> list[Score]:
        """Return what adapters[a] come to on the given rows, for each (a, row numbers) of the work; all together."""
        stack = stacked(adapters, self.device, grad=False, whole=self.cohort.whole)
        flat = [Row(int(n), group) for group, (_, numbers) in enumerate(work) for n in numbers]
        adapter_of = torch.tensor([a for a, _ in work], device=self.device)
        total = torch.zeros(len(work), dtype=torch.float64)
        count = torch.zeros(len(work), dtype=torch.float64)
        labels = len(self.task.labels)
        tables = np.zeros((len(work), labels, labels), dtype=np.int64)
        limits = {"max_rows": rows, "max_tokens": self.plan.micro_tokens}
        for cpu_batch in batches(self.tokens, flat, **limits, collate=self.task.collate):
            batch = cpu_batch.to(self.device)
            with self.cohort.using(Selection(stack, adapter_of[batch.group])):
                losses, given = self.head.judged(batch)
            if given is not None:
                np.add.at(tables, (cpu_batch.target_group, cpu_batch.target, given.cpu()), 1)
            total.index_add_(0, cpu_batch.target_group, losses.double().cpu())
            count.index_add_(0, cpu_batch.target_group, torch.ones(len(losses), dtype=torch.float64))
        means = [Mean(float(t), float(c)) for t, c in zip(total, count, strict=True)]
        return [Score(mean, table if labels else None) for mean, table in zip(means, tables, strict=True)]

    def generate(
        self, adapters: Sequence[Adapter], work: Work, settings: GenerationSettings, pad_id: int, eos: Sequence[int]
    ) -> list[list[list[int]]]:
        """Return the generated ids for each row of each (adapter, row numbers) of the work, all adapters together."""
        from sheepfold.evaluation.generation import generate

        stack = stacked(adapters, self.device, grad=False, whole=self.cohort.whole)
        flat = [(a, int(n)) for a, numbers in work for n in numbers]
        adapter_of = torch.tensor([a for a, _ in flat], device=self.device)

        def select(rows: Sequence[int]) -> None:
            self.cohort.selection = Selection(stack, adapter_of[torch.tensor(rows, device=self.device)])

        prompts = [self.tokens.prompt(n) for _, n in flat]
        with self.cohort.using(None):
            answers = generate(
                self.cohort.model, prompts, settings,
                seed=self.seed, pad_token_id=pad_id, eos_token_ids=eos, on_batch=select,
            )  # fmt: skip
        parts = iter(answers)
        return [[next(parts) for _ in numbers] for _, numbers in work]

    def close(self) -> None:
        """Put the base's own layers back."""
        self.cohort.close()
