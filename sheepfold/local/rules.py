"""Local rules: what a client minimises besides the loss of its rows.

A rule is a function of one stacked tensor and its start, (K, ...) and (K, ...), that returns a penalty for each
client, (K,), in the loss's unit (nats per target token). It is called for every A and every B and the results add up.
Written over the leading client axis, it serves one client (K = 1) and a cohort alike.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sheepfold.errors import ConfigError
from sheepfold.plugins import find

LocalRule = Callable[[Tensor, Tensor], Tensor]


def proximal(local: Tensor, start: Tensor, mu: float) -> Tensor:
    """Return each client's distance penalty, mu/2 * ||local_k - start_k||^2.

    local: (K, ...), start: (K, ...), returns (K,), in nats per target token.
    Source: FedProx, arXiv:1812.06127, eq. 2; taken over A and B, since the base is frozen.
    """
    return mu / 2 * (local - start).square().flatten(1).sum(1)


RULES: Mapping[str, Callable[..., Tensor]] = {"proximal": proximal}


def local_rule(name: str, arguments: Mapping[str, Any]) -> LocalRule:
    """Return the rule of this name, or of `module:rule`, with its arguments fixed.

    Raises ConfigError for unknown names, and for arguments that are missing or not taken.
    """
    rule: Callable[..., Tensor] = find(RULES, name, "train.local_rule")
    try:
        inspect.signature(rule).bind(torch.empty(0), torch.empty(0), **arguments)
    except TypeError as error:
        raise ConfigError(f"train.local_rule_args for {name!r}: {error}") from None
    return partial(rule, **arguments)
