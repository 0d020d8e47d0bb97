"""Flower's Runtime API at a client's end: its SuperNode, on the same machine, hands out a task for each message."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.supercore.runtime import RuntimeHttpClient

FIRST_PULL_S, LONGEST_PULL_S = 0.05, 1.0
"""Pauses while a message is still on its way to the SuperNode"""


class Dead(Exception):
    """A task whose message will never be whole: its run ended while it was on its way."""


def token(desk: "RuntimeHttpClient") -> str | None:
    """Return the token of a task that waits, None where none does."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType

    found = desk.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
    return str(found.token) if found.HasField("task") and found.token else None


def pulled(client: "RuntimeHttpClient", node_id: int, run_id: int, check: Callable[[], None]) -> "Message":
    """Return a task's message; check is called while a part is missing. Raises Dead where it will never be whole."""
    from flwr.app import Message
    from flwr.proto.node_pb2 import Node
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest
    from flwr.supercore.inflatable.inflatable_protobuf_utils import (
        make_confirm_message_received_fn_protobuf,
        make_pull_object_fn_protobuf,
    )
    from flwr.supercore.inflatable.inflatable_utils import (
        ObjectPullError,
        ObjectUnavailableError,
        pull_and_inflate_object_from_tree,
    )

    node = Node(node_id=node_id)
    trees = client.PullMessages(PullAppMessagesRequest()).message_object_trees
    if not trees:
        raise Dead("its message is gone")
    take = make_pull_object_fn_protobuf(client.PullObject, node, run_id)

    def pull(name: str) -> bytes:
        try:
            return take(name)
        except ObjectUnavailableError:
            check()
            raise

    try:
        message = pull_and_inflate_object_from_tree(
            trees[0],
            pull,
            make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run_id),
            return_type=Message,
            initial_backoff=FIRST_PULL_S,
            backoff_cap=LONGEST_PULL_S,
            max_tries_per_object=None,
            max_time=None,
        )
    except ObjectPullError:
        raise Dead("a part of its message is gone") from None
    message.metadata.__dict__["_message_id"] = trees[0].object_id
    return message


def beat(client: "RuntimeHttpClient") -> bool:
    """Tell the SuperNode that its task is being worked on; return whether it heard."""
    import httpx
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.TransportError:
        return False
    except httpx.HTTPStatusError:
        return True  # a SuperNode that was restarted does not know the task, and never will
    return True
