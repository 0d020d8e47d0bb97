"""HeteroLoRA: padded means of factors against numpy and against numbers worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.state import BatchPlan, ServerState, Setting
from sheepfold.strategies.heterolora import heterolora
from tests.strategies import cohorts as c

either = st.booleans()


def padded_mean(cohort: c.Cohort, name: str, handle_alpha: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of the zero-padded mean, each factor times sqrt(alpha / r) or raw."""
    d_in, d_out = c.SHAPES[name]
    widest = cohort.state.setting.widest[name]
    A, B = np.zeros((widest, d_in)), np.zeros((d_out, widest))
    for share, update in zip(cohort.rows / cohort.rows.sum(), cohort.updates, strict=True):
        pair = update.adapter.pairs[name]
        root = np.sqrt(cohort.state.setting.alpha / pair.rank) if handle_alpha else 1.0
        A[: pair.rank] += share * root * pair.A.double().numpy()
        B[:, : pair.rank] += share * root * pair.B.double().numpy()
    return A, B


@given(c.cohorts(), either)
def test_the_fold_is_the_mean_of_the_padded_factors(cohort, handle_alpha):
    folded = heterolora(handle_alpha).fold(cohort.state, iter(cohort.updates))
    for name, pair in folded.adapter.pairs.items():
        A, B = padded_mean(cohort, name, handle_alpha)
        np.testing.assert_allclose(pair.B.numpy(), B, rtol=0, atol=1e-5 * cohort.size)
        trained = A.any(axis=1)
        np.testing.assert_allclose(pair.A.numpy()[trained], A[trained], rtol=0, atol=1e-5 * cohort.size)
        assert pair.scale == (1.0 if handle_alpha else cohort.state.setting.alpha / pair.rank)


@c.few
@given(c.cohorts(), either)
def test_a_client_is_handed_the_product_of_the_leading_rows(cohort, handle_alpha):
    method = heterolora(handle_alpha)
    folded = method.fold(cohort.state, iter(cohort.updates))
    for client, ranks in cohort.state.setting.ranks.items():
        for name, found in c.deltas(method.assign(folded, client, 1e-3).adapter).items():
            A, B = padded_mean(cohort, name, handle_alpha)
            r = ranks[name]
            scale = 1.0 if handle_alpha else cohort.state.setting.alpha / r
            np.testing.assert_allclose(found, scale * B[:, :r] @ A[:r], rtol=0, atol=1e-4 * cohort.size)


def by_hand(handle_alpha: bool) -> tuple[LoraPair, LoraPair, LoraPair]:
    """Return the global pair, ann's and bob's, after a round of ann with rank 1 and bob with rank 2, alpha 4.

    ann: A = [[1, 0]], B = [[1], [0]], 1 row;   bob: A = [[0, 2], [4, 0]], B = [[2, 0], [0, 6]], 3 rows.
    """
    ann = LoraPair(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]), 4.0)
    bob = LoraPair(torch.tensor([[0.0, 2.0], [4.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 6.0]]), 2.0)
    fresh = LoraPair(torch.ones(2, 2), torch.zeros(2, 2), 2.0)
    setting = Setting(clients=("ann", "bob"), ranks={"ann": {"q": 1}, "bob": {"q": 2}}, widest={"q": 2}, alpha=4.0)
    state = ServerState(0, Adapter({"q": fresh}), BatchPlan(1, 1, 1), setting=setting)
    method = heterolora(handle_alpha)
    updates = [c.an_update("ann", Adapter({"q": ann}), 1), c.an_update("bob", Adapter({"q": bob}), 3)]
    folded = method.fold(state, updates)
    handed = [method.assign(folded, client, 1e-3).adapter.pairs["q"] for client in ("ann", "bob")]
    return folded.adapter.pairs["q"], handed[0], handed[1]


def test_without_handle_alpha_factors_are_averaged_raw_and_handed_out_raw():
    whole, ann, bob = by_hand(handle_alpha=False)
    # A: 1/4 [1 0; 0 0] + 3/4 [0 2; 4 0]; B: 1/4 [1 0; 0 0] + 3/4 [2 0; 0 6]
    assert whole.A.tolist() == [[0.25, 1.5], [3.0, 0.0]]
    assert whole.B.tolist() == [[1.75, 0.0], [0.0, 4.5]]
    assert (whole.scale, ann.scale, bob.scale) == (2.0, 4.0, 2.0)
    assert (ann.A.tolist(), ann.B.tolist()) == ([[0.25, 1.5]], [[1.75], [0.0]])
    assert torch.equal(bob.A, whole.A)
    assert torch.equal(bob.B, whole.B)


def test_with_handle_alpha_factors_carry_the_root_of_their_scale_there_and_back():
    whole, ann, bob = by_hand(handle_alpha=True)
    root = 2**0.5  # of bob's scale; ann's root is 2
    # A: 1/4 2 [1 0; 0 0] + 3/4 root [0 2; 4 0]; B: 1/4 2 [1 0; 0 0] + 3/4 root [2 0; 0 6]
    torch.testing.assert_close(whole.A, torch.tensor([[0.5, 1.5 * root], [3 * root, 0.0]]))
    torch.testing.assert_close(whole.B, torch.tensor([[0.5 + 1.5 * root, 0.0], [0.0, 4.5 * root]]))
    assert (whole.scale, ann.scale, bob.scale) == (1.0, 4.0, 2.0)
    torch.testing.assert_close(ann.A, whole.A[:1] / 2)
    torch.testing.assert_close(ann.B, whole.B[:, :1] / 2)
    torch.testing.assert_close(bob.A, whole.A / root)
    torch.testing.assert_close(bob.B, whole.B / root)


def test_the_two_differ():
    alpha, raw = (c.dense(by_hand(handle_alpha)[0]) for handle_alpha in (True, False))
    assert np.abs(alpha - raw).max() > 0.1


@pytest.mark.parametrize("handle_alpha", [True, False])
def test_a_large_client_can_train_its_whole_rank_after_a_round_of_small_ones(handle_alpha):
    c.every_rank_can_train(heterolora(handle_alpha))


@c.few
@given(c.cohorts())
def test_beginning_changes_the_form_of_the_fresh_adapter_and_not_its_product(cohort):
    begun = heterolora().begin(cohort.state)
    c.close(c.learned(begun), c.learned(cohort.state))
    assert all(pair.scale == 1.0 for pair in begun.adapter.pairs.values())
    assert heterolora(handle_alpha=False).begin(cohort.state) is cohort.state


@c.few
@given(c.cohorts(), either)
def test_the_order_of_arrival_leaves_the_fold_alone(cohort, handle_alpha):
    c.arrival_leaves_it_alone(heterolora(handle_alpha), cohort)


@c.few
@given(c.cohorts(), either)
def test_the_scale_of_the_weights_leaves_the_fold_alone(cohort, handle_alpha):
    c.scale_of_weights_leaves_it_alone(heterolora(handle_alpha), cohort)


@c.few
@given(c.cohorts(), either)
def test_equal_clients_return_themselves(cohort, handle_alpha):
    c.equal_clients_return_themselves(heterolora(handle_alpha), cohort)


@c.few
@given(c.cohorts(), either)
def test_heads_are_averaged(cohort, handle_alpha):
    c.whole_tensors_are_averaged(heterolora(handle_alpha), cohort, cohort.rows)


@c.few
@given(c.cohorts(), either)
def test_every_client_is_handed_its_own_ranks(cohort, handle_alpha):
    c.handed_out_as_declared(heterolora(handle_alpha), cohort)


@pytest.mark.parametrize("handle_alpha", [True, False])
def test_a_state_survives_the_disk(tmp_path, handle_alpha):
    state = c.a_state({"ann": {"q": 2, "v": 1}, "bob": {"q": 1, "v": 3}}, alpha=3.0)
    cohort = c.Cohort(state, c.updates_of(state, {"ann": 3, "bob": 8}, seed=2))
    c.survives_the_disk(heterolora(handle_alpha), cohort, tmp_path / "s")
