"""FedProx: clients stay near where they started; the fold is the inner method's.

    client k minimises   F_k(w) + mu/2 ||w - w_t||^2

Source: FedProx, arXiv:1812.06127, eq. 2. The norm is over what trains (A, B, a core, sparse values, heads), since the
base is frozen. mu = 0 is the inner method.
"""

from dataclasses import replace
from functools import partial

from sheepfold.local.rules import LocalRule, each_tensor, proximal, together
from sheepfold.strategies.base import Strategy, argument


def fedprox(of: Strategy, mu: float) -> Strategy:
    """Return a method with FedProx clients; mu >= 0, in nats per target token and squared distance."""
    mu = argument("mu", mu, "a number of at least 0", lambda x: x >= 0)
    near = LocalRule(penalty=each_tensor(partial(proximal, mu=mu)))
    return replace(of, name=f"fedprox + {of.name}", local=together(of.local, near) if of.local else near)
