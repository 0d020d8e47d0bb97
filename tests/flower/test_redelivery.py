"""What a node is told again when the line swallowed an answer, and what it is not."""

import asyncio
from collections.abc import AsyncIterator

from sheepfold.flower.redelivery import Call, Redelivery

PULL: Call = ("/v1/fleet/pull-messages", b"node 7")
PUSH: Call = ("/v1/fleet/push-messages", b"an answer's head")
HEADERS = [(b"content-type", b"application/x-protobuf")]


def told(redelivery: Redelivery, call: Call, *pieces: bytes) -> bytes:
    """Return what a client hears when the SuperLink answers its call in these pieces."""

    async def upstream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def heard() -> bytes:
        return b"".join([piece async for piece in redelivery.kept("ann", call, HEADERS, upstream())])

    return asyncio.run(heard())


def test_a_call_that_is_repeated_gets_the_same_answer_as_often_as_it_takes() -> None:
    redelivery = Redelivery()
    assert redelivery.again("ann", PULL) is None
    assert told(redelivery, PULL, b"a mess", b"age") == b"a message"
    for _ in range(2):
        given = redelivery.again("ann", PULL)
        assert given is not None
        assert (given.body, given.headers) == (b"a message", HEADERS)


def test_a_client_that_goes_on_has_heard() -> None:
    redelivery = Redelivery()
    told(redelivery, PULL, b"a message")
    assert redelivery.again("ann", ("/v1/fleet/pull-object", b"")) is None
    assert redelivery.again("ann", PULL) is None


def test_a_heartbeat_says_nothing_of_what_arrived() -> None:
    redelivery = Redelivery()
    told(redelivery, PULL, b"a message")
    assert redelivery.again("ann", ("/v1/fleet/send-node-heartbeat", b"")) is None
    assert redelivery.again("ann", PULL) is not None


def test_another_answer_s_head_is_a_call_of_its_own() -> None:
    redelivery = Redelivery()
    told(redelivery, PUSH, b"send these parts")
    assert redelivery.again("ann", (PUSH[0], b"another's")) is None
    assert redelivery.again("ann", PUSH) is None


def test_a_pull_that_brought_nothing_and_another_client_s_are_asked_anew() -> None:
    redelivery = Redelivery()
    assert told(redelivery, PULL) == b""
    assert redelivery.again("ann", PULL) is None
    told(redelivery, PULL, b"a message")
    assert redelivery.again("bob", PULL) is None
