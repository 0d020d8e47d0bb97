"""Batches made ahead of their use, by one thread, so that a device never waits for rows to be padded.

On a GPU the thread also puts them into pinned memory, from where copies run beside the computation. On a CPU the thread
would take from the cores that compute: there nothing is made ahead (`depth`).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")

DEPTH = {"cuda": 4}
"""Batches that wait, made, for a device of this type; none for others"""
_END = object()


def depth(device: torch.device) -> int:
    """Return how many batches to make ahead for a device."""
    return DEPTH.get(device.type, 0)


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """Yield the items in their order, up to `depth` of them made before they are asked for; 0: each when it is.

    What making one raises is raised where that one would have come. When the consumer stops early, or closes this
    generator, the thread ends after the item that it is at, and `items` is closed where it can be.
    """
    if depth < 1:
        yield from items
        return
    source = iter(items)
    pool = ThreadPoolExecutor(1, "sheepfold-ahead")
    made: deque[Future[object]] = deque()
    try:
        for _ in range(depth):
            made.append(pool.submit(next, source, _END))
        while (item := made.popleft().result()) is not _END:
            made.append(pool.submit(next, source, _END))
            yield item  # type: ignore[misc]  # what is not _END is an Item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if hasattr(source, "close"):
            source.close()
