"""FedAvg and FedIT: the fold against a dense mean, its weights, and who may use it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.config import Experiment, FederationSettings, build
from sheepfold.errors import AdapterMismatch, ConfigError
from sheepfold.messages import Measurements, Update
from sheepfold.metrics import Mean
from sheepfold.state import BatchPlan, ServerState
from sheepfold.strategies import strategy
from sheepfold.strategies.fedavg import fedavg, fedit


def an_update(client: str, seed: int, rows: int, rank: int = 2) -> Update:
    draw = torch.Generator().manual_seed(seed)
    pair = LoraPair(torch.randn(rank, 5, generator=draw), torch.randn(4, rank, generator=draw), 8.0)
    measured = Measurements(Mean(1.0, 1.0), rows, rows * 7, rows * 3, rows * 30, 2)
    return Update(client, Adapter({"q": pair}), measured)


def a_state() -> ServerState:
    return ServerState(4, an_update("", 99, 1).adapter, BatchPlan(1, 1, 1), memory={"kept": torch.ones(1)})


weights = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


@given(weights, st.sampled_from(["rows", "target_tokens", "processed_rows", "uniform"]))
def test_the_fold_is_the_weighted_mean_of_the_factors(rows, kind):
    updates = [an_update(f"c{i}", i, n) for i, n in enumerate(rows)]
    share = {"rows": 1, "target_tokens": 7, "processed_rows": 3}
    p = torch.tensor([1.0 if kind == "uniform" else n * share[kind] for n in rows], dtype=torch.float64)
    folded = fedavg(kind).fold(a_state(), iter(updates)).adapter.pairs["q"]
    for factor in ("A", "B"):
        every = torch.stack([getattr(u.adapter.pairs["q"], factor).double() for u in updates])
        expected = (p / p.sum())[:, None, None].mul(every).sum(0)
        torch.testing.assert_close(getattr(folded, factor).double(), expected, rtol=1e-6, atol=1e-7)


@given(weights)
def test_equal_clients_return_themselves(rows):
    updates = [an_update(f"c{i}", 5, n) for i, n in enumerate(rows)]
    folded = fedavg().fold(a_state(), iter(updates)).adapter
    torch.testing.assert_close(folded.pairs["q"].A, updates[0].adapter.pairs["q"].A)


def test_a_fold_advances_the_round_and_keeps_the_rest():
    state = fedavg().fold(a_state(), iter([an_update("ann", 1, 3)]))
    assert state.round == 5
    assert state.memory.keys() == {"kept"}


def test_unequal_ranks_are_refused_with_the_strategies_that_take_them():
    updates = [an_update("ann", 1, 3, rank=2), an_update("bob", 2, 3, rank=4)]
    with pytest.raises(AdapterMismatch, match=r"round 5, client 'bob', q/A: .*flora and flexlora accept mixed ranks"):
        fedavg().fold(a_state(), iter(updates))


def test_fedit_is_fedavg_with_adamw_clients():
    updates = [an_update("ann", 1, 3), an_update("bob", 2, 9)]
    assert fedit().fold(a_state(), updates).adapter.hash() == fedavg().fold(a_state(), updates).adapter.hash()
    fedit().check(Experiment())
    with pytest.raises(ConfigError, match="adamw"):
        fedit().check(build({"train": {"optimizer": "sgd"}}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "fedavgg"}, "did you mean 'fedavg'"),
        ({"strategy_args": {"mu": 1}}, "strategy_args.mu: no argument of fedavg"),
        ({"strategy": "nowhere:strategy"}, "no module 'nowhere'"),
        ({"strategy": "json:nothing"}, "has no 'nothing'"),
    ],
)
def test_a_strategy_that_is_not_there_is_one_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        strategy(FederationSettings(**settings))


def test_an_own_strategy_is_found_by_module_and_name():
    assert strategy(FederationSettings(strategy="tests.strategies.test_fedavg:own_strategy")).name == "fedavg"
    with pytest.raises(ConfigError, match="expected a Strategy"):
        strategy(FederationSettings(strategy="tests.strategies.test_fedavg:not_a_strategy"))


def own_strategy(weights):
    return fedavg("uniform")


def not_a_strategy(weights):
    return 3
