"""Assignments, updates, scores as they go between the processes of one run: exact values, as one tensor of bytes.

A pickle of what is no tensor, and every tensor's numbers behind it, once, however many values hold it: all clients of a
round mostly start from one adapter. Reading makes values of the classes listed here and of no others, so bytes from
elsewhere are an error and never code. The wire's own format (wire/) is for machines that do not trust each other: it
checks, hashes and repeats the adapter for each client.
"""

import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sheepfold.adapter import Adapter, LoraPair, SparseDelta
from sheepfold.config import GenerationSettings, TrainSettings
from sheepfold.errors import WireError
from sheepfold.messages import Absence, Assignment, Measurements, Update, Wire
from sheepfold.metrics import Mean, Score
from sheepfold.state import BatchPlan

CLASSES: tuple[type, ...] = (
    Absence, Adapter, Assignment, BatchPlan, LoraPair, Mean, Measurements, Score, SparseDelta, Update, Wire,
    bool, dict, float, int,
)  # fmt: skip
SETTINGS = (GenerationSettings, TrainSettings)
"""Sections of an experiment, which travel as the options that they were made of"""


def to_bytes(value: Any) -> Tensor:
    """Return a value as one tensor, (bytes,) uint8 on the CPU; tensors may lie on any device."""
    body = io.BytesIO()
    writer = _Writer(body)
    writer.dump(value)
    specs = [(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in writer.tensors]
    head = pickle.dumps((specs, body.getvalue()))
    length = torch.tensor([len(head)], dtype=torch.int64).view(torch.uint8)
    numbers = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in writer.tensors]
    return torch.cat([length, torch.frombuffer(bytearray(head), dtype=torch.uint8), *numbers])


def from_bytes(data: Tensor) -> Any:
    """Return the value of such bytes, its tensors on the CPU. Raises WireError for bytes of another kind."""
    at = 8 + int(data[:8].clone().view(torch.int64))
    specs, body = _Reader(io.BytesIO(data[8:at].numpy().tobytes()), []).load()
    tensors = []
    for name, shape in specs:
        dtype = getattr(torch, name)
        end = at + dtype.itemsize * torch.Size(shape).numel()
        tensors.append(data[at:end].clone().view(dtype).view(shape))  # a copy lies where its numbers may
        at = end
    return _Reader(io.BytesIO(body), tensors).load()


class _Writer(pickle.Pickler):
    """Pickles all but tensors, which it collects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._held: list[Any] = []

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return "tensor", self._number(value, value)
        if isinstance(value, np.ndarray):
            return "array", self._number(value, torch.from_numpy(np.ascontiguousarray(value)))
        if isinstance(value, SETTINGS):
            return type(value).__name__, value.model_dump(mode="json")
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.generic):
            return type(value.item()), (value.item(),)
        if isinstance(value, Mapping) and type(value) is not dict:
            return dict, (dict(value),)
        return NotImplemented

    def _number(self, value: Any, tensor: Tensor) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(tensor)
            self._held.append(value)  # while it lives, nothing else has its id
        return self._numbers[id(value)]


class _Reader(pickle.Unpickler):
    """Makes values of our own classes, with these tensors in them."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def find_class(self, module: str, name: str) -> Any:
        for known in CLASSES:
            if (known.__module__, known.__qualname__) == (module, name):
                return known
        raise WireError(f"a message between processes with a {module}.{name}; expected values of ours alone")

    def persistent_load(self, told: Any) -> Any:
        kind, what = told
        for section in SETTINGS:
            if kind == section.__name__:
                return section.model_validate(what)
        tensor = self._tensors[what]
        return tensor.numpy() if kind == "array" else tensor
