"""What a round's messages will weigh, before anything trained: the bytes follow from names, formats and shapes."""

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from sheepfold.messages import Assignment, Measurements, Update
from sheepfold.metrics import Mean
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy
from sheepfold.wire.ends import Terms
from sheepfold.wire.packing import sent_bytes

STAGES = {"cohort": ("data", "forward", "backward", "step"), "peft_model": ("train",)}
"""Engine -> the stages whose seconds its updates tell."""


def expected(handed: Assignment, terms: Terms, engine: str) -> Update:
    """Return an update as a client will return it, with the numbers that it was handed and measurements of nothing.

    What a strategy does not declare beside the adapter is not in it.
    """
    unsent = frozenset(handed.adapter.tensors()) - handed.trained(terms.private).keys()
    beside = {} if terms.beside is None else terms.beside(handed)
    memory: dict[str, Tensor] = {name: torch.zeros(shape) for name, shape in beside.items()}
    nothing = Measurements(Mean(), 0, 0, 0, 0, 0, seconds=dict.fromkeys(STAGES[engine], 0.0))
    return Update(handed.client, handed.adapter, nothing, memory, unsent)


def traffic(state: ServerState, made: Strategy, terms: Terms, engine: str, lr: float) -> Iterator[tuple[int, int]]:
    """Yield the bytes of each client's assignment and update in the round after this state."""
    cache: dict[tuple[int, int], tuple[int, int]] = {}
    for client in state.setting.clients:
        key = id(state.setting.ranks.get(client)), len(json.dumps(json.dumps(client)))
        if key not in cache:
            handed = made.assign(state, client, lr)
            answer = expected(handed, terms, engine)
            cache[key] = sent_bytes(handed), sent_bytes(answer, handed.wire.up, handed.round)
        yield cache[key]
