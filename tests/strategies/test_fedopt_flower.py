"""FedOpt beside Flower's, over several rounds of the same clients; skipped where Flower is not installed.

They agree where both follow the papers. They differ in two places, and there the paper's equations, written out below,
side with ours: Flower starts v at 0, where arXiv:2003.00295 has tau^2 or more (Algorithm 2), and its FedAdam corrects
for bias, which Algorithm 2 does not; with the round counted one ahead, that is not Adam's correction either.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sheepfold.adapter import Adapter
from sheepfold.messages import Measurements, Update
from sheepfold.metrics import Mean
from sheepfold.state import BatchPlan, ServerState
from sheepfold.strategies.fedavg import fedavg
from sheepfold.strategies.fedopt import fedadagrad, fedadam, fedavgm, fedyogi

pytest.importorskip("flwr", reason="Flower is not installed")
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

ROWS = (7, 20, 3)
ROUNDS = 6
START = np.random.default_rng(0).normal(size=(3, 4))
LONG_AFTER = 10**6
"""A round in which the correction for bias has died out."""


def learned(place: np.ndarray, round: int) -> list[np.ndarray]:
    """Return what three clients learned that started here."""
    rng = np.random.default_rng(round)
    return [place + rng.normal(size=place.shape) * 0.1 for _ in ROWS]


def ours(method) -> list[np.ndarray]:
    state = ServerState(0, Adapter(extra={"w": torch.from_numpy(START)}), BatchPlan(1, 1, 1))
    places = []
    for round in range(ROUNDS):
        adapters = [Adapter(extra={"w": torch.from_numpy(t)}) for t in learned(state.adapter.extra["w"].numpy(), round)]
        updates = [
            Update(str(k), adapter, Measurements(Mean(1.0, 1.0), n, n, n, n, 1))
            for k, (adapter, n) in enumerate(zip(adapters, ROWS, strict=True))
        ]
        state = method.fold(state, updates)
        places.append(state.adapter.extra["w"].numpy())
    return places


def flowers(strategy, first_round: int = 1) -> list[np.ndarray]:
    place, places = START, []
    for round in range(ROUNDS):
        strategy.configure_train(first_round + round, ArrayRecord({"w": Array(place)}), ConfigRecord(), None)
        replies = [
            SimpleNamespace(
                content=RecordDict({"arrays": ArrayRecord({"w": Array(t)}), "m": MetricRecord({"num-examples": n})}),
                has_error=lambda: False,
            )
            for t, n in zip(learned(place, round), ROWS, strict=True)
        ]
        arrays, _ = strategy.aggregate_train(first_round + round, replies)
        place = arrays["w"].numpy()
        places.append(place)
    return places


def paper(server: str, v0: float, rate=lambda t: 0.05) -> list[np.ndarray]:
    """Algorithm 2 of arXiv:2003.00295, with a server rate for each round t = 1, 2, ..."""
    b1, b2, tau = (0.0 if server == "adagrad" else 0.9), 0.99, 1e-3
    x, m, v, places = START, 0.0, np.full_like(START, v0), []
    for round in range(ROUNDS):
        D = np.average(learned(x, round), axis=0, weights=ROWS) - x
        m = b1 * m + (1 - b1) * D
        v = {
            "adam": b2 * v + (1 - b2) * D**2,
            "yogi": v - (1 - b2) * D**2 * np.sign(v - D**2),
            "adagrad": v + D**2,
        }[server]
        x = x + rate(round + 1) * m / (np.sqrt(v) + tau)
        places.append(x)
    return places


FLOWERS = {"adam": FedAdam, "yogi": FedYogi, "adagrad": FedAdagrad}
OURS = {"adam": fedadam, "yogi": fedyogi, "adagrad": fedadagrad}


def close(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-12)


def far(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    assert np.abs(np.array(left) - np.array(right)).max() > 1e-3


@pytest.mark.parametrize(("rate", "momentum"), [(1.0, 0.0), (1.0, 0.9), (0.5, 0.7)])
def test_avgm_is_flowers(rate, momentum):
    theirs = FedAvgM(fraction_train=0.0, server_learning_rate=rate, server_momentum=momentum)
    close(ours(fedavgm(fedavg(), rate, momentum)), flowers(theirs))


@pytest.mark.parametrize("server", FLOWERS)
def test_from_a_v_of_0_and_without_correction_for_bias_they_are_flowers(server):
    theirs = FLOWERS[server](fraction_train=0.0, eta=0.05, tau=1e-3)
    close(ours(OURS[server](fedavg(), server_lr=0.05, v0=0)), flowers(theirs, LONG_AFTER))


@pytest.mark.parametrize("server", FLOWERS)
def test_as_they_come_ours_are_the_papers_and_flowers_are_not(server):
    mine, theirs = ours(OURS[server](fedavg(), server_lr=0.05)), flowers(FLOWERS[server](fraction_train=0.0, eta=0.05))
    close(mine, paper(server, v0=1e-3**2))
    assert np.abs(np.array(theirs) - np.array(mine)).max() > 1e-7


def test_flowers_adam_is_the_papers_with_v_from_0_and_a_correction_one_round_ahead():
    def ahead(t: int) -> float:
        return 0.05 * np.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))

    theirs = flowers(FedAdam(fraction_train=0.0, eta=0.05, beta_1=0.9, beta_2=0.99))
    close(theirs, paper("adam", 0, ahead))
    far(theirs, paper("adam", 0))
    far(theirs, paper("adam", 0, lambda t: 0.05 * np.sqrt(1 - 0.99**t) / (1 - 0.9**t)))  # Adam's, arXiv:1412.6980


def test_adams_correction_makes_the_first_step_the_rate_itself_and_flowers_does_not():
    # m = (1 - b1) D and v = (1 - b2) D^2, so with Adam's correction |x - old| = eta (tau is next to nothing beside D);
    # with the round one ahead it is eta sqrt(1 + b2) / (1 + b1)
    theirs = flowers(FedAdam(fraction_train=0.0, eta=0.05, beta_1=0.9, beta_2=0.99, tau=1e-12))
    np.testing.assert_allclose(np.abs(theirs[0] - START), 0.05 * np.sqrt(1.99) / 1.9, rtol=1e-6)
