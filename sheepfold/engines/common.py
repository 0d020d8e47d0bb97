"""What both engines have in common: how one client trains, what it keeps, and what it answers."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from sheepfold import memory
from sheepfold.adapter import Adapter
from sheepfold.config import TrainSettings
from sheepfold.data.rows import TokenRows
from sheepfold.halving import Halvings, smaller
from sheepfold.local import optimizers
from sheepfold.local.rules import LocalRule, Trained, each_tensor, finished, proximal
from sheepfold.local.steps import steps_in_round
from sheepfold.local.store import ClientStore
from sheepfold.messages import Absence, Assignment, Measurements, Update
from sheepfold.metrics import Mean, Score
from sheepfold.state import BatchPlan
from sheepfold.tasks.base import Task
from sheepfold.tasks.causal_lm import CAUSAL_LM

FIRST_LOSS_SCALE = 2.0**12
"""Where float16 loss scaling starts in each round; it halves until gradients are finite."""

OWN, DITTO = "own/", "ditto/"
"""How a client's store names its private tensors, and its own adapter under Ditto."""

T = TypeVar("T")
Work = Sequence[tuple[int, np.ndarray]]
"""What to evaluate: (number of the adapter, row numbers)."""


class LocalEngine:
    """What both engines are made of: the clients' rows, and how a client goes through a round."""

    cuts_by_tokens = False
    """Whether a forward pass is bounded by plan.micro_tokens, over all clients; else by plan.micro_rows of one"""
    can_recompute = False
    """Whether the base's blocks can run again in the backward pass, with the engine's adapters in them"""

    def __init__(
        self,
        tokens: TokenRows,
        train_rows: Mapping[str, np.ndarray],
        train: TrainSettings,
        *,
        elementwise: bool,
        seed: int,
        plan: BatchPlan,
        rule: LocalRule | None = None,
        private: Callable[[str], bool] | None = None,
        ditto: float | None = None,
        store: ClientStore | None = None,
        task: Task = CAUSAL_LM,
    ) -> None:
        """train_rows: {client: row numbers}. Raises ConfigError for the optimizer.

        private says which tensors, by flat name, stay with their client; ditto is Ditto's lambda (None: no own
        adapters); store holds what clients keep; task says what a row's targets are.
        """
        self.tokens = tokens
        self.targets = tokens.target_tokens()
        self.train_rows = train_rows
        self.settings = train
        self.seed = seed
        self.halvings = Halvings(plan)
        self.token_bytes = 0.0  # of a forward pass's activations, about; 0: not known
        self.rule = rule
        self.private = private or (lambda name: False)
        self.ditto = ditto
        self.store = store or ClientStore()
        self.task = task
        self.on_step: Callable[[int], None] = lambda steps: None  # told how many client steps were taken
        self.build = optimizers.build(train, elementwise=elementwise)

    @property
    def plan(self) -> BatchPlan:
        """How work is cut; it gets smaller where memory runs out."""
        return self.halvings.plan

    @plan.setter
    def plan(self, plan: BatchPlan) -> None:
        self.halvings.plan = plan

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        """Yield every client's update, or why there is none, in the order of the assignments.

        Where memory runs out in a pass, its clients begin anew, fewer together or in smaller forward passes.
        """
        first = 0
        while first < len(assignments):
            clients = self._in_memory(partial(self._together, assignments[first:]), self._smaller(assignments[first]))
            first += len(clients)
            for client in clients:
                yield self._answer(client)

    def _together(self, assignments: Sequence[Assignment]) -> list["Local"]:
        """Return the clients of the next pass, trained."""
        clients = [self.local(a) for a in assignments[: self.plan.clients_per_pass]]
        with self._taking_back():
            self._pass(clients, self.rule)
            if self.ditto:
                self._train_own(clients)
        return clients

    @contextmanager
    def _taking_back(self) -> Iterator[None]:
        """Take back the steps that were told of, where work ends half-way."""
        tell, told = self.on_step, 0

        def count(steps: int) -> None:
            nonlocal told
            told += steps
            tell(steps)

        self.on_step = count
        try:
            yield
        except BaseException:
            tell(-told)
            raise
        finally:
            self.on_step = tell

    def _in_memory(self, work: Callable[[], T], less: Callable[[], tuple[BatchPlan, str] | None]) -> T:
        """Return what work comes to; where memory runs out, it is done anew with the plan that `less` gives."""
        self.halvings.next_unit()
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error) or (found := less()) is None:
                    raise
            memory.free()  # here, where nothing refers to the error and its frames any more
            self.halvings.halve(*found)

    def _smaller(self, first: Assignment) -> Callable[[], tuple[BatchPlan, str] | None]:
        """Return what to halve in training: what takes more, the clients' numbers or the activations."""
        numbers = first.adapter.numbers_in_training * memory.BYTES_PER_NUMBER

        def less() -> tuple[BatchPlan, str] | None:
            heavy = numbers * self.plan.clients_per_pass >= self.token_bytes * self.plan.micro_tokens
            longest = self._longest() if self.cuts_by_tokens else None
            recompute = self.can_recompute and self.settings.gradient_checkpointing is None
            return smaller(self.plan, clients=heavy, tokens=longest, recompute=recompute)

        return less

    def _longest(self) -> int:
        return int(self.tokens.lengths().max(initial=1))

    @property
    def bare(self) -> Adapter | None:
        """What stands for the bare base; None where a fresh adapter changes nothing, as LoRA's."""
        return None

    def train_pass(self, clients: Sequence["Local"], rule: LocalRule | None) -> None:
        """Take these clients, each with steps and most steps first, through their round; fill in what they learned."""
        raise NotImplementedError

    def scores(self, adapters: Sequence[Adapter], work: Work, rows: int) -> list[Score]:
        """Return what adapters[a] come to on the given rows, for each (a, row numbers) of the work.

        The loss is in nats per target, weighted by targets; `rows` go through the base at a time, or fewer where memory
        ran out.
        """

        def at_once() -> int:
            return min(rows, self.plan.judged_rows or rows)

        def less() -> tuple[BatchPlan, str] | None:
            now = at_once()
            words = f"out of memory with {now} rows judged at a time, going on with {now // 2}"
            return (replace(self.plan, judged_rows=now // 2), words) if now > 1 else None

        return self._in_memory(lambda: self._scores(adapters, work, at_once()), less)

    def _scores(self, adapters: Sequence[Adapter], work: Work, rows: int) -> list[Score]:
        """Return what `scores` does, in one go."""
        raise NotImplementedError

    def held_out(self, adapters: Sequence[Adapter], work: Work, rows: int) -> list[Mean]:
        """Return the losses of `scores` alone."""
        return [score.loss for score in self.scores(adapters, work, rows)]

    def plain(self, train_rows: Mapping[str, np.ndarray] | None = None, train: TrainSettings | None = None) -> Self:
        """Return this engine without a method's client half, over other rows or settings where given."""
        other = copy.copy(self)
        other.rule, other.ditto, other.store = None, None, ClientStore()
        other.private = lambda name: False
        other.train_rows = self.train_rows if train_rows is None else train_rows
        other.settings = train or self.settings
        return other

    def local(self, assignment: Assignment) -> "Local":
        """Return a client ready to train, with what it kept; one without rows has no steps."""
        rows = np.asarray(self.train_rows[assignment.client])
        steps = steps_in_round(self.settings, len(rows)) if len(rows) else 0
        own = self.store.recall(assignment.client, assignment.last)
        start = with_own(assignment.adapter, own, OWN)
        return Local(assignment, start, start, own, rows, int(self.targets[rows].sum()), steps)

    @property
    def near(self) -> LocalRule:
        """The rule of clients' own adapters under Ditto, which holds them near the one they were handed."""
        return LocalRule(penalty=each_tensor(partial(proximal, mu=float(self.ditto or 0))))

    def _pass(self, clients: Sequence["Local"], rule: LocalRule | None) -> None:
        ready = sorted((c for c in clients if c.steps), key=lambda c: -c.steps)
        if ready:
            self.train_pass(ready, rule)

    def _train_own(self, clients: Sequence["Local"]) -> None:
        """Train each client's own adapter, held near the global one (Ditto, arXiv:2012.04221, Algorithm 1)."""
        twins = [c.twin(with_own(c.assignment.adapter, c.own, DITTO)) for c in clients if c.good_steps]
        self._pass(twins, self.near)
        for client, twin in zip((c for c in clients if c.good_steps), twins, strict=True):
            if twin.good_steps and twin.adapter.is_finite():
                client.own_adapter = twin.adapter
            client.seconds = {k: s + twin.seconds.get(k, 0.0) for k, s in client.seconds.items()}

    def _answer(self, client: "Local") -> Update | Absence:
        """Return what goes to the server, and put what stays into the store."""
        a = client.assignment
        if why := client.absent():
            return why
        done = finished(self.rule, a, Trained(client.adapter, client.own, client.mean_gradient))
        tensors = done.adapter.tensors()
        private = {name for name in tensors if self.private(name)}
        keep = dict(done.own) | {OWN + name: tensors[name] for name in private}
        if client.own_adapter is not None:
            keep |= {DITTO + name: t for name, t in client.own_adapter.tensors().items()}
        if keep:
            self.store.put(a.client, a.round + 1, keep)
        unsent = frozenset(tensors) - a.trained(self.private).keys()
        sent = _as_handed_out(done.adapter, a.adapter, private)
        return Update(a.client, sent, client.measured(), done.send, unsent)


@dataclass(slots=True)
class Local:
    """One client while it trains: its assignment, its rows, and what it has done so far."""

    assignment: Assignment
    start: Adapter
    """Where it starts: what it was handed, with its own tensors in it."""
    anchor: Adapter
    """What its local rule's penalty looks back at: its start, but for Ditto's own adapters the one it was handed."""
    own: Mapping[str, Tensor]
    """What it kept from earlier rounds."""
    rows: np.ndarray
    target_tokens: int
    """Target tokens of all its rows."""
    steps: int
    """Steps this round."""
    loss: Mean = field(default_factory=Mean)
    good_steps: int = 0
    processed_rows: int = 0
    processed_tokens: int = 0
    why_skipped: str = ""
    adapter: Adapter = field(default_factory=Adapter)
    """What it learned."""
    mean_gradient: Mapping[str, Tensor] = field(default_factory=dict)
    send: Mapping[str, Tensor] = field(default_factory=dict)
    """What goes to the server instead of the adapter, where an engine has that (zeroth_order)."""
    own_adapter: Adapter | None = None
    """Ditto: its own adapter."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Its share of its pass, by stage."""

    def twin(self, start: Adapter) -> "Local":
        """Return the same client, about to train its own adapter on the same rows, near the one it was handed."""
        a = self.assignment
        return Local(a, start, a.adapter, self.own, self.rows, self.target_tokens, self.steps)

    def count(self, loss: float, targets: int, lengths: Sequence[int], *, good: bool) -> None:
        """Count one step: its loss (nats per target token), its target tokens, the lengths of its rows."""
        if not good:
            self.why_skipped = explain(loss, targets)
            return
        self.good_steps += 1
        self.loss += Mean(loss * targets, targets)
        self.processed_rows += len(lengths)
        self.processed_tokens += sum(lengths)

    def absent(self) -> Absence | None:
        """Return why this client has nothing to send, if that is so."""
        client = self.assignment.client
        if not self.steps:
            return Absence(client, "it holds no training rows")
        if not self.good_steps:
            return Absence(client, f"no good step in {self.steps}: {self.why_skipped}", self.steps)
        if not self.adapter.is_finite():
            return Absence(client, "its adapter is no longer finite (overflow: lower the learning rate)", self.steps)
        return None

    def measured(self) -> Measurements:
        """Return what the round amounted to."""
        return Measurements(
            loss=self.loss,
            rows=len(self.rows),
            target_tokens=self.target_tokens,
            processed_rows=self.processed_rows,
            processed_tokens=self.processed_tokens,
            steps=self.steps,
            skipped_steps=self.steps - self.good_steps,
            why_skipped=self.why_skipped,
            seconds=self.seconds,
        )


@torch.no_grad()
def score_of(task: Task, model: Any, tokens: TokenRows, numbers: np.ndarray, rows: int, device: torch.device) -> Score:
    """Return what a plain model comes to on rows by number, `rows` at a time: see LocalEngine.scores."""
    labels = len(task.labels)
    loss, table = Mean(), np.zeros((labels, labels), dtype=np.int64)
    numbers = np.asarray(numbers)[np.argsort(tokens.lengths()[numbers], kind="stable")]  # little padding
    for first in range(0, len(numbers), rows):
        predicted = task.predict(model, tokens, numbers[first : first + rows], device)
        losses = predicted.losses()
        loss += Mean(float(losses.double().sum()), float(len(losses)))
        if labels:
            given = predicted.logits.argmax(1)
            np.add.at(table, (predicted.target.cpu().numpy(), given.cpu().numpy()), 1)
    return Score(loss, table if labels else None)


def with_own(adapter: Adapter, own: Mapping[str, Tensor], prefix: str) -> Adapter:
    """Return an adapter with those of its tensors replaced that a client has of its own, under this prefix."""
    had = adapter.tensors()
    names = {name: own[prefix + name] for name in had if prefix + name in own}
    return adapter.holding({name: t for name, t in names.items() if t.shape == had[name].shape}) if names else adapter


def _as_handed_out(trained: Adapter, handed: Adapter, private: set[str]) -> Adapter:
    """Return a trained adapter with its private tensors as the server knows them."""
    pairs = {p: handed.pairs[p] if {f"{p}/A", f"{p}/B"} <= private else pair for p, pair in trained.pairs.items()}
    whole = Adapter(pairs, trained.extra, trained.sparse)
    had = handed.tensors()
    return whole.holding({name: had[name] for name in private}) if private else trained


def explain(loss: float, targets: int) -> str:
    """Return why a step was not taken: what its loss was, and what that usually means."""
    if targets == 0:
        return "no label in any row of the step (every answer was cut away)"
    if np.isfinite(loss):
        return "the loss was finite but its gradient was not (overflow: lower the learning rate or use float32)"
    return f"the loss was {loss} (overflow: lower the learning rate, or use bfloat16 or float32)"
