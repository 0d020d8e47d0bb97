"""The server's half of fedkd: a teacher, a copy of the student, and the steps that they take on public rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sheepfold.adapter import Adapter
from sheepfold.assembly import Parts
from sheepfold.distillation import teacher as teachers
from sheepfold.distillation.losses import Joint, joint
from sheepfold.engines.carriers import carrier
from sheepfold.errors import ConfigError, TrainingError
from sheepfold.marks import evaluation_rows, judged, shared_rows
from sheepfold.models import load_base
from sheepfold.rng import derive, stream
from sheepfold.state import ServerState
from sheepfold.strategies.fedkd import Distillation

TEACHER, PROJECTION = "fedkd/teacher/", "fedkd/projection/"
"""Where the state's memory holds the teacher's weights, and the projections between heads."""
LOWER = "lower federation.strategy_args.lr, or student_lr"


class Distiller:
    """Trains teacher and student on the public rows after each fold; see strategies/fedkd.py.

    Between rounds everything it learned is in the state: the student in the adapter, the teacher in the memory.
    """

    def __init__(self, parts: Parts, settings: Distillation) -> None:
        """Load the teacher and a copy of the student's base, which go together (see teacher.py).

        Raises ModelError for a teacher that cannot be loaded, ConfigError where there are no public rows.
        """
        self.parts, self.settings, self.device = parts, settings, parts.base.device
        self.seed, self.judging = parts.experiment.seed, shared_rows(parts, evaluation_rows(parts))
        if not len(parts.data.public):
            raise ConfigError(
                "federation.strategy fedkd: the server has no row to distil on; set data.public.share, such as 0.2, or "
                "data.public.source (a partition file lists them under 'public')"
            )
        asked: dict[str, Any] = {"attention": teachers.attention(settings)} if settings.attention_weight else {}
        if parts.base.dtype == torch.float16:  # the joint loss has no loss scaling
            asked["dtype"] = "float32"
        model = parts.experiment.model.model_copy(update=asked)
        with _room("loads its models", "take a smaller teacher"):
            student = load_base(model, str(self.device), parts.base.tokenizer, task=parts.task)
            teacher = teachers.load(settings, parts.experiment, parts.task, student)
        sites = list(parts.initial.pairs)
        self.student = carrier(student.model, sites, parts.experiment.adapter, self.seed, task=parts.task)
        self.teacher, self.fingerprint = teacher.model, teacher.fingerprint
        self.teacher.requires_grad_(not settings.frozen)
        self.projections: list[nn.Module | None] = []
        if settings.attention_weight:
            self.projections = _projections(student.model, self.teacher, self.device)
        self.student.write(parts.initial)
        self._start = {n: t.detach().cpu().clone() for n, t in self._trained().items()}

    def __call__(self, state: ServerState) -> tuple[ServerState, Mapping[str, float]]:
        """Return the state with the student's adapter and the teacher as distillation left them, and mean losses."""
        round = state.round
        self.student.write(state.adapter)
        self._recall(state)
        with _room(f"distils in round {round}", "lower federation.strategy_args.batch_rows, or attention_weight to 0"):
            figures = self._distil(round)
        kept = {name: tensor.detach().cpu().clone() for name, tensor in self._trained().items()}
        adapter = self.student.read()
        if not adapter.is_finite() or not Adapter(extra=kept).is_finite():
            raise TrainingError(f"round {round}: the distillation's last step overflowed; {LOWER}")
        return replace(state, adapter=adapter, memory={**state.memory, **kept}), figures

    def measured(self, state: ServerState) -> Mapping[str, float]:
        """Return the teacher's loss and its task's measures on everybody's held-out rows."""
        self._recall(state)
        if not len(self.judging):
            return {}
        with _room("judges its teacher", "lower evaluation.batch_rows"):
            return judged(self.parts, self.teacher, self.judging)

    def free(self) -> None:
        """Give up the memory of teacher and student."""
        for model in (self.teacher, self.student.model):
            model.to("meta")

    def _distil(self, round: int) -> dict[str, float]:
        """Train the teacher alone, then both together; return mean losses."""
        settings = self.settings
        figures: dict[str, float] = {}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive(self.seed, "fedkd", round))  # for the adapter's own dropout
            if settings.teacher_epochs:
                groups = [(self._trained_teacher(), settings.lr)]
                alone = self._train(groups, settings.teacher_epochs, round, "alone", self._alone)
                figures["teacher_alone"] = alone["total"]
            both = [(list(self.student.factors().values()), settings.student_lr)]
            both += [(theirs, settings.lr) for theirs in [list(self._trained().values())] if theirs]
            self.student.model.train()
            figures |= self._train(both, settings.epochs, round, "together", self._together)
            self.student.model.eval()
        return figures

    def _train(
        self,
        groups: Sequence[tuple[Sequence[Tensor], float]],
        epochs: int,
        round: int,
        phase: str,
        loss: Callable[[np.ndarray], Mapping[str, Tensor]],
    ) -> dict[str, float]:
        """Take AdamW steps on `total` of the losses, their rate falling to zero; return each loss's mean over steps."""
        settings, rows = self.settings, self.parts.data.public
        for parameters, _ in groups:
            for p in parameters:
                p.requires_grad_(True)
                p.grad = None
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": lr} for parameters, lr in groups], weight_decay=settings.weight_decay
        )
        steps = epochs * -(-len(rows) // settings.batch_rows)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        sums: dict[str, Tensor] = {}
        for step, batch in enumerate(_batches(rows, settings.batch_rows, epochs, (self.seed, round, phase))):
            losses = loss(batch)
            if not torch.isfinite(losses["total"]):
                raise TrainingError(
                    f"round {round}: the distillation's loss is {losses['total'].item()} at step {step + 1} of {steps} "
                    f"({phase}); {LOWER}"
                )
            torch.autograd.backward(losses["total"])
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.detach().cpu().double()
        return {name: float(total) / steps for name, total in sums.items()}

    def _alone(self, rows: np.ndarray) -> dict[str, Tensor]:
        task, tokens = self.parts.task, self.parts.data.tokens
        return {"total": task.predict(self.teacher, tokens, rows, self.device).losses().mean()}

    def _together(self, rows: np.ndarray) -> dict[str, Tensor]:
        made = self.joint(rows)
        return {name: getattr(made, name) for name in Joint.__slots__}

    def joint(self, rows: np.ndarray) -> Joint:
        """Return the joint loss of teacher and student, as they are now, on rows by number."""
        settings, parts = self.settings, self.parts
        asked = {"attentions": bool(settings.attention_weight)}
        of_student = parts.task.predict(self.student.model, parts.data.tokens, rows, self.device, **asked)
        of_teacher = parts.task.predict(self.teacher, parts.data.tokens, rows, self.device, **asked)
        return joint(
            of_student,
            of_teacher,
            temperature=settings.temperature,
            kl_weight=settings.kl_weight,
            attention_weight=settings.attention_weight or 0.0,
            kind=settings.kl,
            projections=self.projections,
        )

    def _trained_teacher(self) -> list[Tensor]:
        return [p for p in self.teacher.parameters() if p.requires_grad]

    def _trained(self) -> dict[str, Tensor]:
        """Return what the server trains beside the student, by its name in the state's memory."""
        own: dict[str, Tensor] = {TEACHER + name: p for name, p in self.teacher.named_parameters() if p.requires_grad}
        for i, projection in enumerate(self.projections):
            own |= {f"{PROJECTION}{i}/{n}": p for n, p in projection.named_parameters()} if projection else {}
        return own

    def _recall(self, state: ServerState) -> None:
        """Take up the teacher and the projections as a state has them: before round 1, as they were loaded."""
        with torch.no_grad():
            for name, p in self._trained().items():
                p.copy_(state.memory.get(name, self._start[name]))


def _projections(student: nn.Module, teacher: nn.Module, device: torch.device) -> list[nn.Module | None]:
    """Return what takes the student's heads to the teacher's, for each pair of matched layers; None where none has to.

    They begin as means over the student's heads.
    """
    (layers, heads), (_, theirs) = teachers.shape(student), teachers.shape(teacher)
    if heads == theirs:
        return [None] * layers
    wide = torch.promote_types(next(student.parameters()).dtype, torch.float32)
    made: list[nn.Module | None] = []
    for _ in range(layers):
        projection = nn.Linear(heads, theirs, bias=False, device=device, dtype=wide)
        nn.init.constant_(projection.weight, 1 / heads)
        made.append(projection)
    return made


def _batches(rows: np.ndarray, size: int, epochs: int, address: tuple[int, int, str]) -> Iterator[np.ndarray]:
    """Yield the rows in batches, in another order in each pass."""
    seed, round, phase = address
    for epoch in range(epochs):
        order = stream(seed, "fedkd", round, phase, epoch).permutation(rows)
        for first in range(0, len(order), size):
            yield order[first : first + size]


@contextmanager
def _room(doing: str, advice: str) -> Iterator[None]:
    """Say what the server was doing, and what helps, where memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise TrainingError(f"out of memory while the server {doing} ({first}); {advice}") from None
