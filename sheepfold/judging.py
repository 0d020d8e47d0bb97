"""Held-out rows judge a state, wherever they are: in this process, or each client's on a machine of its own.

    server:  exam(parts, state, client) ──▶ bytes ──▶ judge(parts, exam) :client
             judged_by(parts, state, {client: verdict}) ◀── bytes ◀── Verdict

Both ways go through `scores`, so a client's figures are those that it would have in one process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from sheepfold import joining
from sheepfold.assembly import Parts
from sheepfold.errors import WireError
from sheepfold.evaluation.held_out import GLOBAL, HeldOut, held_out
from sheepfold.marks import evaluation_rows
from sheepfold.messages import Absence, Assignment
from sheepfold.metrics import Score
from sheepfold.state import ServerState
from sheepfold.wire.exams import ClientFacts, Exam, Verdict, unpack_verdict
from sheepfold.wire.heads import rejected
from sheepfold.wire.packing import RUN, compact

Kind = Literal["judge", "close"]


def evaluate(parts: Parts, state: ServerState) -> HeldOut:
    """Return the held-out loss, and a task's other measures, on every client's rows and on the global test set.

    Where clients keep a part of the adapter, each is judged with its own; one that never took part has none.
    """
    return _reported(parts, state, scores(parts, state))


def scores(parts: Parts, state: ServerState) -> dict[str, Score]:
    """Return what the held-out rows of every client here come to, and as GLOBAL the global test set's, if it is here.

    Where clients keep a part of the adapter, each is judged with its own.
    """
    own = evaluation_rows(parts)
    asked = [*own.items(), *([(GLOBAL, parts.data.holdout)] if len(parts.data.holdout) else [])]
    mine = set(parts.engine.store.clients(own)) if parts.keeps else set()
    work = [(0, rows) for client, rows in asked if client not in mine]
    rows_at_once = parts.experiment.evaluation.batch_rows
    shared = iter(parts.engine.scores([state.whole()], work, rows_at_once) if work else [])
    each = iter(joining.held_out_each(parts, state, [(c, rows) for c, rows in asked if c in mine]))
    return {client: next(each) if client in mine else next(shared) for client, _ in asked}


def exam(parts: Parts, state: ServerState, client: str, kind: Kind = "judge") -> Exam:
    """Return what this client's machine needs of a state to judge it, or to close the run with."""
    handed = parts.strategy.assign(state, client, 0.0)
    own = parts.personal if kind == "close" else parts.keeps
    memory = handed.memory if kind == "close" and parts.experiment.personal.finetune_steps else {}
    adapter = handed.adapter if own else state.adapter
    return Exam(replace(handed, adapter=adapter, memory=memory, known=frozenset()), state.adapter, state.side)


def expected(parts: Parts, kind: Kind) -> tuple[Sequence[str], Sequence[str]]:
    """Return whom a client's verdict is about, and the metrics of generated answers that it has."""
    if kind == "judge" or not comparing(parts):
        return ["federated"], []
    alone = ["local"] if "local" in parts.experiment.baselines else []
    return ["base", "federated", *alone, *(["personal"] if parts.personal else [])], list(parts.metrics)


def comparing(parts: Parts) -> bool:
    """Return whether a run ends with a closing table."""
    asked = parts.experiment
    return bool(asked.baselines or asked.evaluation.metrics or asked.personal.wanted or parts.keeps)


def opened(parts: Parts, asked: Exam, kind: Kind, data: bytes, run: str = RUN) -> Verdict | Absence:
    """Return the verdict that a client's machine answers with, or why there is none; one that cannot be is rejected."""
    must, metrics = expected(parts, kind)
    labels = len(parts.task.labels)
    try:
        return unpack_verdict(data, asked.client, asked.round, run, labels=labels, metrics=metrics, must=must)
    except WireError as error:
        return Absence(asked.client, rejected(error), sent_bytes=len(data))


def judge(parts: Parts, asked: Exam) -> Verdict:
    """Return what the held-out rows of this machine's one client say of a state."""
    here, state = sitting(parts, asked)
    return Verdict(asked.client, asked.round, {"federated": scores(here, state)[asked.client]}, facts_of(parts))


def sitting(parts: Parts, asked: Exam) -> tuple[Parts, ServerState]:
    """Return this machine's parts, in which its client is handed what the server says, and the state of an exam."""
    handed = replace(asked.handed, side=compact(asked.side))

    def assign(state: ServerState, client: str, lr: float) -> Assignment:
        return replace(handed, lr=lr)

    state = replace(
        parts.first,
        round=asked.round,
        adapter=asked.adapter,
        side=asked.side,
        drawn={asked.client: handed.first_step},
        counted={asked.client: handed.last},
        memory={},
    )
    return replace(parts, strategy=replace(parts.strategy, assign=assign)), state


def facts_of(parts: Parts) -> ClientFacts:
    """Return what this machine's one client tells of its rows."""
    data = parts.data
    [rows] = data.clients.values()
    targets = int(data.tokens.target_tokens()[rows.train].sum())
    return ClientFacts(len(rows.train), len(rows.eval), len(rows.test), targets, data.fingerprint)


def judged_by(parts: Parts, state: ServerState, verdicts: Mapping[str, Verdict | Absence]) -> HeldOut:
    """Return the evaluation that these verdicts, and the server's own test rows, amount to."""
    found = {c: v.scores["federated"] for c, v in verdicts.items() if isinstance(v, Verdict)}
    absent = {c: v.reason for c, v in verdicts.items() if isinstance(v, Absence)}
    ordered = {client: found[client] for client in parts.clients if client in found}
    return replace(_reported(parts, state, {**ordered, **scores(parts, state)}), absent=absent)


def _reported(parts: Parts, state: ServerState, found: Mapping[str, Score]) -> HeldOut:
    names = [name for name in found if name != GLOBAL]
    unseen = frozenset(names) - state.drawn.keys()
    has_global = GLOBAL in found
    return held_out(names, list(found.values()), unseen, has_global=has_global, measures=parts.task.measures)
