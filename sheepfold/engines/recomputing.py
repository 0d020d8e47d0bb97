"""Gradient checkpointing: a base's blocks keep their inputs alone, and run again in the backward pass.

It costs about a third more time and changes no number, so it begins where a forward pass that does not fit gets no
smaller (halving.py), and is planned from the start where not even the longest row fits otherwise (planning.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from sheepfold.adapter_methods import CACHED, SEEDS
from sheepfold.errors import ModelError


def can_recompute(model: Any, method: str = "lora") -> bool:
    """Return whether a transformers model's blocks can run again in the backward pass of this method.

    A prefix lies in the attention cache, which checkpointing drops; zeroth_order has no backward pass.
    """
    return bool(getattr(model, "supports_gradient_checkpointing", False)) and method not in (*CACHED, SEEDS)


@contextmanager
def recomputing(models: Sequence[Any], on: bool) -> Iterator[None]:
    """Let the blocks of these models, which are in evaluation mode, run again in backward passes, where `on`.

    Raises ModelError for a base that cannot.
    """
    with ExitStack() as stack:
        for model in models if on else ():
            stack.enter_context(_recomputing(model))
        yield


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    if not can_recompute(model):
        raise ModelError(f"train.gradient_checkpointing: {type(model).__name__} cannot run its blocks again; remove it")
    config = model.config.get_text_config()
    cached = getattr(config, "use_cache", None)
    try:
        _switch(model, "enable")({"use_reentrant": False})
        if getattr(model, "_require_grads_hooks", None):  # for reentrant checkpoints; it would stay, one more each time
            model.disable_input_require_grads()
        if cached:
            config.use_cache = False  # transformers would say in each run that it does so
        _train_blocks(model, True)
        yield
    finally:
        _train_blocks(model, False)
        if cached:
            config.use_cache = cached
        _switch(model, "disable")()


def _train_blocks(model: Any, on: bool) -> None:
    """Set the mode of the blocks, which recompute in training mode only; not of their parts, which may draw in it."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = on


def _switch(model: Any, to: str) -> Callable[..., None]:
    """Return the model's own method, which later releases of transformers 5 name otherwise."""
    found: Callable[..., None] = getattr(model, f"activation_checkpointing_{to}", None) or getattr(
        model, f"gradient_checkpointing_{to}"
    )
    return found
