"""Held-out rows between machines: what a client is asked to judge, and what its rows came to, as bytes.

    server ── Exam: the state, as far as it is this client's ──▶ client ── Verdict: sums and counts ──▶ server

Judging changes no number of the training, so nothing is narrowed: every tensor of an exam is there, as exact as the
server has it. A verdict has sums, counts and names, and never a row. A client that cannot judge sends an absence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sheepfold.adapter import Adapter
from sheepfold.errors import WireError
from sheepfold.messages import Absence, Assignment
from sheepfold.metrics import Mean, Score
from sheepfold.wire import blob, heads
from sheepfold.wire.packing import ADAPTER, FORMAT, MEMORY, RUN, SIDE, common, paths, scales_of, short
from sheepfold.wire.unpacking import LARGEST_SUM, absence_of, adapter_of, check_modules, last_of, part_of, side_of

HANDED = "handed:"
"""Before the tensors of what this client would be handed, where that is not the global adapter."""
LOSSES, COUNTED = "losses", "counted"
SUBJECTS = ("federated", "base", "local", "personal")
"""Whom a client's rows may judge: the global adapter, the bare base, what it reached alone, its own adapter."""
VERDICT_ROOM = 2**20
"""Bytes that a verdict may take beside its confusion matrices."""


@dataclass(frozen=True, slots=True)
class Exam:
    """A state, as far as it is one client's."""

    handed: Assignment
    """What this client would be handed in the next round, with all its tensors"""
    adapter: Adapter
    """The global adapter"""
    side: Adapter = field(default_factory=Adapter)
    """What the base has changed by, as the server has it"""

    @property
    def client(self) -> str:
        """Whose it is."""
        return self.handed.client

    @property
    def round(self) -> int:
        """Rounds completed."""
        return self.handed.round


@dataclass(frozen=True, slots=True)
class ClientFacts:
    """What a client tells of its rows."""

    train: int
    """Rows"""
    eval: int
    test: int
    target_tokens: int
    """Of the training rows"""
    fingerprint: str
    """Of its records, splits and tokens together"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one client's held-out rows came to."""

    client: str
    round: int
    """Rounds completed"""
    scores: Mapping[str, Score]
    """Whom they judged, of SUBJECTS -> score"""
    facts: ClientFacts
    metrics: Mapping[str, Mapping[str, Mean]] = field(default_factory=dict)
    """Metric of generated answers -> whom they judged -> mean"""


def pack_exam(exam: Exam, run: str = RUN) -> bytes:
    """Return an exam's bytes."""
    a, own = exam.handed, exam.handed.adapter
    sent = {ADAPTER + name: t for name, t in exam.adapter.tensors().items()}
    head = common("exam", run, a.client, a.round) | {"last": a.last, "drawn": a.first_step, "lr": a.lr}
    head |= _form(exam.adapter) | {"handed": None}
    if own is not exam.adapter:
        head["handed"] = _form(own)
        sent |= {HANDED + name: t for name, t in own.tensors().items()}
    for path, pair in exam.side.pairs.items():
        sent |= {f"{SIDE}{path}/A": pair.A, f"{SIDE}{path}/B": pair.B}
    head["side_scales"] = short([pair.scale for _, pair in sorted(exam.side.pairs.items())])
    return blob.write(head, sent | {MEMORY + name: t for name, t in a.memory.items()})


def unpack_exam(data: bytes, mine: Adapter, run: str = RUN, most_bytes: int | None = None) -> Exam:
    """Return the exam of a blob. mine: the adapter that the client made itself, for the order of modules.

    `handed.side` is `side`; a strategy that knows a more compact form of it makes that itself. Raises WireError for a
    damaged or foreign message, and for modules that `mine` does not adapt.
    """
    head, tensors = blob.read(data, most_bytes)
    heads.check_common(head, FORMAT, run, ("exam",))
    if odd := [name for name in tensors if not name.startswith((ADAPTER, HANDED, SIDE, MEMORY))]:
        raise WireError(f"an exam with a tensor {odd[0][:60]!r}; expected adapter:, handed:, side: and memory:")
    adapter, side = adapter_of(tensors, {**head, "whole": []}, mine), side_of(tensors, head)
    own, form = adapter, head.get("handed")
    if form is not None:
        if not isinstance(form, dict):
            raise WireError(f"its handed is {str(form)[:60]}, expected a form")
        theirs = {ADAPTER + name: t for name, t in part_of(tensors, HANDED).items()}
        own = adapter_of(theirs, {**form, "whole": []}, mine)
    check_modules(mine, adapter, own, side)
    handed = Assignment(
        client=heads.text(head, "client"),
        round=heads.count(head, "round"),
        adapter=own,
        lr=heads.number(head, "lr"),
        first_step=heads.count(head, "drawn"),
        memory=part_of(tensors, MEMORY),
        side=side,
        known=frozenset(),
        last=last_of(head),
    )
    return Exam(handed, adapter, side)


def pack_verdict(verdict: Verdict, run: str = RUN) -> bytes:
    """Return a verdict's bytes. Raises WireError for a loss that is no number, which no message carries."""
    who, f = list(verdict.scores), verdict.facts
    means = [[score.loss, *(of[name] for of in verdict.metrics.values())] for name, score in verdict.scores.items()]
    losses = torch.tensor([[(m.total, m.count) for m in row] for row in means], dtype=torch.float64)
    for name, row in zip(who, losses, strict=True):
        if not bool(torch.isfinite(row).all()):
            raise WireError(f"the {name} adapter's figures on this client's rows are not finite")
    head = common("verdict", run, verdict.client, verdict.round) | {"who": who, "metrics": list(verdict.metrics)}
    head |= {"train": f.train, "eval": f.eval, "test": f.test, "targets": f.target_tokens, "data": f.fingerprint}
    tables = [score.confusion for score in verdict.scores.values() if score.confusion is not None]
    tensors = {LOSSES: losses} | ({COUNTED: torch.from_numpy(np.stack(tables))} if tables else {})
    return blob.write(head, tensors)


def unpack_verdict(
    data: bytes,
    client: str,
    round: int,
    run: str = RUN,
    *,
    labels: int = 0,
    metrics: Sequence[str] = (),
    must: Sequence[str] = ("federated",),
) -> Verdict | Absence:
    """Return the verdict of a blob, or the client's own reason why there is none.

    client, round: whose is expected, and of when. labels, metrics: how many labels rows have, and which generated
    answers were asked for; must: who must have been judged. Raises WireError for anything else, and for figures that no
    rows have.
    """
    head, tensors = blob.read(data, verdict_bytes(labels))
    message = heads.check_common(head, FORMAT, run, ("verdict", "absence"))
    if (theirs := heads.text(head, "client")) != client:
        raise WireError(f"a verdict in the name of {theirs[:60]!r}; a client sends its own alone")
    if (when := heads.count(head, "round")) != round:
        raise WireError(f"a verdict on round {when}, expected round {round}; was it sent again?")
    if message == "absence":
        return absence_of(head, tensors, len(data))
    who, named = heads.names(head, "who"), heads.names(head, "metrics")
    if set(who) - set(SUBJECTS) or set(must) - set(who):
        raise WireError(f"a verdict on {str(who)[:60]}, expected {list(must)}, of {list(SUBJECTS)}")
    if named != list(metrics):
        raise WireError(f"a verdict with metrics {str(named)[:60]}, expected {list(metrics)}")
    if odd := sorted(tensors.keys() - {LOSSES, COUNTED}):
        raise WireError(f"a verdict with a tensor {odd[0][:60]!r}; expected {LOSSES} and {COUNTED}")
    means = _means(tensors.get(LOSSES), len(who), 1 + len(named))
    tables = _tables(tensors.get(COUNTED), [row[0] for row in means], labels)
    scores = {name: Score(row[0], table) for name, row, table in zip(who, means, tables, strict=True)}
    generated = {m: {n: row[i] for n, row in zip(who, means, strict=True)} for i, m in enumerate(named, 1)}
    return Verdict(client, round, scores, _facts(head), generated)


def verdict_bytes(labels: int) -> int:
    """Return how many bytes a verdict on rows with this many labels may have."""
    return VERDICT_ROOM + len(SUBJECTS) * labels * labels * 8


def _form(adapter: Adapter) -> dict[str, Any]:
    """Return what of an adapter is not a tensor."""
    sent = [ADAPTER + name for name in adapter.tensors()]
    shapes = [list(adapter.sparse[path].shape) for path in paths(sent, ADAPTER, ("values",))]
    return {"scales": short(list(scales_of(adapter, sent).values())), "shapes": shapes}


def _means(losses: Tensor | None, subjects: int, measures: int) -> list[list[Mean]]:
    """Return each subject's means. Raises WireError for sums and counts that no rows have."""
    if losses is None or losses.dtype != torch.float64 or losses.shape != (subjects, measures, 2):
        raise WireError(f"a verdict without its {LOSSES}, expected {(subjects, measures, 2)} numbers in float64")
    totals, counts = losses.unbind(-1)
    if not bool((losses.abs() <= LARGEST_SUM).all()):
        raise WireError("a verdict with figures that are not finite, or that no sum has room for")
    if not bool(((counts >= 0) & (counts < 2**53) & (counts == counts.round())).all()):
        raise WireError("a verdict that counts in fractions, or below 0")
    if bool(((counts == 0) & (totals != 0)).any()) or bool((totals[:, 0] < -1e-3 * counts[:, 0]).any()):
        raise WireError("a verdict with a loss of nothing, or below 0")
    return [[Mean(total, count) for total, count in row] for row in losses.tolist()]


def _tables(counted: Tensor | None, losses: Sequence[Mean], labels: int) -> list[np.ndarray | None]:
    """Return each subject's confusion matrix, None where rows have no labels."""
    if not labels:
        if counted is not None:
            raise WireError(f"a verdict with {COUNTED} labels, where rows have none")
        return [None] * len(losses)
    expected = (len(losses), labels, labels)
    if counted is None or counted.dtype != torch.int64 or counted.shape != expected:
        raise WireError(f"a verdict without its {COUNTED}, expected {expected} whole numbers in int64")
    if bool(((counted < 0) | (counted >= 2**53)).any()) or [float(n) for n in counted.sum((1, 2)).tolist()] != [
        m.count for m in losses
    ]:
        raise WireError(f"a verdict whose {COUNTED} labels are not as many as its rows")
    return list(counted.numpy())


def _facts(head: Mapping[str, Any]) -> ClientFacts:
    train, held_out, test, targets = (heads.count(head, name) for name in ("train", "eval", "test", "targets"))
    return ClientFacts(train, held_out, test, targets, heads.text(head, "data", 100))
