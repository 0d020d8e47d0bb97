"""The client machine's engine: a message in, bytes out, whatever goes wrong. Knows of no transport.

    worker = Worker(read_node("node.yaml"))
    worker.answer(charter, "train", blob)      the update's bytes, or an absence's with one line why

What leaves is in the ledger before it is returned. What goes wrong is told in one line of ours; the rest, which could
hold rows or places of this machine, goes into its own log.
"""

import contextlib
import json
import re
import struct
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from sheepfold import __version__
from sheepfold.config import Experiment
from sheepfold.errors import CheckpointError, PolicyError, SheepfoldError, WireError
from sheepfold.folders import writing
from sheepfold.halving import remedies
from sheepfold.locks import try_lock
from sheepfold.memory import free, is_out_of_memory
from sheepfold.messages import Absence
from sheepfold.network.charter import Charter, read_charter
from sheepfold.network.transport import Kind
from sheepfold.node.ledger import Ledger
from sheepfold.node.run import BaseOnce, OwnRun, begin
from sheepfold.node.settings import NodeSettings
from sheepfold.wire.heads import plain
from sheepfold.wire.packing import LONGEST_TEXT, RUN, pack_absence

KINDS: tuple[Kind, ...] = ("train", "judge", "close")
DONE = {"train": "trained", "judge": "judged on its own rows", "close": "closed the run"}
IDLE: Mapping[str, Any] = MappingProxyType({"phase": "idle", "doing": "waiting"})


class Worker:
    """One client machine, with at most one run in memory."""

    def __init__(self, node: NodeSettings, say: Callable[[str], None] = print) -> None:
        """Take a machine's settings; say: told, a line or a few, what its owner should read.

        Raises CheckpointError where its folder cannot be written, or another process works in it.
        """
        self.node = node
        self.say = say
        self._state = IDLE
        self._said = ("", "")
        self._run: OwnRun | None = None
        self._bases = BaseOnce()
        with writing(node.folder):
            node.folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(node.folder / "lock")
        if lock is None:
            raise CheckpointError(f"{node.folder}: another process works in it; stop that one first")
        self._lock = lock
        self.ledger = Ledger(node.ledger)

    @property
    def state(self) -> Mapping[str, Any]:
        """What it is doing: phase (idle, loading, training, judging, closing), run, round (from 1), step; and in words.

        Another thread may read it at any time.
        """
        return self._state

    def answer(self, charter: str, kind: str, blob: bytes) -> bytes:
        """Return what a message of a run's server is answered with: an update, a verdict, or an absence.

        charter: see network/charter.py; kind: train, judge or close. Raises CheckpointError where the ledger cannot be
        written; nothing has left then.
        """
        run, round = _address(charter, blob)
        try:
            what, data = self._answered(charter, kind, blob)
        except Exception as error:  # a server hears of each, as an absence; the traceback stays
            what, data = "absence", pack_absence(Absence(self.node.name, self._reason(error, run)), round, run)
        finally:
            self._state = IDLE
        self.ledger.note(what, data, run=run, round=round + (kind == "train"), client=self.node.name)
        if what != "absence":
            self.say(f"{DONE[kind]}; sends {len(data):,} bytes")
        return data

    def close(self) -> None:
        """Give back what it holds: the base, and its folder."""
        self._forget()
        self._bases.drop()
        self._lock.close()

    def _answered(self, text: str, kind: str, blob: bytes) -> tuple[str, bytes]:
        if kind not in KINDS:
            raise WireError(f"a message of kind {kind[:20]!r}, expected {', '.join(KINDS)}")
        charter = _read(text)
        if self._run is None or self._run.charter != charter:
            self._tell("loading", charter.run, 0, 0)
            self._forget()
            self._run = begin(charter, self.node, self._bases, self.say, self._log)
        return self._run.answer(kind, blob, lambda phase, round, step: self._tell(phase, charter.run, round, step))

    def _tell(self, phase: str, run: str, round: int, step: int) -> None:
        doing = {
            "loading": "loading",
            "training": f"training, round {round}, step {step}",
            "judging": f"judging the state after round {round}",
            "closing": "closing the run",
        }
        self._state = MappingProxyType(
            {"phase": phase, "run": run, "round": round, "step": step, "doing": doing[phase]}
        )

    def _reason(self, error: Exception, run: str) -> str:
        """Return what the server hears of an error: a line of ours, or no more than its kind."""
        if isinstance(error, SheepfoldError):
            reason = plain(self.node.unnamed(" ".join(str(error).split())), LONGEST_TEXT)
            reason = f"refused: {reason}" if isinstance(error, PolicyError) else reason
        else:
            self._log()
            experiment = self._run.parts.experiment if self._run else Experiment()
            self._forget()  # what it left half done is not trained on
            reason = f"{type(error).__name__} on this machine; its own log has the rest"
            if is_out_of_memory(error):
                self._bases.drop()
                free()
                reason = f"out of memory; {remedies(experiment)}"
        if (run, reason) != self._said:
            self.say(f"run {run}: {reason}")
            self._said = run, reason
        return reason

    def _log(self) -> None:
        """Write the error that is being handled into this machine's own log, with all that is known of it."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        with writing(self.node.log), open(self.node.log, "a", encoding="utf-8") as file:
            file.write(f"{at}\n{traceback.format_exc()}\n")

    def _forget(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None


def _read(text: str) -> Charter:
    """Return a charter of this release. Raises WireError for another one's, and for what is none."""
    try:
        theirs = json.loads(text).get("version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise WireError(f"no charter of a run ({error})") from None
    if theirs != __version__:
        raise WireError(
            f"the server has sheepfold {str(theirs)[:40]}, this machine {__version__}; both need the same release"
        )
    charter = read_charter(text)
    if not isinstance(charter.run, str) or not re.fullmatch("[0-9a-f]{16}", charter.run):
        raise WireError(f"a charter of run {str(charter.run)[:40]!r}; expected 16 hex digits")
    if not all(isinstance(value, str) for value in (charter.base, *charter.clients)):
        raise WireError("a charter with names that are no text")
    return charter


def _address(charter: str, data: bytes) -> tuple[str, int]:
    """Return the run and the round of a message, for its answer; as good as can be told of a damaged one."""
    run, round = RUN, 0
    with contextlib.suppress(WireError):  # its answer says so
        run = _read(charter).run
    try:
        (length,) = struct.unpack("<Q", data[:8])
        head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["sheepfold"])
        found, theirs = head["round"], head["run"]
        round = found if type(found) is int and 0 <= found < 2**53 else 0
        run = theirs if run == RUN and re.fullmatch("[0-9a-f]{16}", str(theirs)) else run
    except (ValueError, KeyError, TypeError, RecursionError, struct.error):
        pass  # what is wrong with it, its reading says
    return run, round
