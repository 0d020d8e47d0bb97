"""One thread that runs the model, and the requests that wait for it.

    admit ─▶ job: waiting ─▶ running ─ piece, piece, ... ─▶ ended
               └── cancel: leaves the queue   └── cancel: the model stops after its current step

A job's pieces travel from the model's thread to the event loop and wait there, so that a slow reader never holds the
model up; there are no more of them than tokens asked for.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

from sheepfold.serve.faults import ApiError, timed_out

Work = Callable[[], Generator[Any, None, None]]
"""What the model's thread goes through, piece by piece; closing it stops the model."""


class _End:
    """The last thing a job says."""


_END = _End()


class Job:
    """One request's work, and what came of it so far."""

    def __init__(self, queue: "ModelQueue", work: Work, seconds: float) -> None:
        self._queue, self._work = queue, work
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Any] = asyncio.Queue()
        self._gone = threading.Event()
        self._seconds, self._deadline = seconds, self._loop.time() + seconds

    def cancel(self) -> None:
        """Stop the work, begun or not; what it has said so far can still be read."""
        self._gone.set()
        self._queue.forget(self)
        self._pieces.put_nowait(_END)

    async def pieces(self) -> AsyncIterator[Any]:
        """Yield the pieces as they come; raises what the work raised, or ApiError when the time is up."""
        while (piece := await self._next()) is not _END:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def _next(self) -> Any:
        if not self._pieces.empty():
            return self._pieces.get_nowait()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._pieces.get()
        except TimeoutError:
            self.cancel()
            raise timed_out(self._seconds) from None

    def run(self) -> None:
        """Do the work; called by the model's thread."""
        try:
            with contextlib.closing(self._work()) as pieces:
                for piece in pieces:
                    if self._gone.is_set():
                        break
                    self._say(piece)
        except Exception as error:  # travels to the request's handler
            self._say(error)
        self._say(_END)

    def _say(self, piece: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: the server is stopping
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class ModelQueue:
    """Runs jobs one after the other in a thread of its own, and refuses those for whom there is no place."""

    def __init__(self, waiting: int, seconds: float) -> None:
        self._most, self._seconds = waiting, seconds
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._took = 1.0  # seconds, a running mean, for Retry-After
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        return len(self._jobs)

    def admit(self, work: Work) -> Job:
        """Return the job that will do this work. Raises ApiError: 429 where too many wait, 503 at the end."""
        with self._changed:
            if self._closed:
                raise ApiError(503, "the server is stopping", code="stopping")
            if len(self._jobs) + (self._running is not None) > self._most:
                wait = max(1, min(60, round(self._took * (len(self._jobs) + 1))))
                raise ApiError(
                    429,
                    f"{len(self._jobs)} requests wait already, the most that this server lets wait; try again in "
                    f"{wait} s, or start it with a larger --waiting",
                    code="too_many_requests",
                    headers={"retry-after": str(wait)},
                )
            job = Job(self, work, self._seconds)
            self._jobs.append(job)
            self._changed.notify()
        return job

    def forget(self, job: Job) -> None:
        """Take a job that has not begun out of the queue."""
        with self._changed, contextlib.suppress(ValueError):
            self._jobs.remove(job)

    def close(self) -> None:
        """Cancel everything, from the event loop, and let the thread end."""
        with self._changed:
            self._closed = True
            left = [*self._jobs, *([self._running] if self._running else [])]
            self._changed.notify()
        for job in left:
            job.cancel()

    def join(self, seconds: float) -> None:
        """Wait for the thread to end its current step."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while (job := self._take()) is not None:
            began = time.monotonic()
            job.run()
            self._took += 0.2 * (time.monotonic() - began - self._took)
            with self._changed:
                self._running = None
            del job  # its pieces are the handler's, not the thread's to keep until the next one

    def _take(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            self._running = self._jobs.popleft() if self._jobs and not self._closed else None
            return self._running
