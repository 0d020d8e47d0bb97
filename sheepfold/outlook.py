"""What a round is expected to take, beside what it took: memory, and from the second round on seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

from sheepfold import memory
from sheepfold.assembly import Parts
from sheepfold.local.steps import tokens_in_round


class Outlook:
    """A run's expectations: of memory from what was counted before it began, of seconds from the rounds so far."""

    def __init__(self, parts: Parts, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begin when the base is loaded, with nothing in training yet; lines: the journal so far."""
        self._parts, self._device = parts, parts.base.device
        self._rest = memory.in_use(self._device)
        self._seconds = self._tokens = 0.0
        self._lengths = parts.data.tokens.lengths()
        self._known: dict[str, float] = {}
        self._foreseen: dict[str, int | None] = {}
        for line in lines:
            self._learn(line)

    def begin(self, round: int) -> None:
        """Begin to watch a round, counted from 1; 0: what is before the first."""
        self._parts.engine.halvings.enter(f"round {round}")
        memory.forget_peak(self._device)
        self._foreseen = {"predicted": self.memory()} if round else {}

    def complete(self, line: dict[str, Any]) -> None:
        """Add to a round's line what was expected of it, what it had at its peak and what was halved, and learn."""
        if said := self._parts.engine.halvings.said:
            line["halved"] = said  # the same in a resumed run, which halves at the same places
        line["memory"] = {**self._foreseen, "peak": memory.peak(self._device)}
        if self._tokens:
            line["seconds"]["predicted"] = self._seconds / self._tokens * self._expected(line["cohort"])
        self._learn(line)

    def memory(self) -> int | None:
        """Return the bytes that a round is expected to have in use at its peak; None where that cannot be told."""
        need, plan = self._parts.need, self._parts.engine.plan
        if need is None or need.in_a_pass(plan) is None:
            return None
        return self._rest + need.of(plan) - need.base

    def _learn(self, line: Mapping[str, Any]) -> None:
        if line.get("cohort"):
            self._seconds += line["seconds"]["round"]
            self._tokens += self._expected(line["cohort"])

    def _expected(self, cohort: Sequence[str]) -> float:
        """Return about how many tokens a cohort goes through; where rows are elsewhere, how many clients."""
        if self._parts.apart:
            return len(cohort)
        for client in cohort:
            if client not in self._known:
                rows = self._parts.data.clients[client].train
                self._known[client] = tokens_in_round(self._parts.experiment.train, rows, self._lengths)
        return sum(self._known[client] for client in cohort)
