"""A client's resident executor: takes messages from its SuperNode, answers them, and keeps the base loaded.

    SuperNode (this machine) ──▶ task ──▶ kind, charter, blob ──▶ Worker.answer ──▶ blob ──▶ SuperNode

Only the sheepfold that is installed here runs: what the server's bundle names or holds is never loaded. It survives its
SuperNode, whose successor listens at the same place; a task that died with the first is dropped.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sheepfold.errors import SheepfoldError
from sheepfold.flower.parcels import answer, opened
from sheepfold.flower.runtime import Dead, beat, pulled, token
from sheepfold.node.settings import NodeSettings

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.supercore.runtime import RuntimeHttpClient

NODE = "SHEEPFOLD_NODE"
"""The environment variable that holds the client's settings, as JSON"""
LOOK_S = 0.25
"""Between two questions for a task; they stay on this machine."""
ASKED = frozenset({"/flwr.proto.Runtime/AcquireTask"})
"""Calls that the secret is shown with"""
TOLD_S = 1.0
"""Between two looks at what the worker is doing"""

Tell = Callable[[Mapping[str, Any]], None]


class Answers(Protocol):
    """What answers messages: node/worker.py's Worker."""

    @property
    def state(self) -> Mapping[str, Any]:
        """What it is doing, for people."""

    def answer(self, charter: str, kind: str, blob: bytes) -> bytes:
        """Return what goes back."""


@dataclass(slots=True)
class Executor:
    """One client's."""

    address: str
    """host:port of the SuperNode, on this machine"""
    secret: bytes
    """What the SuperNode hands out tasks for"""
    worker: Answers
    tell: Tell
    _run: int | None = None
    """Flower's run whose messages are answered"""
    _next: str | None = None
    """Token of a task that was handed out already"""
    _asked: float = 0.0
    _lock: Any = field(default_factory=threading.Lock)

    def serve(self) -> None:
        """Answer messages, for ever."""
        import httpx

        threading.Thread(target=self._watch, name="state", daemon=True).start()
        with self._client(None) as desk:
            while True:
                with suppress(httpx.HTTPError):  # no SuperNode: it is starting, or was restarted over this task
                    if mine := self._next or token(desk):
                        self._next = None
                        with self._client(mine) as client:
                            self._work(client, desk)
                        continue
                time.sleep(LOOK_S)

    def _watch(self) -> None:
        """Tell what the worker is doing whenever that is something else."""
        told: Mapping[str, Any] = {}
        while True:
            if (now := dict(self.worker.state)) != told:
                self.tell({"state": now})
                told = now
            time.sleep(TOLD_S)

    def _client(self, task: str | None) -> "RuntimeHttpClient":
        """Return a client of the SuperNode's, with a task's token or, where there is none, the secret."""
        from flwr.supercore.interceptors import (
            RuntimeTokenHttpInterceptor,
            RuntimeVersionHttpInterceptor,
            SuperExecAuthHttpInterceptor,
        )
        from flwr.supercore.runtime import RuntimeHttpClient

        shown = (
            SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=ASKED)
            if task is None
            else RuntimeTokenHttpInterceptor(task)
        )
        version = RuntimeVersionHttpInterceptor("flwr-clientapp")
        return RuntimeHttpClient.from_server_address(self.address, True, None, interceptors=[version, shown])

    def _work(self, client: "RuntimeHttpClient", desk: "RuntimeHttpClient") -> None:
        """Take a task's message, answer it, and hand the answer over."""
        from flwr.common.constant import SubStatus
        from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
        from flwr.supercore.heartbeat import HeartbeatSender
        from flwr.supernode.runtime.run_clientapp import push_message

        beats = HeartbeatSender(lambda: beat(client))
        beats.start()
        ended, why = SubStatus.COMPLETED, ""
        try:
            context = client.PullTaskInput(PullTaskInputRequest()).context
            self._of_one_run(context.run_id)
            message = pulled(client, context.node_id, context.run_id, lambda: self._check(desk))
            push_message(client, self._reply(message), context)
        except Dead as dead:
            ended, why = SubStatus.FAILED, str(dead)
        finally:
            beats.stop()
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=ended, details=why))

    def _of_one_run(self, run: int) -> None:
        """Raise Dead for the first task of another run, and ask for a new SuperNode: the server will send it again.

        A SuperNode that held a message when its run ended hands on one answer too many, and then each one message late.
        """
        before, self._run = self._run, run
        if before not in (None, run):
            self.tell({"renew": True})
            raise Dead("it is the first of another run")

    def _check(self, desk: "RuntimeHttpClient") -> None:
        """Raise Dead where the SuperNode hands out another task: it is done with this one's message then.

        Called while a part of the message is missing: a SuperNode forgets to end the task of a run that ended then.
        """
        with self._lock:
            if self._next is None and time.monotonic() - self._asked > LOOK_S:
                self._asked, self._next = time.monotonic(), token(desk)
            if self._next is not None:
                raise Dead("its message never came whole")

    def _reply(self, message: "Message") -> "Message":
        """Return the answer to a message; of what went wrong only the kind goes back, and the rest stays here."""
        from flwr.app import Error, Message
        from flwr.common.constant import ErrorCode

        try:
            kind, charter, blob = opened(message.content)
            return Message(answer(self.worker.answer(charter, kind, blob)), reply_to=message)
        except Exception as error:
            traceback.print_exc()
            why = f"{type(error).__name__} on its machine, whose log says more"  # its own words may name data
            self.tell({"say": why})
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, why), reply_to=message)


def main(arguments: list[str]) -> int:
    """Be an executor: SuperNode's host:port, its secret's file, the number of the pipe that is told.

    The client's settings are in the environment, as its supervisor read them: its file may have been edited since.
    """
    from sheepfold.node.worker import Worker

    address, secret, pipe = arguments
    told = os.fdopen(int(pipe), "w", buffering=1)

    def tell(facts: Mapping[str, Any]) -> None:
        told.write(json.dumps(dict(facts)) + "\n")  # one write a line, from whichever thread

    try:
        settings = NodeSettings.model_validate_json(os.environ[NODE])
        worker = Worker(settings, lambda line: tell({"say": line}))
    except SheepfoldError as error:
        tell({"refused": " ".join(str(error).split())})
        return 2
    Executor(address, Path(secret).read_bytes(), worker, tell).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
