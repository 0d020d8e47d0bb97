"""The routes: models, chat and plain completions, health.

    request ─ parse ─ order (tokenized, checked) ─ job ─▶ whole reply, or a stream of its chunks

A client that goes away takes its job with it, whichever way it asked.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from sheepfold.answering.model import Answering
from sheepfold.serve.faults import ApiError, internal, no_such_model, shown
from sheepfold.serve.gate import Gate, Receive, Scope, Send
from sheepfold.serve.limits import Limits
from sheepfold.serve.orders import Order, chat_order, completion_order
from sheepfold.serve.queue import Job, ModelQueue
from sheepfold.serve.replies import ChatReply, CompletionReply, Reply
from sheepfold.serve.schema import ChatRequest, CompletionRequest, Request, parse
from sheepfold.serve.tokens import TokenBytes

LOG = logging.getLogger("sheepfold.serve")
Asked = TypeVar("Asked", bound=Request)


class Service:
    """One model, its queue, and what replies need to know of it."""

    def __init__(self, answering: Answering, limits: Limits) -> None:
        self.answering, self.limits = answering, limits
        self.queue = ModelQueue(limits.waiting, limits.seconds)
        self.tokens = TokenBytes(answering.base.tokenizer)
        self.created = int(time.time())
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._fingerprints: dict[str, str] = {}

    def close(self) -> None:
        """Cancel all requests; called from the event loop."""
        self.queue.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    def models(self) -> list[dict[str, Any]]:
        """Return what can be asked, in OpenAI's shape, with the base and its positions."""
        return [self.model(name) for name in self.answering.names]

    def model(self, name: str) -> dict[str, Any]:
        """Return one of them. Raises ApiError (404)."""
        if name not in self.answering.names:
            raise no_such_model(name, self.answering.names)
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "sheepfold",
            "root": self.answering.base.name,
            "max_model_len": self.answering.max_positions,
        }

    async def order(self, order: Callable[[Asked, Answering, Limits], Order], request: Asked) -> Order:
        """Return the order for a request, tokenized off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, order, request, self.answering, self.limits)

    def fingerprint(self, name: str) -> str:
        """Return what tells these weights from others: of the base, and of the adapter; read once."""
        if name not in self._fingerprints:
            own = self.answering.source.adapter_hash(name)
            self._fingerprints[name] = f"fp_{self.answering.base.fingerprint[:12]}" + (f"_{own[:12]}" if own else "")
        return self._fingerprints[name]

    def work(self, order: Order) -> Any:
        """Yield the weights' fingerprint, then the order's pieces; runs in the model's thread."""
        yield self.fingerprint(order.model)
        yield from order.work(self.answering)


def build(answering: Answering, limits: Limits, token: str | None = None, hosts: frozenset[str] | None = None) -> Any:
    """Return the ASGI application, its `state.service` holding the queue.

    token: what callers must bear; hosts: what they may call the server, None: anything.
    """
    service = Service(answering, limits)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    app.add_middleware(Gate, limits=limits, token=token, hosts=hosts)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _unrouted)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": service.queue.waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return service.model(name)

    @app.post("/v1/chat/completions")
    async def chat(http: Http) -> Response:
        request = parse(await http.body(), ChatRequest)
        order = await service.order(chat_order, request)
        return await _answer(http, service, request, order, ChatReply)

    @app.post("/v1/completions")
    async def complete(http: Http) -> Response:
        request = parse(await http.body(), CompletionRequest)
        order = await service.order(completion_order, request)
        return await _answer(http, service, request, order, CompletionReply)

    return app


async def _answer(http: Http, service: Service, request: Request, order: Order, kind: type[Reply]) -> Response:
    job = service.queue.admit(lambda: service.work(order))
    watch = asyncio.create_task(_until_gone(http.receive, job))
    streamed = False
    try:
        pieces = job.pieces()
        reply = kind(order, service.tokens, await anext(pieces, ""))
        if not request.stream:
            async for piece in pieces:
                reply.take(piece)
            return JSONResponse(reply.whole())
        first = await anext(pieces, None)  # what fails before it still has a status of its own
        usage = request.stream_options is not None and request.stream_options.include_usage
        streamed = True
        return EventStream(_events(reply, first, pieces, usage), job, watch)
    finally:
        if not streamed:
            _leave(job, watch)


async def _events(reply: Reply, first: Any, pieces: AsyncIterator[Any], usage: bool) -> AsyncIterator[bytes]:
    """Yield server-sent events: chunks, then [DONE]; an error in between is an event too."""
    try:
        if first is not None:
            for chunk in reply.chunks(first, usage):
                yield _event(chunk)
            async for piece in pieces:
                for chunk in reply.chunks(piece, usage):
                    yield _event(chunk)
        if usage:
            yield _event(reply.last_chunk())
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    except Exception:
        id = secrets.token_hex(4)
        LOG.exception("%s: a stream failed", id)
        yield _event(internal(id).body())


class EventStream(Response):
    """A response that is written while its answer is."""

    def __init__(self, events: AsyncIterator[bytes], job: Job, watch: "asyncio.Task[None]") -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        self.status_code, self.background, self.body = 200, None, b""
        self.raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._events, self._job, self._watch = events, job, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            _leave(self._job, self._watch)


async def _until_gone(receive: Receive, job: Job) -> None:
    """Cancel the job when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _leave(job: Job, watch: "asyncio.Task[None]") -> None:
    watch.cancel()
    job.cancel()


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


async def _refused(_: Http, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _unrouted(http: Http, error: Exception) -> Response:
    """Answer what no route takes."""
    assert isinstance(error, HTTPException)
    path = shown(http.url.path)
    message = f"{http.method} {path}: {error.detail}; this server has /v1/chat/completions, /v1/completions, /v1/models"
    return await _refused(http, ApiError(error.status_code, message, headers=dict(error.headers or {})))
