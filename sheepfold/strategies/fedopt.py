"""FedOpt: the server takes a step of an optimizer of its own, with the clients' mean change as its gradient.

    D = mean - old,   m = b1 m + (1 - b1) D,   x = old + lr m / (sqrt(v) + tau)
        fedadam      v = b2 v + (1 - b2) D^2
        fedyogi      v = v - (1 - b2) D^2 sign(v - D^2)
        fedadagrad   v = v + D^2
    fedavgm:   m = b1 m + D,   x = old + lr m

`mean` is the adapter that the inner method folded (beside it, FedEx's residual is FedEx's own). Tensors that no client
sent this round, since they were frozen or private, rest, and so do their moments; and where the inner method changes
the adapter's form (SLoRA, Fed-SB), that round is its own, and the moments begin anew.

Sources: arXiv:2003.00295, Algorithm 2: v starts at tau^2 or more (`v0`), and nothing is corrected for bias; FedAvgM,
arXiv:1909.06335, section 4.3.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sheepfold.errors import ConfigError, suggest
from sheepfold.messages import Update
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, argument, not_together, parts_of

Number = float | None
THOSE = "fedavg, fedit, fedex, hetlora, heterolora, ffa_lora, rolora, fedsa, fed_sb"
"""The methods that average factors."""
Moments = Mapping[str, Tensor]
"""m, and v where the optimizer has one; nothing before the first step."""

SERVERS: Mapping[str, Mapping[str, Number]] = {
    "avgm": {"server_lr": 1.0, "beta1": 0.9},
    "adam": {"server_lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "v0": None},
    "yogi": {"server_lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "v0": None},
    "adagrad": {"server_lr": 1e-3, "beta1": 0.0, "tau": 1e-3, "v0": None},
}
"""Server optimizer -> its options and their defaults; v0 None: tau^2. An adaptive step is about server_lr a number."""


def around(
    server: str,
    of: Strategy,
    server_lr: Number = None,
    beta1: Number = None,
    beta2: Number = None,
    tau: Number = None,
    v0: Number = None,
) -> Strategy:
    """Return a method with this server optimizer; None: its default.

    fedavgm with beta1 0 and server_lr 1 is the inner method, to the bit. Raises ConfigError for options that the
    optimizer does not have, and for inner methods whose factors change coordinates.
    """
    name = f"fed{server}"
    options = _options(server, {"server_lr": server_lr, "beta1": beta1, "beta2": beta2, "tau": tau, "v0": v0})
    if of.averages != "factors":
        why = f"{parts_of(of)[-1]}'s factors change coordinates each round, and the optimizer's moments would not fit"
        raise not_together(name, of, f"{why}; {name} goes with {THOSE}")
    if any(f"fed{other}" in parts_of(of) for other in SERVERS):
        raise not_together(name, of, "two server optimizers; choose one")

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        heard: set[str] = set()
        folded = of.fold(state, _listening(updates, heard))
        old, mean = state.adapter.tensors(), folded.adapter.tensors()
        moved, memory = {}, {key: t for key, t in folded.memory.items() if not key.startswith("fedopt/")}
        memory |= {key: t for key, t in state.memory.items() if key.startswith("fedopt/") and _tensor(key) in mean}
        for flat in sorted(heard & old.keys() & mean.keys()):
            keys = {moment: f"fedopt/{moment}/{flat}" for moment in "mv"}
            D = mean[flat].double() - old[flat].double()
            change, now = step(server, options, D, {m: memory[key] for m, key in keys.items() if key in memory})
            moved[flat] = (mean[flat] + (change - D)).to(mean[flat].dtype)  # where change is D: the mean, to the bit
            memory |= {keys[moment]: t for moment, t in now.items()}
        return replace(folded, adapter=folded.adapter.holding(moved), memory=memory)

    return replace(of, name=f"{name} + {of.name}", fold=fold)


fedavgm, fedadam, fedyogi, fedadagrad = (partial(around, server) for server in SERVERS)


def fedopt(
    of: Strategy,
    server: str = "adam",
    server_lr: Number = None,
    beta1: Number = None,
    beta2: Number = None,
    tau: Number = None,
    v0: Number = None,
) -> Strategy:
    """Return one of the above by its server optimizer: avgm, adam, yogi or adagrad."""
    if server not in SERVERS:
        raise ConfigError(f"federation.strategy_args.server: no {server!r}; {suggest(str(server), SERVERS)}")
    return around(server, of, server_lr, beta1, beta2, tau, v0)


def step(server: str, o: Mapping[str, float], D: Tensor, had: Moments) -> tuple[Tensor, Moments]:
    """Return what one tensor changes by, x - old, and its next moments; all in float64."""
    if server == "avgm":
        m = o["beta1"] * had["m"] + D if had else D
        return o["server_lr"] * m, {"m": m}
    m = o["beta1"] * had.get("m", torch.zeros_like(D)) + (1 - o["beta1"]) * D
    v, square = had.get("v", torch.full_like(D, o["v0"])), D * D
    if server == "adam":
        v = o["beta2"] * v + (1 - o["beta2"]) * square
    elif server == "yogi":
        v = v - (1 - o["beta2"]) * square * torch.sign(v - square)
    else:
        v = v + square
    return o["server_lr"] * m / (v.sqrt() + o["tau"]), {"m": m, "v": v}


ABOVE_0: tuple[str, Callable[[float], bool]] = "a number above 0", lambda x: x > 0
NOT_BELOW_0: tuple[str, Callable[[float], bool]] = "a number of at least 0", lambda x: x >= 0
DECAY: tuple[str, Callable[[float], bool]] = "at least 0 and below 1", lambda x: 0 <= x < 1
BOUNDS = {"server_lr": ABOVE_0, "beta1": DECAY, "beta2": DECAY, "tau": ABOVE_0, "v0": NOT_BELOW_0}


def _options(server: str, asked: Mapping[str, Number]) -> dict[str, float]:
    """Return all options of a server optimizer, checked."""
    given = {name: value for name, value in asked.items() if value is not None}
    if unused := sorted(given.keys() - SERVERS[server].keys()):
        raise ConfigError(
            f"federation.strategy_args.{unused[0]}: fed{server} has none; it takes {', '.join(SERVERS[server])}"
        )
    options: dict[str, float] = {}
    for name, default in SERVERS[server].items():
        value = given.get(name, options["tau"] ** 2 if default is None else default)
        options[name] = argument(name, value, *BOUNDS[name])
    return options


def _listening(updates: Iterable[Update], heard: set[str]) -> Iterator[Update]:
    """Pass updates on, and write down which tensors travelled."""
    for update in updates:
        heard |= update.adapter.tensors().keys() - update.unsent
        yield update


def _tensor(key: str) -> str:
    """Return the flat name in a moment's key."""
    return key.split("/", 2)[2]
