"""The same page while runs go on: served, rebuilt when a run's folder changes, and taken over by the open page."""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from sheepfold.errors import ConfigError, SheepfoldError
from sheepfold.report import page, words
from sheepfold.report.compare import folders
from sheepfold.report.facts import RunFacts, read_run

WATCHED = ("experiment.yaml", "data.json", "rounds.jsonl", "closing.json", "adapter/adapter_config.json", "eval/*.json")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Watch:
    """Runs' folders, read again when one of their files changed; requests come from several threads."""

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = places
        self._lock = threading.Lock()
        self._read: tuple[str, Sequence[RunFacts]] = ("", ())
        self.runs()  # what cannot be read is an error before anything listens

    def version(self) -> str:
        """Return what changes when a watched file does."""
        seen = hashlib.sha256()
        for place in self.places:
            for file in sorted(found for pattern in WATCHED for found in place.glob(pattern)):
                told = file.stat()
                seen.update(f"{file}:{told.st_size}:{told.st_mtime_ns}\n".encode())
        return seen.hexdigest()[:16]

    def runs(self) -> tuple[str, Sequence[RunFacts]]:
        """Return the version and what it holds; raises SheepfoldError where a folder cannot be read now."""
        with self._lock:
            version = self.version()  # before reading: what comes in between is read again the next time
            if version != self._read[0]:
                self._read = version, [read_run(place) for place in self.places]
            return self._read

    def status(self) -> dict[str, Any]:
        """Return the version and lines on where the runs stand."""
        try:
            version, runs = self.runs()
        except (SheepfoldError, OSError) as error:  # a file caught half-way; the page keeps what it has
            return {"version": self._read[0], "status": [f"Not readable just now: {error}"]}
        return {"version": version, "status": words.statuses(runs, folders(runs), time.time())}


def app(watch: Watch, host: str) -> Starlette:
    """Return the application: the page, its content alone, and its version."""

    def answer(make: Callable[[], Response]) -> Response:
        try:
            return make()
        except (SheepfoldError, OSError) as error:
            return JSONResponse({"error": str(error)}, status_code=503, headers=HEADERS)

    def whole(_: Any) -> Response:
        def make() -> Response:
            version, runs = watch.runs()
            inside = page.content(runs, time.time())
            return HTMLResponse(page.whole(page.name(runs), inside, live=version), headers=HEADERS)

        return answer(make)

    def content(_: Any) -> Response:
        return answer(lambda: HTMLResponse(page.content(watch.runs()[1], time.time()), headers=HEADERS))

    def version(_: Any) -> Response:
        return JSONResponse(watch.status(), headers=HEADERS)

    # Another site's name that points here must not read the page through a visitor's browser.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"])
    routes = [Route("/", whole), Route("/content", content), Route("/version", version)]
    return Starlette(routes=routes, middleware=[hosts])


def serve(places: Sequence[Path], host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until interrupted; ready is told the address. Raises ConfigError where the port cannot be had."""
    import uvicorn

    served = app(Watch(places), host)
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{listening.getsockname()[1]}/")
    # A page that waits for its next look keeps a connection open: Ctrl-C does not wait for it.
    settings = uvicorn.Config(served, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(settings).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error}); try --port 0") from None
