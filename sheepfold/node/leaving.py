"""What will leave a data owner's machine, said before the first round: every tensor, every number, every byte.

It follows from an assignment and the experiment alone, so the owner can read it before anything trains; rows, tokens
and text are not in it, since no message has a place for them.
"""

import json
from dataclasses import asdict, dataclass

import torch

from sheepfold.config import Experiment
from sheepfold.messages import Assignment
from sheepfold.wire.dtypes import narrowed_specs
from sheepfold.wire.ends import Terms
from sheepfold.wire.foresight import STAGES, expected
from sheepfold.wire.packing import COUNTS, going_up, sent_bytes

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


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor that leaves."""

    name: str
    shape: tuple[int, ...]
    format: str
    bytes: int


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

    @property
    def bytes_at_most(self) -> int:
        """Return the bytes over all rounds, where this client is asked in each."""
        return self.bytes_a_round * self.rounds

    def as_json(self) -> str:
        """Return it as JSON, to be kept beside the ledger."""
        return json.dumps({**asdict(self), "bytes_at_most": self.bytes_at_most}, indent=1) + "\n"


def leaving(handed: Assignment, terms: Terms, experiment: Experiment) -> Leaving:
    """Return what this client will send for this assignment, and for those like it in later rounds."""
    update = expected(handed, terms, experiment.train.engine)
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
    )


def show(told: Leaving, most: int = 12) -> None:
    """Print it for people; `most` tensors by name, the rest counted."""
    from sheepfold.display import size
    from sheepfold.terminal import console, table

    view = table(f"what {told.client} would send each round", "tensor", "shape", "numbers", "bytes")
    for item in told.server_sees[:most]:
        view.add_row(item.name, " x ".join(map(str, item.shape)), item.format, f"{item.bytes:,}")
    if rest := told.server_sees[most:]:
        view.add_row(f"and {len(rest)} more", "", "", f"{sum(item.bytes for item in rest):,}")
    console().print(view)
    console().print(f"measurements: {', '.join(told.measurements)}")
    if told.stays:
        console().print(f"stays here: {len(told.stays)} tensors, such as {told.stays[0]}")
    if told.undeclared:
        console().print("and what its local rule adds, which it does not declare; the ledger counts it")
    bound = "" if told.bounded is None else f", each change shortened to a norm of {told.bounded:g}"
    console().print(
        f"{size(told.bytes_a_round)} a round, {size(told.bytes_at_most)} at most in {told.rounds} rounds{bound}; "
        "no rows, no tokens, no text"
    )


def _format(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
