"""Flower's Runtime API at the server's end: what its Grid does, one chunk in memory at a time.

    push   Message ─ RecordDict ─ arrays ─ chunks of 5 MB ──▶ SuperLink
    read   chunks, counted as they come  ◀── SuperLink

The Grid's own push and pull hold a message several times in memory, and read whatever came.
"""

import io
import json
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sheepfold.network.transport import Lost
from sheepfold.wire.heads import plain

if TYPE_CHECKING:
    from flwr.app import RecordDict
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.proto.node_pb2 import Node
    from flwr.serverapp import Grid
    from flwr.supercore.runtime import RuntimeHttpClient

ANSWER_S = 7 * 24 * 3600.0
"""Flower drops a message that was not answered by then: longer than any round of training."""
UPLOAD_S = 240.0
"""An answer whose parts have not all come by then will not come: Flower waits 180 s for each part of an upload."""
NOT_TO_BLAME = {
    3: "its message was dropped",
    4: "its answer was dropped",
    5: "it left",
    8: "its executor died",
}
"""Flower's codes of errors of which a client is not the cause, in our words."""
LEAST_CHUNK = 2**20
"""Bytes of a chunk before the last one; Flower's have five times as many."""
LARGEST_LIST, CHUNK_NAMED = 4096, 256
"""Bytes that an array's description may take, and for each chunk: its hash of 64 digits, and its place"""
LONGEST = 300
"""Characters of a client's own words"""


@dataclass(frozen=True, slots=True)
class Mark:
    """An answer that Flower has, though perhaps not all of it yet."""

    tree: "ObjectTree"
    since: float = field(default_factory=time.monotonic)


class Mail:
    """One run's."""

    def __init__(self, link: "RuntimeHttpClient", node: "Node", run: int) -> None:
        """link: to the SuperLink, with the run's token; node: its own; run: Flower's number."""
        self._link, self._node, self._run = link, node, run

    @classmethod
    def of(cls, grid: "Grid") -> "Mail":
        """Return the mail of the ServerApp that this process is."""
        from flwr.superlink.grid import HttpGrid

        if not isinstance(grid, HttpGrid):
            raise TypeError(f"this release of Flower hands out a {type(grid).__name__}, expected an HttpGrid")
        return cls(grid._runtime_client, grid.node, grid.run.run_id)

    def online(self) -> frozenset[int]:
        """Return the nodes that Flower believes to be there; of those that died, for up to a minute."""
        from flwr.proto.runtime_pb2 import GetNodesRequest

        return frozenset(node.node_id for node in self._link.GetNodes(GetNodesRequest()).nodes)

    def push(self, node: int, record: "RecordDict") -> tuple[str, bool]:
        """Send a record to a node and return its ticket, and whether Flower took it."""
        from flwr.app import Message
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.runtime_pb2 import PushAppMessagesRequest
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )

        message = Message(record, dst_node_id=node, message_type="query", ttl=ANSWER_S)
        with no_object_id_recompute():
            ticket = str(message.object_id)
            message.metadata.__dict__["_message_id"] = ticket
            objects, tree = get_all_nested_objects(message), get_object_tree(message)
            bare = message_to_proto(remove_content_from_message(message))
            pushed = self._link.PushMessages(PushAppMessagesRequest(messages_list=[bare], message_object_trees=[tree]))
            stored = (self._stored(pushed.session_id, name, objects[name].deflate()) for name in pushed.objects_to_push)
            return ticket, bool(pushed.message_ids[0]) and all(stored)

    def _stored(self, session: str, name: str, content: bytes) -> bool:
        from flwr.proto.message_pb2 import PushObjectRequest

        part = PushObjectRequest(
            node=self._node, run_id=self._run, session_id=session, object_id=name, object_content=content
        )
        return bool(self._link.PushObject(part).stored)

    def look(self, tickets: Collection[str]) -> Iterator[tuple[str, Mark | Lost]]:
        """Yield which of these messages have answers; each answer is told of once."""
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest

        pulled = self._link.PullMessages(PullAppMessagesRequest(message_ids=sorted(tickets)))
        for message, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
            ticket = message.metadata.reply_to_message_id
            if message.HasField("error"):
                self.drop(Mark(tree))
                yield ticket, _lost(message.error.code, message.error.reason)
            elif ticket in tickets:
                yield ticket, Mark(tree)

    def read(self, mark: Mark, most_bytes: int) -> bytes | Lost | None:
        """Return an answer's bytes, None where they have not all come yet; what is too large is not read."""
        try:
            blob = self._blob(mark.tree, most_bytes)
        except _NotYet:
            if time.monotonic() - mark.since < UPLOAD_S:
                return None
            blob = Lost("its answer came in part only", again=True)
        except _Gone:
            blob = Lost(NOT_TO_BLAME[4], again=True)
        self.drop(mark)
        return blob

    def drop(self, mark: Mark) -> None:
        """Let Flower forget an answer."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest

        self._link.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self._node, run_id=self._run, message_object_id=mark.tree.object_id)
        )

    def _blob(self, tree: "ObjectTree", most_bytes: int) -> bytes | Lost:
        """Read an answer: message, record, arrays, array, each with one child, and the array's chunks."""
        self._pull(tree.object_id)  # goes up last: where it is there, so is the rest
        for _ in range(3):
            if len(tree.children) != 1:
                return Lost(f"an answer of {len(tree.children)} parts, expected 1", again=False)
            tree = tree.children[0]
        content, most_chunks = self._pull(tree.object_id), most_bytes // LEAST_CHUNK + 2
        if len(content) > LARGEST_LIST + most_chunks * CHUNK_NAMED:
            return Lost(f"an answer whose list of parts has {len(content):,} bytes", again=False)
        try:
            chunks = _chunks(content)
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            return Lost("an answer that is no array of bytes", again=False)
        if len(chunks) > most_chunks:
            return Lost(f"an answer in {len(chunks):,} parts, too many for {most_bytes:,} bytes", again=False)
        blob, last, part = io.BytesIO(), "", memoryview(b"")
        for name in chunks:
            if name != last:  # a chunk of zeros comes many times in a row
                last, part = name, _body(self._pull(name))
            if blob.tell() + len(part) > most_bytes:
                return Lost(f"an answer of more than {most_bytes:,} bytes, the most that was asked for", again=False)
            blob.write(part)
        return blob.getvalue()

    def _pull(self, name: str) -> bytes:
        from flwr.proto.message_pb2 import PullObjectRequest

        found = self._link.PullObject(PullObjectRequest(node=self._node, run_id=self._run, object_id=name))
        if not found.object_found:
            raise _Gone
        if not found.object_available:
            raise _NotYet
        return bytes(found.object_content)


class _NotYet(Exception):
    """A part that is still on its way."""


class _Gone(Exception):
    """A part that Flower has dropped."""


def _chunks(content: bytes) -> list[str]:
    """Return the names of an array's chunks in their order."""
    from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content

    kind, children, _ = get_object_head_values_from_object_content(content)
    if kind != "Array":
        raise ValueError(f"a {kind}")
    return [children[n] for n in json.loads(bytes(_body(content)))["arraychunk_ids"]]


def _body(content: bytes) -> memoryview:
    """Return what an object holds, after the line that says what it is."""
    return memoryview(content)[content.index(b"\x00") + 1 :]


def _lost(code: int, reason: str) -> Lost:
    if code in NOT_TO_BLAME:
        return Lost(NOT_TO_BLAME[code], again=True)
    return Lost(plain(reason, LONGEST).strip() or f"Flower's error {code}", again=False)
