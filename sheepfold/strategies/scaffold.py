"""SCAFFOLD: control variates take the clients' drift out of every local step.

    client k:   y <- y - lr (g(y) + c - c_k) at every step,   c_k+ = mean of its g over the steps
    server:     x = old + server_lr (mean - old),   c <- c + 1/N sum_k (c_k+ - c_k),   N clients in all

Source: SCAFFOLD, arXiv:1910.06378, Algorithm 1, option II. With SGD at a constant rate the mean gradient is the paper's
c_k - c + (x - y_k) / (steps lr). AdamW clients are our extension: the correction is added to the gradient that AdamW is
given, and the variates are means of gradients, not of AdamW's steps. Gradients are clipped before the correction. The
paper's clients all weigh the same (federation.weights: uniform).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sheepfold.adapter import kind
from sheepfold.config import Experiment
from sheepfold.errors import ConfigError
from sheepfold.local.rules import LocalRule, Tensors, Trained, together
from sheepfold.messages import Assignment, Update
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, argument, not_together, nothing, parts_of

VARIATE = "variate/"
"""Before a tensor's flat name: its control variate, of the server (ServerState.memory) or of a client (own)."""


def scaffold(of: Strategy, server_lr: float = 1.0) -> Strategy:
    """Return a method with control variates on everything that trains.

    Raises ConfigError for inner methods whose tensors are not, for all clients and rounds, the same numbers.
    """
    rate = argument("server_lr", server_lr, "a number above 0", lambda x: x > 0)
    if why := _unfit(of):
        raise not_together("scaffold", of, f"{why}; scaffold goes with fedavg, fedit, fedex, ffa_lora, rolora")
    rule = LocalRule(correction=correction, mean_gradient=True, finish=finish)

    def assign(state: ServerState, client: str, lr: float) -> Assignment:
        handed = of.assign(state, client, lr)
        c = {key: t for key, t in _variates(state.memory).items() if kind(key) not in handed.frozen}
        return replace(handed, memory={**handed.memory, **c})

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        sums: dict[str, Tensor] = {}
        folded = of.fold(state, _adding(updates, sums))
        old, mean = state.adapter.tensors(), folded.adapter.tensors()
        moved = {n: (t + (rate - 1) * (t.double() - old[n].double())).to(t.dtype) for n, t in mean.items()}
        c, N = _variates(state.memory), len(state.setting.clients)
        for name, change in sums.items():
            c[name] = (c.get(name, 0.0) + change / N).to(next(iter(mean.values())).dtype)
        return replace(folded, adapter=folded.adapter.holding(moved), memory={**folded.memory, **c})

    def check(experiment: Experiment) -> None:
        of.check(experiment)
        _check(experiment)

    def beside(handed: Assignment) -> dict[str, torch.Size]:
        return {VARIATE + name: t.shape for name, t in handed.trained(of.private).items()}

    local = together(of.local, rule) if of.local else rule
    name = f"scaffold + {of.name}"
    return replace(of, name=name, fold=fold, assign=assign, local=local, check=check, beside=beside)


def correction(assignment: Assignment, own: Tensors) -> Tensors:
    """Return c - c_k for everything that trains; a variate that is not there is zero."""
    c, c_k = _variates(assignment.memory), _variates(own)
    return {
        key.removeprefix(VARIATE): c.get(key, 0.0) - c_k.get(key, torch.tensor(0.0))
        for key in sorted(c.keys() | c_k.keys())
        if kind(key) not in assignment.frozen
    }


def finish(assignment: Assignment, trained: Trained) -> Trained:
    """Return what the client sends, c_k+ - c_k, and keeps, c_k+ beside what it kept before."""
    now = {VARIATE + name: gradient for name, gradient in trained.mean_gradient.items()}
    change = {name: t - trained.own.get(name, torch.zeros_like(t)) for name, t in now.items()}
    return replace(trained, own={**trained.own, **now}, send={**trained.send, **change})


def _variates(tensors: Tensors) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if name.startswith(VARIATE)}


def _adding(updates: Iterable[Update], sums: dict[str, Tensor]) -> Iterator[Update]:
    """Pass updates on, and add up their changes of variates, in float64."""
    for update in updates:
        for name, change in _variates(update.memory).items():
            sums[name] = sums[name] + change.double() if name in sums else change.double()
        yield update


def _unfit(of: Strategy) -> str:
    """Return why a method cannot have control variates; nothing where it can."""
    inner = parts_of(of)[-1]
    if of.beyond_peft:
        odd = "slora" if "slora" in parts_of(of) else inner
        return f"a variate belongs to one A or B for the whole run, and {odd} trains other tensors"
    if of.averages != "factors":
        return f"{inner}'s factors change coordinates each round, and a variate is a gradient in the last round's"
    if of.mixed_ranks:
        return f"{inner}'s clients may have other ranks, and a variate has the shape of its tensor"
    if of.private is not nothing:
        return f"{inner}'s clients keep tensors to themselves, for which the server has no variate"
    return ""


def _check(experiment: Experiment) -> None:
    train = experiment.train
    odd = {name for name in ("momentum", "nesterov", "weight_decay") if train.optimizer_args.get(name)}
    odd |= {"weight_decay"} if train.weight_decay else set()
    if train.optimizer.lower() not in ("sgd", "adamw"):
        raise ConfigError(
            f"federation.strategy scaffold: its steps are gradients plus a correction, found train.optimizer "
            f"{train.optimizer!r}; set it to sgd, as in the paper, or to adamw"
        )
    if train.optimizer.lower() == "sgd" and odd:
        raise ConfigError(
            f"federation.strategy scaffold: the paper's steps are plain SGD, found {sorted(odd)[0]}; set it to 0"
        )
    if experiment.personal.keep_local:
        raise ConfigError(
            "federation.strategy scaffold: the server has no variate for what stays with a client; remove "
            "personal.keep_local"
        )
