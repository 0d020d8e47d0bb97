"""Local rules: what a client does beside descending the loss of its rows.

A rule's penalty is written over a leading client axis, (K, ...) in and (K,) out, so one client (K = 1) and a cohort run
the same lines. What happens before and after the steps (`correction`, `finish`) is about one client, and is the same in
every engine.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sheepfold.adapter import Adapter
from sheepfold.errors import ConfigError
from sheepfold.messages import Assignment
from sheepfold.plugins import find

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Factors:
    """What trains, by flat name ('layers.0.q_proj/A'), with a leading client axis; smaller ranks padded with zeros."""

    now: Tensors
    """(K, ...) each"""
    start: Tensors
    """(K, ...) each: what a penalty looks back at, the start of the round unless the method says otherwise"""
    ranks: Tensors
    """module path -> (K,) int64: each client's own rank"""


@dataclass(frozen=True, slots=True)
class Trained:
    """What one client has when its steps are done."""

    adapter: Adapter
    own: Tensors
    """What it keeps for itself from round to round."""
    mean_gradient: Tensors = field(default_factory=dict)
    """Flat name -> mean of the clipped gradients of its good steps; only where the rule asks for it."""
    send: Tensors = field(default_factory=dict)
    """What goes to the server beside the adapter."""


Penalty = Callable[[Factors], Tensor]
"""(K,) in nats per target token: what each client minimises besides its loss. It must not mix clients."""
TensorRule = Callable[[Tensor, Tensor], Tensor]
"""A penalty of one tensor and its start, (K, ...) and (K, ...) -> (K,); it is called for every factor and added up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRule:
    """The client half of a method."""

    penalty: Penalty | None = None
    correction: Callable[[Assignment, Tensors], Tensors] | None = None
    """(assignment, own) -> flat name -> what is added to that tensor's gradient at every step, after clipping."""
    mean_gradient: bool = False
    finish: Callable[[Assignment, Trained], Trained] | None = None
    """What the client makes of its result: what goes back, what it keeps."""


def together(first: LocalRule, second: LocalRule) -> LocalRule:
    """Return both rules at once: penalties add up. Raises ConfigError where both correct gradients, or both finish."""
    for part in ("correction", "finish"):
        if getattr(first, part) and getattr(second, part):
            raise ConfigError(f"two local rules with a {part} of their own cannot run together; choose one")
    a, b = first.penalty, second.penalty
    both: Penalty | None = a or b
    if a is not None and b is not None:

        def both(factors: Factors) -> Tensor:
            return a(factors) + b(factors)

    return LocalRule(
        penalty=both,
        correction=first.correction or second.correction,
        mean_gradient=first.mean_gradient or second.mean_gradient,
        finish=first.finish or second.finish,
    )


def each_tensor(rule: TensorRule) -> Penalty:
    """Return the penalty that adds up `rule` over everything that trains."""

    def penalty(factors: Factors) -> Tensor:
        return torch.stack([rule(now, factors.start[name]) for name, now in factors.now.items()]).sum(0)

    return penalty


def proximal(local: Tensor, start: Tensor, mu: float) -> Tensor:
    """Return each client's distance penalty, mu/2 * ||local_k - start_k||^2.

    local: (K, ...), start: (K, ...), returns (K,), in nats per target token.
    Source: FedProx, arXiv:1812.06127, eq. 2; taken over A and B, since the base is frozen.
    """
    return mu / 2 * (local - start).square().flatten(1).sum(1)


RULES: Mapping[str, Callable[..., Tensor]] = {"proximal": proximal}


def local_rule(name: str, arguments: Mapping[str, Any]) -> LocalRule:
    """Return the rule with the penalty of this name, or of `module:rule`, with its arguments fixed.

    Raises ConfigError for unknown names, and for arguments that are missing or not taken.
    """
    rule: Callable[..., Tensor] = find(RULES, name, "train.local_rule")
    try:
        inspect.signature(rule).bind(torch.empty(0), torch.empty(0), **arguments)
    except TypeError as error:
        raise ConfigError(f"train.local_rule_args for {name!r}: {error}") from None
    return LocalRule(penalty=each_tensor(partial(rule, **arguments)))


def finished(rule: LocalRule | None, assignment: Assignment, trained: Trained) -> Trained:
    """Return what a client makes of its result under a rule, or the result as it is."""
    if rule is None or rule.finish is None:
        return trained
    return rule.finish(assignment, trained)
