"""Making batches ahead changes no batch, no order and no error, and leaves no thread behind."""

import threading
from collections.abc import Iterator

import pytest
import torch

from sheepfold.engines.batches import Row, batches
from sheepfold.engines.prefetch import ahead, depth
from tests.small import tokens


def threads() -> list[str]:
    """Return the names of the threads that make things ahead."""
    return [t.name for t in threading.enumerate() if t.name.startswith("sheepfold-ahead")]


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_batches_made_ahead_are_the_same_in_the_same_order(depth):
    rows, limits = tokens(), {"max_rows": 4, "max_tokens": 90}
    work = [Row(n, n % 3) for n in range(len(rows))]
    plain = list(batches(rows, work, **limits))
    made = list(ahead(batches(rows, work, **limits), depth))
    assert len(plain) == len(made) > 5
    for one, other in zip(plain, made, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.target, other.target)
        assert torch.equal(one.group, other.group)
    assert not threads()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_where_its_item_would_have_come(depth):
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("row 3 is damaged")

    running = ahead(items(), depth)
    assert [next(running), next(running)] == [1, 2]
    with pytest.raises(ValueError, match="row 3 is damaged"):
        next(running)
    assert not threads()


def test_nothing_beyond_the_depth_is_made_and_a_consumer_that_stops_ends_the_thread():
    made, closed = [], []

    def items() -> Iterator[int]:
        try:
            for n in range(1000):
                made.append(n)
                yield n
        finally:
            closed.append(True)

    running = ahead(items(), 3)
    assert next(running) == 0
    running.close()
    assert len(made) <= 4
    assert closed == [True]
    assert not threads()


def test_items_are_made_in_another_thread_while_the_consumer_works():
    other = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        other.set()  # reached before the second item was asked for
        yield 1

    running = ahead(items(), 1)
    assert next(running) == 0
    assert other.wait(timeout=30)
    assert list(running) == [1]


def test_a_cpu_makes_nothing_ahead():
    assert depth(torch.device("cpu")) == 0
    assert depth(torch.device("cuda:1")) > 0
