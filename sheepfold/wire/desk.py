"""The server's end of one round: assignments become bytes, and what comes in is judged and made an update again.

    desk.blob(client) ──▶ bytes ──▶ the client ──▶ bytes ──▶ desk.take(client, bytes) ──▶ Update, Absence, or nothing

A bad message costs its client the round and nobody else: it becomes an absence with its reason. Nothing of a message is
kept, so memory does not grow with the number of clients; a client is heard once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Size, Tensor

from sheepfold.adapter import Adapter, LoraPair, from_delta
from sheepfold.errors import AdapterMismatch, WireError
from sheepfold.messages import Absence, Assignment, Update
from sheepfold.transforms.base import Parcel, inbound
from sheepfold.wire.checks import EXTRA_SHARE, check_finite, check_letter
from sheepfold.wire.dtypes import narrowed, shrinks, widened
from sheepfold.wire.ends import Terms, ranks_sent, starts
from sheepfold.wire.heads import rejected
from sheepfold.wire.packing import (
    ADAPTER,
    DENSE,
    MEMORY,
    RUN,
    SIDE,
    Letter,
    absence_bytes,
    as_factors,
    going_down,
    pack,
    side_down,
)
from sheepfold.wire.unpacking import unpack_letter

HEAD_ROOM = 2**20
"""Bytes that an answer may take beside its numbers: names, measurements, a reason."""
BYTES_A_NUMBER = {"fp32": 8, "bf16": 2, "int8": 2}
"""The most that one takes; bases in float64 train in it, and int8 has its scales."""


class Desk:
    """One round at the server."""

    def __init__(self, assignments: Sequence[Assignment], terms: Terms, run: str = RUN) -> None:
        """Open a round with these assignments; run: the name that all messages of this run bear."""
        self.assignments = {a.client: a for a in assignments}
        self.terms = terms
        self.run = run
        self.heard: set[str] = set()
        self.left_out: list[str] = []
        """What came beside the first answer of each client of the cohort, and why it was left out."""
        self._rounded: dict[int, tuple[Tensor, dict[str, Tensor], Tensor]] = {}
        self._seen: dict[int, tuple[Adapter, Adapter]] = {}
        self._sides: dict[int, tuple[Adapter, dict[str, Tensor]]] = {}

    def blob(self, client: str) -> bytes:
        """Return the bytes of a client's assignment."""
        handed = self.assignments[client]
        sent: dict[str, Tensor] = {}
        tensors = going_down(replace(handed, side=Adapter())) | self._side_down(handed)
        for name, tensor in tensors.items():
            parts = self._round(tensor, handed)[0] if shrinks(tensor.dtype, handed.wire.down) else {"": tensor}
            sent |= {name + end: part for end, part in parts.items()}
        return pack(handed, self.run, sent)

    def most_bytes(self, client: str) -> int:
        """Return how many bytes a client's answer may have, so that a transport reads no more."""
        handed = self.assignments[client]
        trained = {name: tuple(t.shape) for name, t in handed.trained(self.terms.private).items()}
        beside = self.terms.declared(handed)
        numbers = [*trained.values(), *(what.shape for what in (beside or {}).values())]
        copies = 1 if beside is not None else 1 + EXTRA_SHARE
        return sum(Size(n).numel() for n in numbers) * copies * BYTES_A_NUMBER[handed.wire.up] + HEAD_ROOM

    def received(self, client: str) -> Assignment:
        """Return a client's assignment as it arrives there."""
        handed = self.assignments[client]
        if handed.wire.down == "fp32" and _in_rows(handed):
            return handed
        memory = {name: self._as_seen(t, handed) for name, t in handed.memory.items()}
        return replace(handed, adapter=self._adapter_seen(handed), side=self._side_seen(handed), memory=memory)

    def take(self, sender: str, data: bytes) -> Update | Absence | None:
        """Return what a client's bytes come to; None for what counts as nothing, see `left_out`.

        sender: who sent them, as the transport knows it.
        """
        if sender not in self.assignments or sender in self.heard:
            asked = "it has answered already" if sender in self.heard else "it was asked for nothing"
            self.left_out.append(f"{sender}: a message of {len(data):,} bytes, though {asked}")
            return None
        self.heard.add(sender)
        try:
            message, round = unpack_letter(data, self.run, self.most_bytes(sender))
            if isinstance(message, Absence):
                return self._excused(sender, message, round)
            return self._admitted(sender, message, len(data))
        except (WireError, AdapterMismatch) as error:
            return Absence(sender, rejected(error), sent_bytes=len(data))

    def admit(self, sender: str, message: Letter | Absence) -> Update | Absence:
        """Return what `take` makes of this message's bytes, without making them."""
        handed = self.assignments[sender]
        if isinstance(message, Absence):
            return replace(message, sent_bytes=absence_bytes(message, handed.round))
        size = message.sent_bytes
        try:
            return self._admitted(sender, message, size)
        except (WireError, AdapterMismatch) as error:
            return Absence(sender, rejected(error), sent_bytes=size)

    def _excused(self, sender: str, absence: Absence, round: int) -> Absence:
        if absence.client != sender or round != self.assignments[sender].round:
            raise WireError(f"an absence of {absence.client[:60]!r} in round {round + 1}")
        return absence

    def _admitted(self, sender: str, letter: Letter, size: int) -> Update:
        """Return the update of a letter; raise WireError or AdapterMismatch where it is not what was asked for."""
        handed = self.assignments[sender]
        check_letter(letter, handed, self.terms)
        check_finite(letter.tensors)
        ranks = ranks_sent(letter.tensors)
        start = starts(handed, letter.scales, ranks)
        seen = start if handed.wire.down == "fp32" else starts(self.received(sender), letter.scales, ranks)
        parcel = Parcel(sender, letter.round, letter.wire, letter.tensors, start, seen)
        arrived = inbound(self.terms.transforms, parcel).tensors
        check_finite({n: t for n, t in arrived.items() if t is not letter.tensors.get(n)})
        sent = {n.removeprefix(ADAPTER): t.contiguous() for n, t in arrived.items() if n.startswith(ADAPTER)}
        memory = {n.removeprefix(MEMORY): t for n, t in arrived.items() if n.startswith(MEMORY)}
        adapter = _whole(handed, sent, letter.scales)
        unsent = frozenset(handed.adapter.tensors()) - sent.keys()
        update = Update(sender, adapter, letter.measurements, memory, unsent, size)
        self.terms.admit(handed, update)
        return update

    def _adapter_seen(self, handed: Assignment) -> Adapter:
        """Return an adapter as clients see it; one value for all who are handed the same."""
        if id(handed.adapter) not in self._seen:
            seen = {name: self._as_seen(t, handed) for name, t in handed.sent().items()}
            self._seen[id(handed.adapter)] = handed.adapter, handed.adapter.holding(seen)
        return self._seen[id(handed.adapter)][1]

    def _side_seen(self, handed: Assignment) -> Adapter:
        """Return a side as clients see it."""
        if id(handed.side) not in self._seen:
            seen = {n.removeprefix(SIDE): self._as_seen(t, handed) for n, t in self._side_down(handed).items()}
            pairs = {
                path: LoraPair(seen[f"{path}/A"], seen[f"{path}/B"], pair.scale)
                if as_factors(pair)
                else from_delta(seen[f"{path}/{DENSE}"])
                for path, pair in handed.side.pairs.items()
            }
            self._seen[id(handed.side)] = handed.side, Adapter(pairs)
        return self._seen[id(handed.side)][1]

    def _side_down(self, handed: Assignment) -> dict[str, Tensor]:
        if id(handed.side) not in self._sides:
            self._sides[id(handed.side)] = handed.side, side_down(handed.side)
        return self._sides[id(handed.side)][1]

    def _as_seen(self, tensor: Tensor, handed: Assignment) -> Tensor:
        # bytes lie in rows, and products of numbers that lie otherwise have other last bits
        return self._round(tensor, handed)[1] if shrinks(tensor.dtype, handed.wire.down) else tensor.contiguous()

    def _round(self, tensor: Tensor, handed: Assignment) -> tuple[dict[str, Tensor], Tensor]:
        """Return a tensor as it travels down, by the ends of its names, and as it arrives."""
        if id(tensor) not in self._rounded:
            parts = narrowed({"": tensor}, handed.wire.down)
            self._rounded[id(tensor)] = tensor, parts, widened(parts, handed.wire.down)[""].to(tensor.dtype)
        _, parts, seen = self._rounded[id(tensor)]
        return parts, seen


def _in_rows(handed: Assignment) -> bool:
    """Return whether an assignment's numbers lie in memory as they do in bytes."""
    side = (t for pair in handed.side.pairs.values() for t in (pair.A, pair.B))
    return all(t.is_contiguous() for t in (*handed.sent().values(), *side, *handed.memory.values()))


def _whole(handed: Assignment, sent: Mapping[str, Tensor], scales: Mapping[str, float]) -> Adapter:
    """Return a client's whole adapter: what it sent, and what it did not as it was handed out."""
    adapter = handed.adapter.holding(sent)
    pairs = {path: replace(pair, scale=scales.get(path, pair.scale)) for path, pair in adapter.pairs.items()}
    return replace(adapter, pairs=pairs)
