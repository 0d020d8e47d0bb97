"""What a client machine remembers of a run: which rounds it was handed, and what it kept after each.

    runs/<run>/charter.json     what the server said the run is
    runs/<run>/rounds.json      [{"round": 3, "last": 2, "kept": true}, ...], in the order in which they were answered
    runs/<run>/clients/         what was kept, a file a round (local/store.py)

An assignment says after which round this client's update counted last (`Assignment.last`), and that is where the client
goes on from: an update may have been late or lost, a server that died goes back to a state that it saved, and a message
may come twice. So nothing newer is thrown away, and what belongs to a round is found by going back from answer to
answer.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from sheepfold.errors import CheckpointError, ConfigError, WireError
from sheepfold.folders import replace_file, writing
from sheepfold.journal import difference
from sheepfold.local.store import ClientStore
from sheepfold.messages import Assignment
from sheepfold.network.charter import Charter, read_charter

RECENT = 4
"""Answers back to which a server may go, beside the rounds whose state it keeps (keep_rounds)."""


ASIDE = ".before"
"""Ends the name of what was kept, while its round is answered once more."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One assignment that was answered."""

    round: int
    """Rounds completed before it"""
    last: int
    """Rounds completed after the update that it went on from"""
    kept: bool
    """Whether the client kept anything"""


class Memory:
    """One run's."""

    def __init__(self, folder: Path, client: str, keep_rounds: int | None = None) -> None:
        """Open a run's folder, or begin one. Raises CheckpointError where it cannot be read.

        keep_rounds: of which rounds the server keeps the states, as the experiment says.
        """
        self.folder = folder
        self.client = client
        self.keep_rounds = keep_rounds
        self.store = Kept(folder / "clients", self)
        self.store.recover()
        self._now: Assignment | None = None
        found = _read(folder / "rounds.json")
        try:
            self._answered = [Answered(**entry) for entry in json.loads(found)] if found else []
        except (ValueError, TypeError):
            raise CheckpointError(
                f"{folder / 'rounds.json'}: damaged; move the run's folder away, and this machine begins the run anew"
            ) from None

    def agree(self, charter: Charter) -> None:
        """Keep a run's charter. Raises ConfigError where an earlier one of the same run was another.

        A run that goes on may set what a resumed one may (journal.MAY_CHANGE).
        """
        found = _read(self.folder / "charter.json")
        before = None if found is None else read_charter(found)
        if before == charter:
            return
        if before is not None:
            _check_same(before, charter)
        self._write("charter.json", charter.as_json())

    def check(self, handed: Assignment, *, remembers: bool) -> None:
        """Raise WireError for an assignment that goes on from what is no longer here, or never was.

        remembers: whether clients of this run keep anything from round to round.
        """
        if not remembers or self.version(handed.last) is not None:
            return
        raise WireError(
            f"round {handed.round + 1} goes on from what {self.client} kept after round {handed.last}, which this "
            "machine does not have (its folder is new, or dropped it since); go on from a later round, or start a new "
            "run"
        )

    def version(self, last: int) -> int | None:
        """Return after which round was kept what holds after `last` rounds, 0 for nothing yet; None: it is not here."""
        while last > 0:
            answered = self._answer_to(last - 1)
            if answered is None or (answered.kept and not self.store.has(self.client, last)):
                return None
            if answered.kept:
                return last
            last = answered.last
        return 0

    @contextmanager
    def answering(self, handed: Assignment) -> Iterator[None]:
        """Write down that an assignment was answered, if the block ends well; what it keeps in between is that round's.

        What no assignment that may still come goes back to is dropped.
        """
        self.store.set_aside(self.client, handed.round + 1)  # of an earlier answer to the same round
        self._now, entry = handed, None
        try:
            yield
            entry = self._answer_to(handed.round)
            assert entry is not None
        finally:
            self._now = None
            self.store.settle(self.client, handed.round + 1, answered=entry is not None)
        if not self._answered or self._answered[-1] != entry:
            self._answered.append(entry)
            self._write("rounds.json", json.dumps([asdict(a) for a in self._answered]))
        needed = {version for last in self._needed() if (version := self.version(last))}
        self.store.prune([self.client], needed)

    def _answer_to(self, round: int) -> Answered | None:
        """Return the last answer to a round, which may be the one that is being made."""
        if self._now is not None and self._now.round == round:
            return Answered(round, self._now.last, self.store.has(self.client, round + 1))
        return next((a for a in reversed(self._answered) if a.round == round), None)

    def _needed(self) -> set[int]:
        """Return the numbers of rounds after which what was kept must stay."""
        needed = {number for a in self._answered[-RECENT:] for number in (a.last, a.round + 1)}
        every, before = self.keep_rounds, -1
        for a in self._answered:
            if every and (a.round // every > before // every or a.round % every == 0):
                needed.add(a.last)  # where a state kept since the answer before goes back to
            before = a.round
        return needed

    def _write(self, name: str, text: str) -> None:
        with writing(self.folder / name):
            replace_file(self.folder / name, text.encode())


class Kept(ClientStore):
    """What one client kept, by the answers that its updates were counted from."""

    def __init__(self, folder: Path, memory: Memory) -> None:
        """Keep it in this folder."""
        super().__init__(folder)
        self.memory = memory

    def get(self, client: str, round: int) -> dict[str, Tensor]:
        """Return what the client goes on from after its update that made `round` rounds; see ClientStore."""
        version = self.memory.version(round)
        return super().get(client, version) if version else {}

    def recall(self, client: str, last: int) -> dict[str, Tensor]:
        """Return the same, and forget nothing: a message that comes twice must not cost what was kept since."""
        return self.get(client, last)

    def has(self, client: str, round: int) -> bool:
        """Return whether something was kept after exactly this many rounds."""
        return self._path(client, round).is_file()

    def set_aside(self, client: str, round: int) -> None:
        """Put what was kept after exactly this many rounds aside, until `settle` says what becomes of it."""
        path = self._path(client, round)
        if path.is_file():
            os.replace(path, _aside(path))

    def settle(self, client: str, round: int, *, answered: bool) -> None:
        """Drop what was set aside, where the round was answered anew; else put it back in the place of what came."""
        path = self._path(client, round)
        if answered:
            _aside(path).unlink(missing_ok=True)
        elif _aside(path).is_file():
            os.replace(_aside(path), path)
        else:
            path.unlink(missing_ok=True)

    def recover(self) -> None:
        """Put back what a process that died had set aside: the answer that it belongs to may have counted."""
        for path in self.folder.glob(f"*/*{ASIDE}"):
            os.replace(path, path.with_name(path.name.removesuffix(ASIDE)))

    def _path(self, client: str, round: int) -> Path:
        return self._folder(client) / f"{round:06d}.safetensors"


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ASIDE)


def _check_same(before: Charter, now: Charter) -> None:
    changed = difference(before.settings(), now.settings())
    for name in ("clients", "base"):
        was, is_ = getattr(before, name), getattr(now, name)
        changed = changed or ((name, was, is_) if was != is_ else None)
    if changed:
        key, was, is_ = changed
        raise ConfigError(
            f"run {now.run}: {key} was {str(was)[:80]} and is now {str(is_)[:80]}; a run has one charter, begin another"
        )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); move the run's folder away") from None
