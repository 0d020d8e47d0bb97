"""Held-out loss: per client, token-weighted, and spread over clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sheepfold.metrics import Mean, merge

KEYS = ("weighted", "plain", "worst_decile", "best_decile", "sampled", "never_sampled", "global")
"""What a report of held-out loss can hold; stop.key is one of these after 'loss.'."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One evaluation of one adapter on held-out rows."""

    clients: Mapping[str, Mean]
    """Each client's own rows; clients without any are absent."""
    overall: Mean = field(default_factory=Mean)
    """The global test set's rows, where there is one."""
    never_sampled: frozenset[str] = field(default_factory=frozenset)
    """Clients that took part in no round so far."""

    def summary(self) -> dict[str, float]:
        """Return the figures that have something behind them, in nats per target token.

        weighted: over all clients' tokens; plain: the mean of clients' means; worst_decile, best_decile: the mean over
        the tenth of the clients (at least one) with the highest and the lowest loss; sampled, never_sampled: weighted,
        over clients that did and did not take part so far; global: the global test set.
        """
        values = sorted(m.value for m in self.clients.values())
        tenth = max(1, len(values) // 10)
        out: dict[str, float] = {}
        if values:
            out["weighted"] = merge(self.clients.values()).value
            out["plain"] = sum(values) / len(values)
            out["worst_decile"] = sum(values[-tenth:]) / tenth
            out["best_decile"] = sum(values[:tenth]) / tenth
            seen = merge(m for c, m in self.clients.items() if c not in self.never_sampled)
            unseen = merge(m for c, m in self.clients.items() if c in self.never_sampled)
            out |= {"sampled": seen.value} if seen.count else {}
            out |= {"never_sampled": unseen.value} if unseen.count else {}
        if self.overall.count:
            out["global"] = self.overall.value
        return out

    def as_dict(self) -> dict[str, Any]:
        """Return the summary and every client's loss, ready for JSON."""
        return {"loss": self.summary(), "clients": {c: m.value for c, m in self.clients.items()}}


def held_out(names: Sequence[str], means: Sequence[Mean], unseen: frozenset[str], *, has_global: bool) -> HeldOut:
    """Return the evaluation whose means are those of `names`, with the global test set's last where there is one."""
    own = means[:-1] if has_global else means
    clients = {name: mean for name, mean in zip(names, own, strict=True) if mean.count}
    return HeldOut(clients, means[-1] if has_global else Mean(), unseen)
