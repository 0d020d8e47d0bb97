"""An engine whose work all processes share: the first one's, with the others behind it.

It takes and gives what an engine does, in the same order, so the loop, evaluation and the closing table know nothing of
it. Updates are gathered in client order and folded by the first process alone, and not summed up by an all-reduce: a
sum of partial sums would depend on the number of processes, and methods that stack or decompose updates have no sum.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from sheepfold.adapter import Adapter
from sheepfold.assembly import AnyEngine
from sheepfold.config import GenerationSettings, TrainSettings
from sheepfold.devices import shares
from sheepfold.devices.team import Team
from sheepfold.engines.common import Work
from sheepfold.halving import Halvings
from sheepfold.local.steps import tokens_in_round
from sheepfold.local.store import ClientStore
from sheepfold.messages import Absence, Assignment, Update
from sheepfold.metrics import Score
from sheepfold.state import BatchPlan


class SharedEngine:
    """The engine of the first process, which takes its share of all work and asks the others for theirs."""

    def __init__(self, engine: AnyEngine, team: Team, alone: TrainSettings | None = None) -> None:
        """alone: the settings of an engine without a method's client half (see `plain`), None: with it."""
        self.engine, self.team, self._alone = engine, team, alone
        self._processes = 1 + len(team.workers)
        self._lengths = engine.tokens.lengths()

    @property
    def plan(self) -> BatchPlan:
        """See LocalEngine."""
        return self.engine.plan

    @property
    def halvings(self) -> Halvings:
        """See LocalEngine."""
        return self.engine.halvings

    @property
    def store(self) -> ClientStore:
        """See LocalEngine; all processes keep what clients keep in one folder."""
        return self.engine.store

    @property
    def private(self) -> Callable[[str], bool]:
        """See LocalEngine."""
        return self.engine.private

    @property
    def bare(self) -> Adapter | None:
        """See LocalEngine."""
        return self.engine.bare

    @property
    def carrier(self) -> Any:
        """See PeftModelEngine."""
        return self.engine.carrier  # type: ignore[union-attr]  # asked of that engine alone

    def plain(
        self, train_rows: Mapping[str, np.ndarray] | None = None, train: TrainSettings | None = None
    ) -> "AnyEngine | SharedEngine":
        """See LocalEngine; over other rows than the clients' it is this process's alone."""
        own = self.engine.plain(train_rows, train)
        return SharedEngine(own, self.team, own.settings) if train_rows is None else own

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        """Yield every client's update, or why there is none, in the order of the assignments.

        Another's updates come one at a time, when their turn is there. Seconds are divided by the number of processes:
        summed over clients they are a round's, as with one.
        """
        rows, settings = self.engine.train_rows, self.engine.settings
        costs = [tokens_in_round(settings, np.asarray(rows[a.client]), self._lengths) for a in assignments]
        adapters = {id(a.adapter): a.adapter for a in assignments}  # mostly one for all
        largest = max((adapter.nbytes() for adapter in adapters.values()), default=0)
        for turn in shares.turns(costs, self._processes, self.plan.clients_per_pass, largest):
            own, *others = [assignments[part] for part in turn]
            asked = [(worker, share) for worker, share in zip(self.team.workers, others, strict=True) if share]
            for worker, share in asked:
                self.team.ask(worker, "train", (share, self.plan, self._alone))
            for answer in self.engine.train(own):
                yield self._timed(answer)
            for worker, _ in asked:
                for answer in self._answers(worker):
                    if isinstance(answer, Update):
                        self.engine.on_step(answer.measurements.steps)
                    yield self._timed(answer)

    def scores(self, adapters: Sequence[Adapter], work: Work, rows: int) -> list[Score]:
        """See LocalEngine: rows are shared, a client's too, since scores add up."""
        found = [Score()] * len(work)

        def ask(part: Work, mine: Sequence[Adapter]) -> tuple[str, Any]:
            return "score", (mine, part, rows, self.plan)

        def own(part: Work, mine: Sequence[Adapter]) -> list[Score]:
            return self.engine.scores(mine, part, rows)

        for places, told in self._shared(adapters, work, self._lengths, ask, own):
            for place, score in zip(places, told, strict=True):
                found[place] = found[place] + score
        return found

    def generate(
        self, adapters: Sequence[Adapter], work: Work, settings: GenerationSettings, pad_id: int, eos: Sequence[int]
    ) -> list[list[list[int]]]:
        """See the engines' generate: rows are shared, and a row's draws are its own."""
        found: list[list[list[int]]] = [[] for _ in work]

        def ask(part: Work, mine: Sequence[Adapter]) -> tuple[str, Any]:
            return "generate", (mine, part, settings, pad_id, list(eos))

        def own(part: Work, mine: Sequence[Adapter]) -> list[list[list[int]]]:
            return self.engine.generate(mine, part, settings, pad_id, eos)

        for places, told in self._shared(adapters, work, None, ask, own):
            for place, answers in zip(places, told, strict=True):
                found[place] += answers
        return found

    def _shared(
        self,
        adapters: Sequence[Adapter],
        work: Work,
        weights: np.ndarray | None,
        ask: Callable[[Work, Sequence[Adapter]], tuple[str, Any]],
        own: Callable[[Work, Sequence[Adapter]], list[Any]],
    ) -> Iterator[tuple[list[int], list[Any]]]:
        """Yield, process by process, places in the work and what their rows, or a part of them, came to."""
        parts = shares.share_rows(work, weights, self._processes)
        asked = []
        for part in parts:
            numbers = shares.adapters_of([(work[place][0], rows) for place, rows in part])
            mine = [adapters[a] for a in numbers]
            asked.append(([place for place, _ in part], [(numbers[work[p][0]], rows) for p, rows in part], mine))
        for worker, (places, part, mine) in zip(self.team.workers, asked[1:], strict=True):
            if places:
                self.team.ask(worker, *ask(part, mine))
        places, part, mine = asked[0]
        if places:
            yield places, own(part, mine)
        for worker, (places, _, _) in zip(self.team.workers, asked[1:], strict=True):
            if places:
                [told] = self._answers(worker)
                yield places, told

    def _answers(self, worker: int) -> Iterator[Any]:
        """Yield a worker's answers; where it ran out of memory and went on with less, all do so from now on."""
        theirs, said = yield from self.team.answers(worker)
        for text in said:
            self.engine.halvings.halve(smallest(self.plan, theirs), f"process {worker}: {text}")

    def _timed(self, answer: Update | Absence) -> Update | Absence:
        if isinstance(answer, Absence):
            return answer
        measured = answer.measurements
        seconds = {stage: s / self._processes for stage, s in measured.seconds.items()}
        return replace(answer, measurements=replace(measured, seconds=seconds))


def smallest(plan: BatchPlan, other: BatchPlan) -> BatchPlan:
    """Return the plan that is no larger than either of these in anything: each may have been halved elsewhere."""
    least: dict[str, Any] = {}
    for field in fields(BatchPlan):
        bounds = [getattr(plan, field.name), getattr(other, field.name)]
        least[field.name] = min((bound for bound in bounds if bound is not None), default=None)
    return BatchPlan(**least | {"recompute": plan.recompute or other.recompute})
