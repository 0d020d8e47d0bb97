"""FedProx: the penalty against its equation, and an inner method that stays what it was."""

import numpy as np
import pytest
import torch

from sheepfold.config import FederationSettings
from sheepfold.errors import ConfigError
from sheepfold.local.rules import Factors, LocalRule
from sheepfold.strategies import FOLDS, strategy
from sheepfold.strategies.fedavg import fedavg
from sheepfold.strategies.fedprox import fedprox
from tests.strategies.cohorts import same
from tests.strategies.returns import a_round, a_start, some_rounds


def factors(clients: int = 2) -> Factors:
    draw = torch.Generator().manual_seed(3)
    shapes = {"q/A": (2, 6), "q/B": (5, 2), "head/extra": (3,), "v/values": (4,), "v/core": (2, 2)}
    now, start = (
        {n: torch.randn(clients, *shape, generator=draw, dtype=torch.float64) for n, shape in shapes.items()}
        for _ in range(2)
    )
    return Factors({n: t.requires_grad_() for n, t in now.items()}, start, {"q": torch.tensor([2] * clients)})


@pytest.mark.parametrize("mu", [0.0, 0.3, 7])
def test_each_client_pays_half_mu_times_its_own_squared_distance(mu):
    given = factors()
    paid = fedprox(fedavg(), mu).local.penalty(given).detach()
    for k in range(2):
        squares = [np.sum((t[k].detach() - given.start[n][k]).numpy() ** 2) for n, t in given.now.items()]
        assert float(paid[k]) == pytest.approx(mu / 2 * sum(squares))


def test_its_gradient_draws_back_to_the_start():
    given = factors()
    fedprox(fedavg(), 0.3).local.penalty(given).sum().backward()
    for name, now in given.now.items():
        torch.testing.assert_close(now.grad, 0.3 * (now.detach() - given.start[name]))


def test_mu_0_asks_for_nothing():
    given = factors()
    paid = fedprox(fedavg(), 0).local.penalty(given)
    paid.sum().backward()
    assert not paid.any()
    assert not any(now.grad.any() for now in given.now.values())


@pytest.mark.parametrize("inner", sorted(FOLDS.keys() - {"fedkseed"}))  # which folds no adapters
def test_any_method_folds_as_it_did(inner):
    of = FOLDS[inner]()
    method = fedprox(of, 0.1)
    assert method.name == f"fedprox + {of.name}"
    same(some_rounds(method, a_start(), 2), some_rounds(of, a_start(), 2))


def test_the_inner_methods_penalty_stays():
    of = LocalRule(penalty=lambda given: given.now["head/extra"].sum(1))
    method = fedprox(strategy(FederationSettings(), of), 0.2)
    given = factors()
    alone = fedprox(fedavg(), 0.2).local.penalty(given)
    torch.testing.assert_close(method.local.penalty(given), alone + given.now["head/extra"].sum(1))


def test_one_client_is_enough():
    method = fedprox(fedavg(), 0.1)
    same(a_round(method, a_start(), ["bob"]), a_round(fedavg(), a_start(), ["bob"]))


@pytest.mark.parametrize("mu", [-1, "much", None, True, float("nan"), float("inf"), [1]])
def test_a_mu_that_is_no_distance_is_one_line(mu):
    with pytest.raises(ConfigError, match=r"^federation.strategy_args.mu: found .*, expected a number of at least 0$"):
        fedprox(fedavg(), mu)


def test_yaml_reads_1e_2_as_text_and_it_counts_as_a_number():
    penalty = strategy(FederationSettings(strategy="fedprox", strategy_args={"mu": "1e-2"})).local.penalty
    torch.testing.assert_close(penalty(factors()), fedprox(fedavg(), 0.01).local.penalty(factors()))
