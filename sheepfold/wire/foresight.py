"""What a round's messages will weigh, before anything trained: the bytes follow from names, formats and shapes."""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sheepfold.messages import Assignment, Measurements, Update
from sheepfold.metrics import Mean
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy
from sheepfold.wire.ends import Terms
from sheepfold.wire.packing import sent_bytes

STAGES = {
    "cohort": ("data", "forward", "backward", "step"),
    "peft_model": ("train",),
    "zeroth_order": ("forward", "step"),
}
"""Engine -> the stages whose seconds its updates tell."""


def expected(handed: Assignment, terms: Terms, engine: str, steps: int | None = None) -> Update:
    """Return an update as a client will return it, with the numbers that it was handed and measurements of nothing.

    steps: the client's in a round, for what has a number a step (None: the most that may come). What a strategy does
    not declare beside the adapter is not in it.
    """
    unsent = frozenset(handed.adapter.tensors()) - handed.trained(terms.private).keys()
    memory: dict[str, Tensor] = {}
    for name, what in (terms.declared(handed) or {}).items():
        shape = (min(steps, what.shape[0]), *what.shape[1:]) if what.up_to and steps else what.shape
        memory[name] = torch.zeros(shape, dtype=what.dtype, device="meta")
    nothing = Measurements(Mean(), 0, 0, 0, 0, 0, seconds=dict.fromkeys(STAGES[engine], 0.0))
    return Update(handed.client, handed.adapter, nothing, memory, unsent)


def traffic(
    state: ServerState, made: Strategy, terms: Terms, engine: str, lr: float, steps: Mapping[str, int]
) -> Iterator[tuple[int, int]]:
    """Yield the bytes of each client's assignment and update in the round after this state; steps: of each client."""
    cache: dict[tuple[int, int, int], tuple[int, int]] = {}
    for client in state.setting.clients:
        key = id(state.setting.ranks.get(client)), len(json.dumps(json.dumps(client))), steps[client]
        if key not in cache:
            handed = made.assign(state, client, lr)
            answer = expected(handed, terms, engine, steps[client])
            cache[key] = sent_bytes(handed), sent_bytes(answer, handed.wire.up, handed.round)
        yield cache[key]
