"""Answers as the server reads them from Flower: whole, counted as they come, and never more than was asked for."""

import json
import os
import struct
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree

from sheepfold.flower import parcels
from sheepfold.flower.mail import Mail, Mark
from sheepfold.network.transport import Lost

MB = 2**20


class Store:
    """What a SuperLink holds, and how many bytes of it were read."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects, self.read, self.dropped = objects, 0, 0

    def PullObject(self, request: Any) -> PullObjectResponse:
        content = self.objects.get(request.object_id)
        self.read += len(content or b"")
        return PullObjectResponse(
            object_found=content is not None, object_available=bool(content), object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.dropped += 1


def sent(record: RecordDict) -> tuple[Store, Mark]:
    """Return what lies at a SuperLink when a client has sent this."""
    about = Metadata(1, "", 2, 1, "asked", "", 1.8e9, 60.0, "query")
    message = make_message(about, content=record)
    return Store({n: o.deflate() for n, o in get_all_nested_objects(message).items()}), Mark(get_object_tree(message))


def read(store: Store, mark: Mark, most_bytes: int) -> bytes | Lost | None:
    return Mail(store, Node(node_id=1), 1).read(mark, most_bytes)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 1, 7, 5 * MB, 12 * MB + 3])
def test_an_answer_arrives_as_it_was_sent_and_is_dropped_at_flower(length: int) -> None:
    blob = bytes(range(256)) * (length // 256) + b"x" * (length % 256)
    store, mark = sent(parcels.answer(blob))
    assert read(store, mark, length) == blob
    assert store.dropped == 1


def test_an_answer_of_zeros_is_read_once_for_each_piece_of_a_kind() -> None:
    store, mark = sent(parcels.answer(bytes(40 * MB)))
    assert read(store, mark, 40 * MB) == bytes(40 * MB)
    assert store.read < 6 * MB


def test_too_large_an_answer_is_not_read_further_than_it_may_be() -> None:
    store, mark = sent(parcels.answer(os.urandom(40 * MB)))
    found = read(store, mark, 8 * MB)
    assert isinstance(found, Lost)
    assert not found.again
    assert "more than 8,388,608 bytes" in found.reason
    assert store.read < 16 * MB
    assert store.dropped == 1


def of_array(content: bytes, chunks: dict[str, bytes]) -> tuple[Store, Mark]:
    """Return an answer whose array is whatever a hostile client wrote."""
    store, mark = sent(parcels.answer(b"x"))
    array = mark.tree.children[0].children[0].children[0]
    name = get_object_id(content)
    store.objects |= {name: content, **chunks}
    array.CopyFrom(ObjectTree(object_id=name, children=[ObjectTree(object_id=chunk) for chunk in chunks]))
    return store, mark


def array_of(names: list[str], order: Any) -> bytes:
    body = json.dumps({"dtype": "uint8", "shape": [1], "stype": "sheepfold", "arraychunk_ids": order}).encode()
    return f"Array {','.join(names)} {len(body)}".encode() + b"\x00" + body


EMPTY, FULL = "e" * 64, "f" * 64
CHUNKS = {EMPTY: b"ArrayChunk  0\x00", FULL: b"ArrayChunk  1048576\x00" + bytes(MB)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (array_of([FULL], [0] * 100_000), "parts"),
        (array_of([FULL], [0] * 9), "more than 8,388,608 bytes"),
        (array_of([EMPTY, FULL], [0, 1] * 50_000), "parts"),
        (array_of([FULL], [[]] * 100_000), "list of parts has 400,1"),
        (array_of([FULL], [7]), "no array"),
        (array_of([FULL], "0"), "no array"),
        (b"Array f 3\x00no!", "no array"),
        (b"ConfigRecord  2\x00{}", "no array"),
        (b"\xff\xff", "no array"),
    ],
)
def test_an_array_that_claims_more_than_it_has_costs_one_line(content: bytes, said: str) -> None:
    store, mark = of_array(content, CHUNKS)
    found = read(store, mark, 8 * MB)
    assert isinstance(found, Lost)
    assert said in found.reason
    assert not found.again
    assert store.read < 10 * MB


def test_an_answer_of_many_arrays_is_none() -> None:
    found = read(*sent(parcels.parcel("train", "{}", b"x" * 100)), 1000)
    assert isinstance(found, Lost)
    assert "2 parts" in found.reason


def test_an_answer_that_is_still_on_its_way_is_waited_for() -> None:
    store, mark = sent(parcels.answer(b"x" * 100))
    *_, chunk = (name for name, content in store.objects.items() if content.startswith(b"ArrayChunk"))
    whole, store.objects[chunk] = store.objects[chunk], b""
    assert read(store, mark, 100) is None
    store.objects[chunk] = whole
    assert read(store, mark, 100) == b"x" * 100


def test_an_answer_that_flower_has_dropped_may_be_asked_for_again() -> None:
    store, mark = sent(parcels.answer(b"x" * 100))
    store.objects.clear()
    assert read(store, mark, 100) == Lost("its answer was dropped", again=True)


def test_equal_numbers_for_many_clients_are_the_same_objects() -> None:
    body = os.urandom(12 * MB)

    def objects(client: str) -> set[str]:
        head = json.dumps({"client": client}).encode()
        store, _ = sent(parcels.parcel("train", "{}", struct.pack("<Q", len(head)) + head + body))
        return {name for name, content in store.objects.items() if len(content) > MB}

    assert objects("ann") == objects("a client of a longer name")
    assert len(objects("ann")) == 3


def test_a_parcel_opens_to_what_was_packed() -> None:
    for blob in (b"", b"short", struct.pack("<Q", 2**60) + b"x", struct.pack("<Q", 3) + b"abcdef"):
        assert parcels.opened(parcels.parcel("judge", '{"a": 1}', blob)) == ("judge", '{"a": 1}', blob)
