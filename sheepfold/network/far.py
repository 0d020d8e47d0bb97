"""Clients on machines of their own, behind a transport: the loop asks them as it asks those of its own process."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sheepfold import judging
from sheepfold.assembly import Parts
from sheepfold.clients import Listener, silent
from sheepfold.closing import closed_by
from sheepfold.evaluation.held_out import HeldOut
from sheepfold.joining import Closing
from sheepfold.journal import RunFolder
from sheepfold.messages import Absence, Assignment, Update
from sheepfold.network.gathering import Gathering, Letters, Silence
from sheepfold.network.late import Kept, Latecomers
from sheepfold.network.rules import rules
from sheepfold.network.spool import Spool
from sheepfold.network.transport import Kind, Transport
from sheepfold.state import ServerState
from sheepfold.wire.desk import Desk
from sheepfold.wire.ends import terms
from sheepfold.wire.exams import ClientFacts, Exam, Verdict, pack_exam, verdict_bytes


@dataclass(frozen=True, slots=True)
class Assigned:
    """The letters of a round of training."""

    desk: Desk
    kind: Kind = "train"

    def blob(self, client: str) -> bytes:
        """Return its assignment's bytes."""
        return self.desk.blob(client)

    def most_bytes(self, client: str) -> int:
        """Return how many bytes its update may have."""
        return self.desk.most_bytes(client)

    def counts(self, client: str, blob: bytes) -> bool:
        """Return whether an answer is an update that will not be rejected."""
        alone = Desk([self.desk.assignments[client]], self.desk.terms, self.desk.run)  # the round's hears it but once
        return isinstance(alone.take(client, blob), Update)


@dataclass(frozen=True, slots=True)
class Examined:
    """The letters of an evaluation, or of the run's end."""

    parts: Parts
    state: ServerState
    kind: judging.Kind
    run: str

    def exam(self, client: str) -> Exam:
        """Return what it is asked."""
        return judging.exam(self.parts, self.state, client, self.kind)

    def blob(self, client: str) -> bytes:
        """Return its exam's bytes."""
        return pack_exam(self.exam(client), self.run)

    def most_bytes(self, client: str) -> int:
        """Return how many bytes its verdict may have."""
        return verdict_bytes(len(self.parts.task.labels))

    def counts(self, client: str, blob: bytes) -> bool:
        """Return True: everybody is wanted."""
        return True


class FarClients:
    """All clients of a run between machines (see clients.Clients)."""

    def __init__(
        self,
        parts: Parts,
        folder: RunFolder,
        transport: Transport,
        run: str,
        listener: Listener = silent,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """run: the name that all messages of this run bear."""
        self.parts, self.transport, self.run, self.listener = parts, transport, run, listener
        self.settings = parts.experiment.network
        self.terms = terms(parts.experiment, parts.strategy)
        self._folder = folder.path / "spool"
        self._clock, self._sleep = clock, sleep
        self._heard: dict[str, ClientFacts] = {}
        self._late: Latecomers | None = None

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        """Yield what each client returns, in the order of the assignments, and then what came late from the last round.

        One update is in memory at a time, beside what the caller holds.
        """
        desk, late, counted = Desk(assignments, self.terms, self.run), self._late, set()
        cohort = [a.client for a in assignments]
        gathering = self._gathering(Assigned(desk), cohort, self.parts.sampler.size, late)
        for client, found in gathering.answers():
            answer = _absence(client, found) if isinstance(found, Silence) else desk.take(client, found)
            assert answer is not None, "two answers of one client"
            del found  # the update has numbers of its own
            if isinstance(answer, Update):
                counted.add(client)
            yield answer
            del answer
        if late is not None:
            yield from late.answers(counted, assignments[0].adapter)
            self.transport.forget(list(late.tickets))
        kept = Kept(desk, Spool(self._folder / "late")) if self.settings.late == "next" else None
        self._late = Latecomers(assignments[0].round, cohort, gathering.left, kept)

    def judge(self, state: ServerState) -> HeldOut:
        """Return what all held-out rows say of a state; who did not answer is in `absent`."""
        return judging.judged_by(self.parts, state, self._verdicts(state, "judge"))

    def close(self, state: ServerState) -> Closing | None:
        """Let every client end the run, and return the closing table; None where none was asked for."""
        verdicts = self._verdicts(state, "close")
        if missing := {c: v.reason for c, v in verdicts.items() if isinstance(v, Absence)}:
            said = "; ".join(f"{client}: {reason}" for client, reason in missing.items())
            self.listener("stage", {"text": f"closed without {len(missing)} of {len(verdicts)} clients ({said})"})
        if self._late is not None:
            self.transport.forget(list(self._late.tickets))
        Spool(self._folder).clear()
        return closed_by(self.parts, state, verdicts)

    def facts(self) -> Mapping[str, ClientFacts]:
        """Return what clients told of their rows, as far as they were heard."""
        return self._heard

    def _verdicts(self, state: ServerState, kind: judging.Kind) -> dict[str, Verdict | Absence]:
        asked, clients = Examined(self.parts, state, kind, self.run), list(self.parts.clients)
        verdicts: dict[str, Verdict | Absence] = {}
        gathering = self._gathering(asked, clients, len(clients))
        for client, found in gathering.answers():
            if isinstance(found, Silence):
                verdicts[client] = _absence(client, found)
                continue
            verdict = judging.opened(self.parts, asked.exam(client), kind, found, self.run)
            if isinstance(verdict, Verdict):
                self._heard[client] = verdict.facts
            verdicts[client] = verdict
        self.transport.forget(list(gathering.left))
        return verdicts

    def _gathering(
        self, letters: Letters, clients: Sequence[str], wanted: int, late: Latecomers | None = None
    ) -> Gathering:
        def told(answered: int, outstanding: list[str]) -> None:
            facts = {"kind": letters.kind, "answered": answered, "asked": len(clients), "outstanding": outstanding}
            self.listener("waiting", facts)

        return Gathering(
            self.transport,
            letters,
            clients,
            rules(self.settings, wanted),
            Spool(self._folder / "answers"),
            others={} if late is None else late.expected(),
            told=told,
            clock=self._clock,
            sleep=self._sleep,
        )


def _absence(client: str, silence: Silence) -> Absence:
    return Absence(client, silence.reason)
