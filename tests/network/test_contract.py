"""What we use of Flower's inside, by name: a release that moves one of these fails here, and says which."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

pytest.importorskip("flwr")

import sheepfold.flower

HERE = Path(sheepfold.flower.__file__).parent


def imported() -> list[tuple[str, str]]:
    """Return every (module, name) that sheepfold/flower imports from flwr."""
    found = set()
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
                found |= {(str(node.module), alias.name) for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), imported())
def test_flower_has_what_we_import(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), f"flwr moved {module}.{name}"


ATTRIBUTES = {
    "flwr.superlink.grid:HttpGrid": ("_runtime_client", "node", "run"),
    "flwr.supercore.runtime:RuntimeHttpClient": (
        "AcquireTask", "PullTaskInput", "PushTaskOutput", "SendTaskHeartbeat", "GetNodes", "PushMessages",
        "PullMessages", "PushObject", "PullObject", "ConfirmMessageReceived", "from_server_address", "close",
    ),
    "flwr.supercore.control.control_http_client:ControlHttpClient": (
        "StartRun", "StopRun", "ListRuns", "ListNodes", "RegisterNode", "UnregisterNode", "from_server_address",
    ),
    "flwr.supernode.fleet_http_client:FleetHttpClient": ("DeactivateNode", "from_server_address"),
    "flwr.supercore.heartbeat:HeartbeatSender": ("start", "stop"),
    "flwr.supercore.error:FlowerError": ("from_json",),
}  # fmt: skip
"""What we call of what we import"""


@pytest.mark.parametrize(("where", "name"), [(where, name) for where, names in ATTRIBUTES.items() for name in names])
def test_flower_s_classes_have_what_we_call(where: str, name: str) -> None:
    module, _, kind = where.partition(":")
    found = getattr(importlib.import_module(module), kind)
    inside = inspect.getsource(found.__init__) if name == "node" else ""
    assert hasattr(found, name) or f"self.{name} =" in inside, f"flwr moved {where}.{name}"


FIELDS = {
    "message_pb2:ObjectTree": ("object_id", "children"),
    "message_pb2:PullObjectRequest": ("node", "run_id", "object_id"),
    "message_pb2:PullObjectResponse": ("object_found", "object_available", "object_content"),
    "message_pb2:PushObjectRequest": ("node", "run_id", "session_id", "object_id", "object_content"),
    "message_pb2:ConfirmMessageReceivedRequest": ("node", "run_id", "message_object_id"),
    "message_pb2:Message": ("metadata", "error"),
    "runtime_pb2:PushAppMessagesRequest": ("messages_list", "message_object_trees"),
    "runtime_pb2:PushAppMessagesResponse": ("message_ids", "session_id", "objects_to_push"),
    "runtime_pb2:PullAppMessagesResponse": ("messages_list", "message_object_trees"),
    "runtime_pb2:AcquireTaskRequest": ("supported_task_types",),
    "runtime_pb2:AcquireTaskResponse": ("task", "token"),
    "runtime_pb2:PushTaskOutputRequest": ("sub_status", "details"),
    "control_pb2:StartRunRequest": ("fab", "override_config"),
    "control_pb2:ListRunsResponse": ("run_dict",),
    "fleet_pb2:DeactivateNodeRequest": ("node_id",),
}
"""Of Flower's messages, what we write and read"""


@pytest.mark.parametrize("where", FIELDS)
def test_flower_s_messages_have_our_fields(where: str) -> None:
    module, _, kind = where.partition(":")
    fields = getattr(importlib.import_module(f"flwr.proto.{module}"), kind).DESCRIPTOR.fields_by_name
    assert set(FIELDS[where]) <= set(fields.keys()), f"flwr changed {where}"


def test_the_bundle_is_one_that_flower_takes_and_has_no_code_in_it() -> None:
    import io
    import zipfile

    from sheepfold.flower.bundle import bundle

    with zipfile.ZipFile(io.BytesIO(bundle())) as files:
        names = files.namelist()
    assert sorted(names) == [".info/CONTENT", "pyproject.toml"]
    assert len(bundle()) < 1000


def test_the_codes_of_errors_mean_what_we_take_them_for() -> None:
    from flwr.common.constant import ErrorCode

    from sheepfold.flower.mail import NOT_TO_BLAME

    names = (
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    )
    assert tuple(NOT_TO_BLAME) == names


def test_a_supernode_says_by_which_words_it_is_in_or_out() -> None:
    from flwr.supercore.error import ApiErrorCode
    from flwr.supernode import start_client_internal

    from sheepfold.flower import client

    assert client.JOINED in inspect.getsource(start_client_internal)
    assert f"code: {int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)}" == client.HELD
