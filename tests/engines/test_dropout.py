"""Dropout by address: the right share, no pattern, and nothing but the address."""

import pytest
import torch

from sheepfold.engines.dropout import RowKeys, dropout


def kept(keys, p=0.25, shape=(40, 64), site=3) -> torch.Tensor:
    x = torch.ones(len(keys), *shape, dtype=torch.float64)
    return dropout(x, p, RowKeys(torch.tensor(keys)), site) != 0


KEYS = [derived * 0x2545F4914F6CDD1D % 2**62 for derived in range(1, 33)]


@pytest.mark.parametrize("p", [0.01, 0.05, 0.25, 0.5, 0.9])
def test_the_share_of_zeros_is_p_in_every_direction(p):
    mask = kept(KEYS, p, (128, 128)).double()
    assert float(1 - mask.mean()) == pytest.approx(p, abs=4 * (p * (1 - p) / mask.numel()) ** 0.5)
    for dims in ((0, 1), (0, 2), (1, 2)):
        part = mask.mean(dims)
        sigma = (p * (1 - p) / (mask.numel() / len(part))) ** 0.5
        assert float((part - (1 - p)).abs().max()) < 5 * sigma


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    x = torch.full((4, 8, 16), 3.0)
    out = dropout(x, 0.2, RowKeys(torch.tensor(KEYS[:4])), 0)
    assert sorted(set(out.flatten().tolist())) == pytest.approx([0.0, 3.0 / 0.8])


def test_neighbours_are_not_alike():
    mask = kept(KEYS, 0.5, (128, 128)).double() * 2 - 1
    sigma = mask.numel() ** -0.5
    pairs = [(mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1])]
    pairs.append((mask, kept(KEYS, 0.5, (128, 128), site=4).double() * 2 - 1))
    for left, right in pairs:
        assert abs(float((left * right).mean())) < 5 * sigma


def test_a_row_has_its_mask_in_any_batch_at_any_length_and_flattened():
    whole = kept(KEYS)
    assert torch.equal(kept(KEYS[7:9], shape=(25, 64)), whole[7:9, :25])
    flat = dropout(torch.ones(32 * 40, 64), 0.25, RowKeys(torch.tensor(KEYS)), 3) != 0
    assert torch.equal(flat.view(32, 40, 64), whole)
