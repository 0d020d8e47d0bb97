"""Was joining worth it? Base, each client alone, all rows in one place, and the federation, on the same rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from sheepfold.adapter import Adapter, combined
from sheepfold.assembly import Parts
from sheepfold.engines.common import DITTO, OWN, with_own
from sheepfold.local.store import ClientStore
from sheepfold.marks import Marks, evaluation_rows, marks, shared_rows
from sheepfold.messages import Assignment, Update
from sheepfold.metrics import Score
from sheepfold.state import ServerState

EVERYONE = "everyone"
"""The one client of the centralised baseline."""


@dataclass(frozen=True, slots=True)
class Closing:
    """The closing table: score[measure][rows of][who], where 'shared' are everybody's rows."""

    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    clients: Sequence[str]
    shared_rows: int
    metrics: Sequence[str] = field(default_factory=tuple)
    """Generative measures, and a task's such as accuracy, higher is better; 'loss' is always there, lower is better."""

    @property
    def joined(self) -> str:
        """What a client that joins goes home with: its own adapter where clients have one, else everybody's."""
        return (
            "personal"
            if any("personal" in who for rows in self.scores.values() for who in rows.values())
            else "federated"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the table, ready for JSON."""
        return {"scores": self.scores, "clients": list(self.clients), "shared_rows": self.shared_rows}

    def alone_on_shared(self, measure: str) -> list[float]:
        """Return what each client's own adapter reaches on everybody's rows."""
        return [v for name, v in self.scores[measure].get("shared", {}).items() if name.startswith("local:")]

    def helped(self, measure: str) -> tuple[int, int, int]:
        """Return on how many clients' own rows joining beats training alone, ties with it, and is compared."""
        sign, it = -1 if measure == "loss" else 1, self.joined
        own = [s for rows, s in self.scores[measure].items() if rows != "shared" and {"local", it} <= s.keys()]
        better = sum(sign * s[it] > sign * s["local"] for s in own)
        return better, sum(s[it] == s["local"] for s in own), len(own)


def train_alone(parts: Parts, rounds: int, lr: Callable[[int], float]) -> dict[str, Adapter]:
    """Return what every client reaches by itself: as many rounds as the run had, on its own rows, never folded.

    A client that takes no good step keeps what it has.
    """
    engine = parts.engine.plain()
    adapters = {client: parts.alone(client) for client in parts.data.clients}
    drawn = dict.fromkeys(adapters, 0)
    for round in range(rounds):
        work = [Assignment(c, round, a, lr(round), drawn[c]) for c, a in adapters.items()]
        for answer in engine.train(work):
            if isinstance(answer, Update):
                adapters[answer.client] = answer.adapter
                drawn[answer.client] += answer.measurements.steps
            else:
                drawn[answer.client] += answer.steps
    return adapters


def train_centrally(parts: Parts, state: ServerState, lr: Callable[[int], float]) -> Adapter:
    """Return what all rows in one place reach, with as many optimizer steps as the federation's clients took in sum."""
    rows = np.concatenate([client.train for client in parts.data.clients.values()])
    steps = max(1, round(sum(state.drawn.values()) / state.round))
    train = parts.experiment.train.model_copy(update={"steps": steps, "epochs": None})
    engine = parts.engine.plain({EVERYONE: rows}, train)
    adapter = parts.initial
    for r in range(state.round):
        for answer in engine.train([Assignment(EVERYONE, r, adapter, lr(r), r * steps)]):
            if isinstance(answer, Update):
                adapter = answer.adapter
    return adapter


def fine_tune(parts: Parts, state: ServerState, lr: float, steps: int) -> ClientStore:
    """Train every client's adapter further on its own rows; return the results, in a store that lives as long as it.

    A client without rows, or without a good step, keeps what it had.
    """
    train = parts.experiment.train.model_copy(update={"steps": steps, "epochs": None})
    engine = parts.engine.plain(train=train)
    tuned = ClientStore()
    clients = list(parts.data.clients)
    for first in range(0, len(clients), parts.engine.plan.clients_per_pass):
        work = []
        for client in clients[first : first + parts.engine.plan.clients_per_pass]:
            assigned = replace(parts.strategy.assign(state, client, lr), frozen=frozenset())
            work.append(replace(assigned, adapter=with_own(assigned.adapter, kept(parts, state, client), OWN)))
        for answer in engine.train(work):
            if isinstance(answer, Update):
                tuned.put(answer.client, state.round, answer.adapter.tensors())
    return tuned


def kept(parts: Parts, state: ServerState, client: str) -> Mapping[str, Tensor]:
    """Return what a client has of its own, as of a state."""
    return parts.engine.store.get(client, state.counted.get(client, 0))


def personal(
    parts: Parts, state: ServerState, client: str, kind: str = OWN, tuned: ClientStore | None = None
) -> Adapter:
    """Return the global adapter at a client's ranks, with what it has of its own in it.

    kind: OWN or DITTO, which of its own tensors count; where it is in `tuned`, that is all.
    """
    handed = parts.strategy.assign(state, client, 0.0)
    adapter = with_own(handed.adapter, kept(parts, state, client), kind)
    if tuned is not None:
        adapter = adapter.holding(tuned.get(client, state.round))
    return combined(handed.side, adapter)


def going_home(parts: Parts, state: ServerState, tuned: ClientStore | None, client: str) -> Adapter:
    """Return what a client goes home with at the end of a run."""
    return personal(parts, state, client, DITTO if parts.experiment.personal.ditto else OWN, tuned)


def held_out_each(parts: Parts, state: ServerState, asked: Sequence[tuple[str, np.ndarray]]) -> list[Score]:
    """Return each client's held-out score with what it kept during the run; a pass's number of adapters at a time."""
    scores: list[Score] = []
    size = max(8, parts.engine.plan.clients_per_pass)
    for first in range(0, len(asked), size):
        part = asked[first : first + size]
        adapters = [personal(parts, state, client) for client, _ in part]
        work = [(i, rows) for i, (_, rows) in enumerate(part)]
        scores += parts.engine.scores(adapters, work, parts.experiment.evaluation.batch_rows)
    return scores


def contenders(
    parts: Parts,
    state: ServerState,
    local: Mapping[str, Adapter],
    central: Adapter | None = None,
    tuned: ClientStore | None = None,
) -> dict[str, Callable[[], Adapter]]:
    """Return whom held-out rows judge: base, federated, centralised, and of each client here local: and personal:.

    local: what each client reached alone; central: what all rows in one place did; tuned: see `fine_tune`.
    """
    base = parts.initial if parts.engine.bare is None else parts.engine.bare
    made: dict[str, Callable[[], Adapter]] = {"base": lambda: base, "federated": state.whole}
    if central is not None:
        made["centralised"] = lambda: central
    made |= {f"local:{client}": partial(local.__getitem__, client) for client in local}
    mine = parts.data.clients if parts.personal else {}
    return made | {f"personal:{client}": partial(going_home, parts, state, tuned, client) for client in mine}


def compare(
    parts: Parts,
    state: ServerState,
    local: Mapping[str, Adapter],
    central: Adapter | None,
    measures: Sequence[str],
    tuned: ClientStore | None = None,
) -> Closing:
    """Score everybody on each client's own rows and on everybody's; measures: 'loss', the task's, the run's metrics."""
    made = contenders(parts, state, local, central, tuned)
    own = evaluation_rows(parts)
    shared = shared_rows(parts, own)
    asked: list[tuple[str, str, np.ndarray]] = []
    for client, rows in own.items():
        if len(rows):
            asked += [(client, subject, rows) for subject in made if subject.partition(":")[2] in ("", client)]
    everywhere = [n for n in made if not n.startswith("personal:")]  # an own adapter is for its own rows
    asked += [("shared", subject, shared) for subject in everywhere] if len(shared) else []
    number = {name: i for i, name in enumerate(made)}
    work = [(number[subject], rows) for _, subject, rows in asked]
    found = marks(parts, list(made.values()), work, measures)
    named = [(of, subject, mark) for (of, subject, _), mark in zip(asked, found, strict=True)]
    return Closing(table(named, measures), list(own), len(shared), [m for m in measures if m != "loss"])


def table(named: Sequence[tuple[str, str, Marks]], measures: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Return a closing table of (rows of, subject, marks)."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for measure in measures:
        for rows_of, subject, mark in named:
            label = subject.partition(":")[0] if rows_of != "shared" else subject
            scores.setdefault(measure, {}).setdefault(rows_of, {})[label] = mark.figure(measure)
    return scores
