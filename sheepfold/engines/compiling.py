"""torch.compile for the blocks of a base while it trains: fewer kernels on a GPU, for a first step that takes a while.

All blocks share their code, so one is compiled and the others reuse it, and shapes are symbolic from the start: other
numbers of clients, rows and tokens compile nothing anew. One client left, or one row, makes a version of its own;
beyond torch's limit of eight a block runs as it is. So does the first block: its input needs no gradient, which would
double the versions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sheepfold.layers import layer_list


class Compiled:
    """A model's blocks, compiled, to be switched on while a pass trains.

    Evaluation and generation have other shapes and no gradients, and would only use up the versions.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        """options: torch.compile's own, such as backend. Raises ModelError where the blocks are not found."""
        blocks: Any = model.get_submodule(layer_list(model))
        self.calls = [(block, torch.compile(block._call_impl, dynamic=True, **options)) for block in blocks[1:]]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Call the compiled blocks."""
        for block, call in self.calls:
            block._compiled_call_impl = call
        try:
            yield
        finally:
            for block, _ in self.calls:
                block._compiled_call_impl = None
