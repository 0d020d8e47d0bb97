"""What will leave a data owner's machine, said before the first round: every tensor, every number, every byte.

It follows from an assignment and the experiment alone, so the owner can read it before anything trains; rows, tokens
and text are not in it, since no message has a place for them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sheepfold.config import Experiment
from sheepfold.local.steps import steps_in_round
from sheepfold.messages import Assignment
from sheepfold.metrics import Mean, Score
from sheepfold.wire.dtypes import narrowed_specs
from sheepfold.wire.ends import Terms
from sheepfold.wire.exams import Verdict, pack_verdict
from sheepfold.wire.foresight import STAGES, expected
from sheepfold.wire.packing import COUNTS, going_up, sent_bytes

if TYPE_CHECKING:
    from sheepfold.assembly import Parts

MEANING = {
    "loss": "sum over the target tokens of a round's steps, in nats, and their number",
    "rows": "training rows here",
    "target_tokens": "their target tokens",
    "processed_rows": "rows that went through a step",
    "processed_tokens": "their tokens",
    "steps": "optimizer steps",
    "skipped_steps": "steps that were not taken",
    "why_skipped": "why the last of these was not",
}
"""Measurement -> what it says."""
SCORES = {
    "loss": "sum over the target tokens of this machine's held-out rows, in nats, and their number",
    "train, eval, test": "rows of each split",
    "targets": "target tokens of the training rows",
    "data": "a hash over rows, splits and tokens together, which changes when they do",
}
"""What every verdict on held-out rows says."""


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor that leaves."""

    name: str
    shape: tuple[int, ...]
    format: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Judging:
    """One kind of verdict on this client's held-out rows."""

    when: str
    times: int
    whom: tuple[str, ...]
    """Adapters that the rows judge"""
    metrics: tuple[str, ...]
    """Of answers that are generated here, each as a mean; the answers stay"""
    bytes: int
    says: dict[str, str]


@dataclass(frozen=True, slots=True)
class Leaving:
    """What one client sends in one round."""

    client: str
    server_sees: tuple[Item, ...]
    """Tensors, as they travel"""
    measurements: dict[str, str]
    stays: tuple[str, ...]
    """Tensors that train here and are never sent"""
    bytes_a_round: int
    """Of the whole message"""
    rounds: int
    bounded: float | None
    """The L2 norm that a round's change is shortened to"""
    undeclared: bool
    """Whether the strategy sends more than it declares; the ledger then has the bytes"""
    from_round: int = 1
    """Counted from 1; what leaves may take another form later, which is then said"""
    verdicts: tuple[Judging, ...] = ()
    """What it says of its held-out rows"""

    @property
    def bytes_at_most(self) -> int:
        """Return the bytes of all rounds and verdicts, where this client is asked in each."""
        return self.bytes_a_round * self.rounds + sum(judging.bytes * judging.times for judging in self.verdicts)

    def as_json(self) -> str:
        """Return it as JSON, to be kept beside the ledger."""
        return json.dumps({**asdict(self), "bytes_at_most": self.bytes_at_most}, indent=1) + "\n"


def leaving(handed: Assignment, terms: Terms, experiment: Experiment, parts: "Parts | None" = None) -> Leaving:
    """Return what this client will send for this assignment, and for those like it in later rounds.

    parts: of the run on this machine, for its verdicts; None: these are left out.
    """
    rows = len(parts.data.label_rows(handed.client, "train")) if parts else 0
    steps = steps_in_round(experiment.train, rows) if rows else None
    update = expected(handed, terms, experiment.train.engine, steps)
    specs = narrowed_specs(tuple((n, t.dtype, tuple(t.shape)) for n, t in going_up(update).items()), handed.wire.up)
    items = [Item(n, s, _format(d), torch.Size(s).numel() * d.itemsize) for n, d, s in specs]
    seconds = {f"seconds of {stage}": "of this client's share of a pass" for stage in STAGES[experiment.train.engine]}
    assert MEANING.keys() == {"loss", "why_skipped", *COUNTS}
    return Leaving(
        client=handed.client,
        server_sees=tuple(items),
        measurements=MEANING | seconds,
        stays=tuple(name for name in handed.adapter.tensors() if terms.private(name)),
        bytes_a_round=sent_bytes(update, handed.wire.up, handed.round),
        rounds=experiment.federation.rounds,
        bounded=experiment.federation.norm_bound,
        undeclared=terms.beside is None,
        from_round=handed.round + 1,
        verdicts=judgings(parts) if parts else (),
    )


def judgings(parts: "Parts") -> tuple[Judging, ...]:
    """Return the verdicts that a run asks this client for: its evaluations, and the last one."""
    from sheepfold import judging

    asked = parts.experiment
    total, every = asked.federation.rounds, asked.evaluation.every
    times = 1 + len({total, *(range(every, total + 1, every) if every else ())})
    labels = {"confusion": "how often each label was given for each"} if parts.task.labels else {}
    kinds: tuple[tuple[judging.Kind, str, int], ...] = (
        ("judge", "in an evaluation", times),
        ("close", "at the end", 1),
    )
    return tuple(
        Judging(when, times, tuple(whom), tuple(metrics), _verdict_bytes(parts, whom, metrics), SCORES | labels)
        for (kind, when, times) in kinds
        for whom, metrics in [judging.expected(parts, kind)]
    )


def _verdict_bytes(parts: "Parts", whom: Sequence[str], metrics: Sequence[str]) -> int:
    """Return the bytes of a verdict on these."""
    from sheepfold.judging import facts_of

    labels = len(parts.task.labels)
    table = np.zeros((labels, labels), dtype=np.int64) if labels else None
    means = {metric: dict.fromkeys(whom, Mean()) for metric in metrics}
    [client] = parts.data.clients
    last = parts.experiment.federation.rounds
    return len(pack_verdict(Verdict(client, last, dict.fromkeys(whom, Score(Mean(), table)), facts_of(parts), means)))


def form(told: Mapping[str, Any]) -> str:
    """Return what of a told leaving (as_json, read again) another one must have alike to be nothing new."""
    return json.dumps([told["server_sees"], told["stays"], sorted(told["measurements"]), told["verdicts"]])


def text(told: Leaving, most: int | None = None) -> str:
    """Return it for people; `most` tensors by name, the rest counted (None: all)."""
    from sheepfold.display import size

    shown, rest = told.server_sees[:most], told.server_sees[most:] if most is not None else ()
    rows = [(i.name, " x ".join(map(str, i.shape)), i.format, f"{i.bytes:,}") for i in shown]
    rows += [(f"and {len(rest)} more", "", "", f"{sum(i.bytes for i in rest):,}")] if rest else []
    lines = [f"What {told.client} sends in each round from round {told.from_round} on:", *_columns(rows)]
    lines.append(f"  measurements: {', '.join(told.measurements)}")
    if told.undeclared:
        lines.append("  and what its local rule adds, which it does not declare; the ledger counts it")
    for judging in told.verdicts:
        metrics = f", and {', '.join(judging.metrics)} of answers that stay here" if judging.metrics else ""
        times = f" ({judging.times} times)" if judging.times > 1 else ""
        lines.append(
            f"What it says of its held-out rows {judging.when}{times}, with the {' and the '.join(judging.whom)} "
            f"adapter: {', '.join(judging.says)}{metrics}; {size(judging.bytes)}"
        )
    if told.stays:
        lines.append(f"What stays here: {len(told.stays)} tensors that train, such as {told.stays[0]}")
    bound = "" if told.bounded is None else f", each change shortened to a norm of {told.bounded:g}"
    lines.append(
        f"{size(told.bytes_a_round)} a round, {size(told.bytes_at_most)} at most in {told.rounds} rounds{bound}; "
        "no rows, no tokens, no text. Where it cannot answer, one line says why."
    )
    return "\n".join(lines) + "\n"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows of text as aligned lines: names to the left, the rest to the right."""
    widths = [max(map(len, column), default=0) for column in zip(*rows, strict=True)]
    aligned = [[cell.rjust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, aligned, strict=True)]


def _format(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
