"""Token rows end to end are the rows one after the other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.small import tokens


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("numbers", [[0], [7, 3, 3, 0, 11], list(range(60))])
def test_joined_rows_are_the_rows_one_after_the_other(numbers, train_on_inputs):
    rows = replace(tokens(), train_on_inputs=train_on_inputs)
    ids, labels, lengths = rows.joined(numbers)
    one_by_one = [rows.row(n) for n in numbers]
    assert torch.equal(torch.from_numpy(ids), torch.cat([ids for ids, _ in one_by_one]))
    assert torch.equal(torch.from_numpy(labels), torch.cat([labels for _, labels in one_by_one]))
    assert lengths.tolist() == [rows.length(n) for n in numbers]
    assert ids.dtype == labels.dtype == np.int64


def test_no_rows_are_no_tokens_and_labels_are_a_copy():
    rows = replace(tokens(), train_on_inputs=True)
    assert [len(part) for part in rows.joined([])] == [0, 0, 0]
    ids, labels, _ = rows.joined([2])
    labels[0] = -1
    assert ids[0] != -1
