"""Gradient checkpointing: a base's blocks keep their inputs alone, and run again in the backward pass.

It costs about a third more time and changes no number, so it begins where a forward pass that does not fit gets no
smaller (halving.py), and is planned from the start where not even the longest row fits otherwise (planning.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sheepfold.adapter_methods import CACHED, SEEDS


def can_recompute(model: Any, method: str = "lora") -> bool:
    """Return whether a transformers model's blocks can run again in the backward pass of this method.

    A prefix lies in the attention cache, which checkpointing drops; zeroth_order has no backward pass.
    """
    return bool(getattr(model, "supports_gradient_checkpointing", False)) and method not in (*CACHED, SEEDS)


@contextmanager
def recomputing(models: Sequence[Any], on: bool) -> Iterator[None]:
    """Let the blocks of these models run again in backward passes, where `on`; they do so in training mode alone."""
    if not on:
        yield
        return
    for model in models:
        _switch(model, "enable")({"use_reentrant": False})
    try:
        yield
    finally:
        for model in models:
            _switch(model, "disable")()


def _switch(model: Any, to: str) -> Callable[..., None]:
    """Return the model's own method, which later releases of transformers 5 name otherwise."""
    found: Callable[..., None] = getattr(model, f"activation_checkpointing_{to}", None) or getattr(
        model, f"gradient_checkpointing_{to}"
    )
    return found
