"""A client's machine that attacks its server: an honest client's, whose executor spoils what the worker answers.

python evil.py node.yaml      round 1 is honest, then one attack a round, in the order of ATTACKS
"""

import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sheepfold.flower import client as machine
from sheepfold.flower import executor
from sheepfold.node.settings import read_node
from sheepfold.node.worker import Worker
from sheepfold.wire.blob import read, write
from sheepfold.wire.packing import ADAPTER


def remade(blob: bytes, change: Callable[[str, torch.Tensor], torch.Tensor] | None = None, **said: Any) -> bytes:
    """Return a message whose adapter, or whose head, is another, with the hash that goes with it."""
    known, tensors = read(blob)
    if change is not None:
        tensors = {name: change(name, t) if name.startswith(ADAPTER) else t for name, t in tensors.items()}
    return write({**known, **said}, tensors)


def wider(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a pair of one rank more."""
    kind = name.rpartition("/")[2]
    side = {"A": 0, "B": 1}.get(kind)
    return tensor if side is None else torch.cat([tensor, tensor.narrow(side, 0, 1)], side).contiguous()


ATTACKS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "wrong shapes": lambda blob, first: remade(blob, lambda name, t: t.reshape(-1)),
    "not finite": lambda blob, first: remade(blob, lambda name, t: torch.full_like(t, float("nan"))),
    "huge norm": lambda blob, first: remade(blob, lambda name, t: t + 1e4),
    "wrong rank": lambda blob, first: remade(blob, wider),
    "truncated": lambda blob, first: blob[: len(blob) // 2],
    "a header of 10 GB": lambda blob, first: struct.pack("<Q", 10 * 2**30) + blob[8:],
    "another's name": lambda blob, first: remade(blob, client="ann"),
    "replayed": lambda blob, first: first,
    "too long": lambda blob, first: blob + bytes(range(256)) * 2**20,
    "no message": lambda blob, first: b"\x80\x04\x95 a pickle",
}
"""Name -> what is sent for (this round's update, the first round's)"""


class Evil:
    """A worker that attacks from the second round on."""

    def __init__(self, honest: Worker) -> None:
        """Take an honest one."""
        self.honest = honest
        self.first = b""

    def answer(self, charter: str, kind: str, blob: bytes) -> bytes:
        """Return what is sent instead of the honest answer."""
        said = self.honest.answer(charter, kind, blob)
        if kind != "train":
            return said
        if not self.first:
            self.first = said
            return said
        return list(ATTACKS.values())[read(blob)[0]["round"] - 1](said, self.first)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.honest, name)


def main(arguments: list[str]) -> int:
    """Be the machine, or, with the executor's own arguments, its executor."""
    if len(arguments) > 1:
        honest = Worker
        sys.modules["sheepfold.node.worker"].Worker = lambda *a: Evil(honest(*a))  # type: ignore[attr-defined]
        return executor.main(arguments)
    started = machine.Client.__init__

    def with_evil_executor(self: machine.Client, *given: Any) -> None:
        started(self, *given)
        words = self.executor.command
        self.executor.command = lambda: [sys.executable, __file__, *words()[3:]]

    machine.Client.__init__ = with_evil_executor  # type: ignore[method-assign]
    machine.run(read_node(arguments[0]), partial(print, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
