"""Was joining worth it? Base, each client alone, all rows in one place, and the federation, on the same rows."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from sheepfold.adapter import Adapter, combined
from sheepfold.assembly import AnyEngine, Parts
from sheepfold.config import TrainSettings
from sheepfold.engines.common import DITTO, OWN, Work, score_of, with_own
from sheepfold.evaluation.labels import MEASURES
from sheepfold.local.store import ClientStore
from sheepfold.messages import Assignment, Update
from sheepfold.metrics import Mean, Score
from sheepfold.rng import stream
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
    engine = _plain(parts.engine)
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
    engine = _plain(parts.engine, {EVERYONE: rows}, train)
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
    engine = _plain(parts.engine, train=train)
    store, tuned = parts.engine.store, ClientStore()
    clients = list(parts.data.clients)
    for first in range(0, len(clients), parts.engine.plan.clients_per_pass):
        work = []
        for client in clients[first : first + parts.engine.plan.clients_per_pass]:
            assigned = replace(parts.strategy.assign(state, client, lr), frozen=frozenset())
            work.append(replace(assigned, adapter=with_own(assigned.adapter, store.get(client, state.round), OWN)))
        for answer in engine.train(work):
            if isinstance(answer, Update):
                tuned.put(answer.client, state.round, answer.adapter.tensors())
    return tuned


def personal(
    parts: Parts, state: ServerState, client: str, kind: str = OWN, tuned: ClientStore | None = None
) -> Adapter:
    """Return the global adapter at a client's ranks, with what it has of its own in it.

    kind: OWN or DITTO, which of its own tensors count; where it is in `tuned`, that is all.
    """
    handed = parts.strategy.assign(state, client, 0.0)
    adapter = with_own(handed.adapter, parts.engine.store.get(client, state.round), kind)
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


def _plain(
    engine: AnyEngine, train_rows: Mapping[str, np.ndarray] | None = None, train: TrainSettings | None = None
) -> AnyEngine:
    """Return the engine without a method's client half, over other rows or settings where given."""
    other = copy.copy(engine)
    other.rule, other.ditto, other.store = None, None, ClientStore()
    other.private = lambda name: False
    other.train_rows = engine.train_rows if train_rows is None else train_rows
    other.settings = train or engine.settings
    return other


def evaluation_rows(parts: Parts) -> dict[str, np.ndarray]:
    """Return each client's held-out rows as the experiment asks for them; at most rows_per_client, always the same."""
    settings, seed = parts.experiment.evaluation, parts.experiment.data.seed
    most = settings.rows_per_client

    def chosen(client: str) -> np.ndarray:
        rows = parts.data.label_rows(client, settings.split)
        if most is None or len(rows) <= most:
            return rows
        return np.sort(stream(seed, "evaluation", client).permutation(rows)[:most])

    return {client: chosen(client) for client in parts.data.clients}


def shared_rows(parts: Parts, own: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return everybody's rows: the global test set, else all clients' held-out rows together."""
    if len(parts.data.holdout):
        return parts.data.holdout
    return np.concatenate(list(own.values()))


def compare(
    parts: Parts,
    state: ServerState,
    local: Mapping[str, Adapter],
    central: Adapter | None,
    measures: Sequence[str],
    tuned: ClientStore | None = None,
) -> Closing:
    """Score everybody on each client's own rows and on everybody's; measures: 'loss', the task's, the run's metrics."""
    base = parts.initial if parts.engine.bare is None else parts.engine.bare
    made: dict[str, Callable[[], Adapter]] = {"base": lambda: base, "federated": state.whole}
    if central is not None:
        made["centralised"] = lambda: central
    who = list(made)
    made |= {f"local:{client}": partial(local.__getitem__, client) for client in local}
    mine = parts.data.clients if parts.personal else {}
    made |= {f"personal:{client}": partial(going_home, parts, state, tuned, client) for client in mine}
    number = {name: i for i, name in enumerate(made)}
    own = evaluation_rows(parts)
    shared = shared_rows(parts, own)
    asked: list[tuple[str, str, np.ndarray]] = []
    for client, rows in own.items():
        if len(rows):
            subjects = [*who, *([f"local:{client}"] if client in local else [])]
            subjects += [f"personal:{client}"] if client in mine else []
            asked += [(client, subject, rows) for subject in subjects]
    everywhere = [n for n in number if not n.startswith("personal:")]  # an own adapter is for its own rows
    asked += [("shared", subject, shared) for subject in everywhere] if len(shared) else []
    work = [(number[subject], rows) for _, subject, rows in asked]
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for measure, values in figures(parts, list(made.values()), work, measures).items():
        for (rows_of, subject, _), value in zip(asked, values, strict=True):
            label = subject.partition(":")[0] if rows_of != "shared" else subject
            scores.setdefault(measure, {}).setdefault(rows_of, {})[label] = value
    return Closing(scores, list(own), len(shared), [m for m in measures if m != "loss"])


def figures(
    parts: Parts, adapters: Sequence[Callable[[], Adapter]], work: Work, measures: Sequence[str]
) -> dict[str, list[float]]:
    """Return each measure of adapters[a]() on the given rows, for each (a, row numbers) of the work."""
    held = held_out(parts, adapters, work)
    found = {"loss": [score.loss.value for score in held]}
    for measure in parts.task.measures:
        found[measure] = [MEASURES[measure](score.confusion) for score in held if score.confusion is not None]
    for measure in parts.metrics:
        found[measure] = [mean.value for mean in score(parts, adapters, work, measure)]
    return {measure: found[measure] for measure in measures}


def score(parts: Parts, adapters: Sequence[Callable[[], Adapter]], work: Work, measure: str) -> list[Mean]:
    """Return the loss, or a metric of generated answers, of adapters[a]() for each (a, row numbers) of the work."""
    if measure == "loss":
        return [score.loss for score in held_out(parts, adapters, work)]
    means, metric, records = [Mean()] * len(work), parts.metrics[measure], parts.data.records
    for mine, made, part in _a_few(parts, adapters, work):
        for i, (_, numbers), texts in zip(mine, part, answer(parts, made, part), strict=True):
            total = sum(metric(records[int(n)], text) for n, text in zip(numbers, texts, strict=True))
            means[i] = Mean(total, len(numbers))
    return means


def held_out(parts: Parts, adapters: Sequence[Callable[[], Adapter]], work: Work) -> list[Score]:
    """Return what adapters[a]() come to without generating, for each (a, row numbers) of the work."""
    scores = [Score()] * len(work)
    for mine, made, part in _a_few(parts, adapters, work):
        found = parts.engine.scores(made, part, parts.experiment.evaluation.batch_rows)
        for i, one in zip(mine, found, strict=True):
            scores[i] = one
    return scores


def judged(parts: Parts, model: Any, rows: np.ndarray) -> dict[str, float]:
    """Return what a plain model comes to on rows by number: the loss, and the task's other measures by name."""
    at_once = parts.experiment.evaluation.batch_rows
    score = score_of(parts.task, model, parts.data.tokens, rows, at_once, parts.base.device)
    found = {"loss": score.loss.value}
    return found | {m: MEASURES[m](score.confusion) for m in parts.task.measures if score.confusion is not None}


def _a_few(
    parts: Parts, adapters: Sequence[Callable[[], Adapter]], work: Work
) -> Iterator[tuple[list[int], list[Adapter], Work]]:
    """Yield the work in parts of a few adapters: (its places in the work, the adapters, the part).

    They are made when their turn comes, as many on the device as a pass has, or a few.
    """
    size = max(8, parts.engine.plan.clients_per_pass)
    for first in range(0, len(adapters), size):
        mine = [i for i, (a, _) in enumerate(work) if first <= a < first + size]
        part = [(work[i][0] - first, work[i][1]) for i in mine]
        yield mine, [make() for make in adapters[first : first + size]], part


def answer(parts: Parts, adapters: Sequence[Adapter], work: Work) -> list[list[str]]:
    """Return the generated answer for each row of each (adapter, row numbers) of the work, as text."""
    tokenizer = parts.base.tokenizer
    stop = parts.base.stop_ids
    generated = parts.engine.generate(
        adapters, work, parts.experiment.evaluation.generation, tokenizer.pad_token_id, stop
    )
    return [[tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in part] for part in generated]
