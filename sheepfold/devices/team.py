"""The first process and those that work for it: what one asks and another answers, over a gloo group.

    first ── (kind, asked) ──▶ worker      load, begin, train, score, generate, end
    first ◀── (kind, told) ─── worker      answer ..., done; or failed

Only bytes of the CPU travel: updates are there already when they fold. So gloo is enough on GPUs too, and nothing here
waits for their streams.
"""

from collections.abc import Generator
from typing import Any

import torch

from sheepfold import errors, memory
from sheepfold.devices import group, values
from sheepfold.errors import SheepfoldError, TrainingError

OUT_OF_MEMORY = "OutOfMemoryError"


class Gone(Exception):
    """The process that one waited for has ended."""


class Team:
    """All processes, as one of them sees them."""

    def __init__(self, talking: Any) -> None:
        """talking: what `group.joined` gave."""
        self._group = talking

    @property
    def workers(self) -> range:
        """The ranks of those that work for the first process."""
        return range(1, group.world())

    def ask(self, worker: int, kind: str, asked: Any = None) -> None:
        """Ask a worker for something. Raises TrainingError where it is gone."""
        try:
            self.send(worker, (kind, asked))
        except Gone:
            raise _lost(worker) from None

    def answers(self, worker: int) -> Generator[Any, None, Any]:
        """Yield what a worker answers to what it was asked, one at a time; returns what it says at the end.

        Raises the error that it failed with, and TrainingError where it is gone.
        """
        while True:
            try:
                kind, told = self.receive(worker)
            except Gone:
                raise _lost(worker) from None
            if kind == "failed":
                raise failure(worker, *told)
            if kind == "done":
                return told
            yield told

    def send(self, to: int, value: Any) -> None:
        """Send a value to a process; waits until it is taken. Raises Gone where that has ended."""
        import torch.distributed as dist

        data = values.to_bytes(value)
        try:
            for part in (torch.tensor([len(data)]), data):
                dist.send(part, to, group=self._group)
        except RuntimeError as error:
            raise Gone(str(error)) from None

    def receive(self, source: int) -> Any:
        """Return the next value from a process. Raises Gone where that has ended."""
        import torch.distributed as dist

        length = torch.zeros(1, dtype=torch.int64)
        try:
            dist.recv(length, source, group=self._group)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(data, source, group=self._group)
        except RuntimeError as error:
            raise Gone(str(error)) from None
        return values.from_bytes(data)


def named(error: BaseException) -> tuple[str, str]:
    """Return what a worker tells of an error: its kind and its line."""
    line = " ".join(str(error).split()) or type(error).__name__
    return OUT_OF_MEMORY if memory.is_out_of_memory(error) else type(error).__name__, line


def failure(worker: int, kind: str, line: str) -> Exception:
    """Return the error of a worker, as one of this process: the same kind, with the place in its line."""
    text = f"process {worker} of {group.world()}: {line}"
    if kind == OUT_OF_MEMORY:
        return torch.OutOfMemoryError(text)
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, SheepfoldError):
        return known(text)
    return TrainingError(f"{text} ({kind}); its traceback is above")


def _lost(worker: int) -> TrainingError:
    return group.lost(f"process {worker} of {group.world()}")
