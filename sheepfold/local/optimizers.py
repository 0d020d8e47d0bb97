"""Optimizers by name, built fresh for each round, and the step that leaves some clients out."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sheepfold.config import TrainSettings
from sheepfold.errors import ConfigError, suggest

ELEMENTWISE = frozenset({"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD"})
"""Optimizers whose update of a number depends on that number's own gradients alone, in proportion to the learning rate.

One of them, over all clients' stacked tensors, is the same as one for each client. Others couple numbers (LBFGS, Muon,
Adafactor) or use the rate otherwise (ASGD, Rprop)."""

NEEDS_MORE = {
    "LBFGS": "it evaluates the loss several times a step, which a clipped mini-batch step has no place for",
    "SparseAdam": "it takes sparse gradients, and an adapter's are dense",
}
"""Optimizers that neither engine can run, and why."""

Build = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the torch.optim class of this name, in any case of letters. Raises ConfigError for unknown names."""
    known = {
        n.lower(): c
        for n, c in vars(torch.optim).items()
        if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        raise ConfigError(f"train.optimizer: no {name!r} in torch.optim; {suggest(name.lower(), known)}")
    return known[name.lower()]


def build(train: TrainSettings, *, elementwise: bool) -> Build:
    """Return a function that makes this run's optimizer for some tensors and a peak learning rate.

    Raises ConfigError for unknown names and arguments, and, where `elementwise` is asked for, for optimizers that
    couple elements.
    """
    kind = optimizer_class(train.optimizer)
    if elementwise and kind.__name__ not in ELEMENTWISE:
        raise ConfigError(
            f"train.optimizer {kind.__name__}: the cohort engine takes element-wise optimizers "
            f"({', '.join(sorted(ELEMENTWISE))}); use train.engine peft_model for this one"
        )
    if kind.__name__ in NEEDS_MORE:
        raise ConfigError(f"train.optimizer {kind.__name__}: {NEEDS_MORE[kind.__name__]}; choose another")
    accepted = inspect.signature(kind.__init__).parameters
    own = {"foreach", "differentiable", "fused"} & train.optimizer_args.keys()
    args: dict[str, Any] = {"fused": True} if "fused" in accepted and not own else {}
    args |= {name: tuple(v) if isinstance(v, list) else v for name, v in train.optimizer_args.items()}
    if "weight_decay" in accepted:
        args["weight_decay"] = train.weight_decay
    elif train.weight_decay:
        raise ConfigError(f"train.weight_decay {train.weight_decay}: {kind.__name__} has none; set it to 0")
    if unknown := sorted(args.keys() - accepted.keys()):
        raise ConfigError(f"train.optimizer_args.{unknown[0]}: {kind.__name__} has no such argument")
    if elementwise and not float(args.get("eps", 1e-8)) > 0:
        raise ConfigError(f"train.optimizer_args.eps {args['eps']}: must be positive, padded ranks divide zero by it")

    def make(params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        try:
            return kind(params, **(args | {"lr": lr}))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"train.optimizer_args: {kind.__name__} refuses them: {error}") from None

    make([torch.zeros(2, 2, requires_grad=True)], train.lr)  # bad values are found now, not in round 1
    return make


@contextmanager
def keeping(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], skipped: Sequence[Tensor] | None
) -> Iterator[None]:
    """Leave some clients as they are through a step: their numbers and moments are put back afterwards.

    skipped holds one bool mask over the leading axis of each parameter; None leaves nobody out. The optimizer's step
    counter (Adam's bias correction) goes on for all: it counts a round's steps, not a client's good ones.
    """
    if skipped is None:
        yield
        return
    for p, rows in zip(params, skipped, strict=True):
        assert p.grad is not None
        p.grad[rows] = 0  # not a number times zero would stay
    before = [p.detach()[rows].clone() for p, rows in zip(params, skipped, strict=True)]
    moments = [
        {key: v[rows].clone() for key, v in moments_of(optimizer, p).items()}
        for p, rows in zip(params, skipped, strict=True)
    ]
    yield
    with torch.no_grad():
        for p, rows, old, old_moments in zip(params, skipped, before, moments, strict=True):
            p[rows] = old
            for key, v in moments_of(optimizer, p).items():
                v[rows] = old_moments.get(key, torch.zeros_like(v[rows]))


@contextmanager
def standing_still(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> Iterator[None]:
    """Leave all parameters and moments as they are through a step: `keeping`, where there is one client."""
    for p in params:
        assert p.grad is not None
        p.grad = torch.zeros_like(p.grad)  # not a number times zero would stay
    before = [p.detach().clone() for p in params]
    moments = [{key: v.clone() for key, v in moments_of(optimizer, p).items()} for p in params]
    yield
    with torch.no_grad():
        for p, old, old_moments in zip(params, before, moments, strict=True):
            p.copy_(old)
            for key, v in moments_of(optimizer, p).items():
                v.copy_(old_moments.get(key, torch.zeros_like(v)))


def moments_of(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """Return the optimizer's state that has the parameter's own shape: one number for each number."""
    state = optimizer.state.get(param, {})
    return {key: v for key, v in state.items() if isinstance(v, Tensor) and v.shape == param.shape}


def narrowed(old: torch.optim.Optimizer, param: Tensor, new: torch.optim.Optimizer, kept: Tensor) -> None:
    """Give `new`, built over kept = param[:k], the state that `old` had for the first k clients."""
    if param not in old.state:
        return
    k = kept.shape[0]
    own = moments_of(old, param)
    new.state[kept] = {key: v[:k] if key in own else v for key, v in old.state[param].items()}


def moments(train: TrainSettings) -> int:
    """Return how many numbers the run's optimizer keeps for each number that trains: two for Adam, none for SGD."""
    param = torch.zeros(2, 2)
    param.grad = torch.zeros(2, 2)
    optimizer = build(train, elementwise=False)([param], train.lr)
    optimizer.step()
    return len(moments_of(optimizer, param))
