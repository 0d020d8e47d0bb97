"""Held-out loss and, where rows have labels, accuracy and the like: weighted, and spread over clients."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sheepfold.evaluation.labels import MEASURES, Confusion
from sheepfold.metrics import Mean, Score, merge

KEYS = ("weighted", "plain", "worst_decile", "best_decile", "sampled", "never_sampled", "global")
"""What a report of a measure can hold; stop.key is one of these after 'loss.', or after the measure's name."""
GLOBAL = ""
"""In the place of a client's name: the global test set."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One evaluation of one adapter on held-out rows."""

    clients: Mapping[str, Mean]
    """Each client's own rows; clients without any are absent."""
    overall: Mean = field(default_factory=Mean)
    """The global test set's rows, where there is one."""
    never_sampled: frozenset[str] = field(default_factory=frozenset)
    """Clients that took part in no round so far."""
    confusions: Mapping[str, Confusion] = field(default_factory=dict)
    """Where rows have labels: client, or GLOBAL, -> how often each label was given for each"""
    measures: Sequence[str] = ()
    """What else than the loss is reported"""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Clients whose rows did not judge, and why: another machine's, which did not answer"""

    def figure(self, measure: str, clients: Iterable[str]) -> float:
        """Return what the rows of these clients together come to; GLOBAL is one of them."""
        if measure == "loss":
            return merge(self.clients[c] if c != GLOBAL else self.overall for c in clients).value
        return MEASURES[measure](sum_of(self.confusions[c] for c in clients))

    def summary(self, measure: str = "loss") -> dict[str, float]:
        """Return a measure's figures that have something behind them; the loss in nats per target.

        weighted: over all clients' targets (tokens, or rows with labels) together; plain: the mean of clients' figures;
        worst_decile, best_decile: the mean over the tenth of the clients (at least one) with the worst and the best
        figure; sampled, never_sampled: weighted, over clients that did and did not take part so far; global: the global
        test set.
        """
        values = sorted((self.figure(measure, [c]) for c in self.clients), reverse=measure != "loss")
        tenth = max(1, len(values) // 10)
        out: dict[str, float] = {}
        if values:
            out["weighted"] = self.figure(measure, self.clients)
            out["plain"] = sum(values) / len(values)
            out["worst_decile"] = sum(values[-tenth:]) / tenth
            out["best_decile"] = sum(values[:tenth]) / tenth
            seen = [c for c in self.clients if c not in self.never_sampled]
            unseen = [c for c in self.clients if c in self.never_sampled]
            out |= {"sampled": self.figure(measure, seen)} if seen else {}
            out |= {"never_sampled": self.figure(measure, unseen)} if unseen else {}
        if self.overall.count:
            out["global"] = self.figure(measure, [GLOBAL])
        return out

    def as_dict(self) -> dict[str, Any]:
        """Return every measure's summary, every client's loss, and its other measures by name, ready for JSON."""
        found: dict[str, Any] = {measure: self.summary(measure) for measure in ("loss", *self.measures)}
        found["clients"] = {c: m.value for c, m in self.clients.items()}
        for measure in self.measures:
            found[f"clients_{measure}"] = {c: self.figure(measure, [c]) for c in self.clients}
        return found


def sum_of(counts: Iterable[Confusion]) -> Confusion:
    """Return the confusion matrix of all rows together."""
    first, *others = counts
    return sum(others, start=first)


def held_out(
    names: Sequence[str],
    scores: Sequence[Score],
    unseen: frozenset[str],
    *,
    has_global: bool,
    measures: Sequence[str] = (),
) -> HeldOut:
    """Return the evaluation whose scores are those of `names`, with the global test set's last where there is one."""
    named = dict(zip([*names, *([GLOBAL] if has_global else [])], scores, strict=True))
    clients = {name: named[name].loss for name in names if named[name].loss.count}
    confusions = {name: score.confusion for name, score in named.items() if score.confusion is not None}
    overall = named[GLOBAL].loss if has_global else Mean()
    return HeldOut(clients, overall, unseen, confusions, measures)
