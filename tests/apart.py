"""A run whose clients have their rows to themselves: own parts, own stores, bytes alone between them and the server."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sheepfold import closing, judging
from sheepfold.assembly import Parts, Site, assemble, load_data
from sheepfold.clients import Listener
from sheepfold.config import Experiment, build
from sheepfold.data.rows import ClientRows, FederatedData, TokenRows
from sheepfold.evaluation.held_out import HeldOut
from sheepfold.joining import Closing
from sheepfold.journal import RunFolder
from sheepfold.local.store import ClientStore
from sheepfold.messages import Absence, Assignment, Update
from sheepfold.models import load_tokenizer
from sheepfold.state import ServerState
from sheepfold.tasks import task
from sheepfold.wire.desk import Desk
from sheepfold.wire.ends import reply, terms
from sheepfold.wire.exams import ClientFacts, Verdict, pack_exam, pack_verdict, unpack_exam
from sheepfold.wire.packing import Letter, pack, pack_absence
from sheepfold.wire.unpacking import unpack_assignment

RUN = "0123456789abcdef"


def some(data: FederatedData, clients: Mapping[str, ClientRows], *others: np.ndarray) -> FederatedData:
    """Return data with these rows alone, numbered anew: clients', the test set's, public ones."""
    split = [rows for c in clients.values() for rows in (c.train, c.eval, c.test)]
    keep = np.sort(np.concatenate([np.array([], dtype=np.int64), *split, *others]))
    at = lambda rows: np.searchsorted(keep, rows)  # noqa: E731
    t = data.tokens
    spans = [slice(t.offsets[n], t.offsets[n + 1]) for n in keep]
    pieces = lambda of: np.concatenate([of[:0], *(of[span] for span in spans)])  # noqa: E731
    offsets = np.concatenate([[0], np.cumsum(t.lengths()[keep])]).astype(np.int64)
    tokens = TokenRows(
        pieces(t.ids), pieces(t.is_target), offsets, t.prompt_tokens[keep], t.cut[keep], t.train_on_inputs
    )
    own = {name: ClientRows(at(c.train), at(c.eval), at(c.test)) for name, c in clients.items()}
    holdout, public = (at(rows) for rows in others) if others else (at(keep[:0]), at(keep[:0]))
    records = [data.records[n] for n in keep]
    return replace(data, records=records, clients=own, tokens=tokens, holdout=holdout, public=public)


@dataclass
class Node:
    """One client's machine; of the server's it knows the experiment's text and who takes part."""

    name: str
    parts: Parts
    home: Path

    def train(self, blob: bytes) -> bytes:
        mine = self.parts.strategy.assign(self.parts.first, self.name, 0.0).adapter
        handed = unpack_assignment(blob, mine, RUN)
        [answer] = self.parts.engine.train([handed])
        said = reply(answer, handed, terms(self.parts.experiment, self.parts.strategy), self.parts.engine.store)
        return pack(replace(said, run=RUN)) if isinstance(said, Letter) else pack_absence(said, handed.round, RUN)

    def judge(self, kind: judging.Kind, blob: bytes) -> bytes:
        asked = unpack_exam(blob, self.parts.first.adapter, RUN)
        if kind == "judge":
            return pack_verdict(judging.judge(self.parts, asked), RUN)
        return pack_verdict(closing.close(self.parts, asked, self.home, lambda event, facts: None), RUN)


@dataclass
class Apart:
    """A place whose clients are apart; answers of (round, client) in `lost` never come back, once."""

    folder: Path
    lost: set[tuple[int, str]] = field(default_factory=set)
    silent: Collection[str] = ()
    """Who judges nothing"""
    nodes: dict[str, Node] = field(default_factory=dict)

    def site(self, experiment: Experiment) -> Site:
        whole = load_data(experiment, load_tokenizer(experiment.model, task(experiment)))
        names = list(whole.clients)
        for name in names:
            rows = {name: whole.clients[name]}
            own = Site(names, lambda tokenizer, task, rows=rows: some(whole, rows))
            parts = assemble(build(experiment.model_dump(mode="json")), site=own)
            parts.engine.store = ClientStore(self.folder / "stores" / name)
            self.nodes[name] = Node(name, parts, self.folder / "homes" / name)
        return Site(names, lambda tokenizer, task: some(whole, {}, whole.holdout, whole.public), serves=True)

    def ready(self, experiment: Experiment, emulator: Callable[[], Path]) -> None:
        """Nobody waits for it."""

    def clients(self, parts: Parts, folder: RunFolder, listener: Listener) -> "Flock":
        assert not parts.data.clients
        return Flock(self, parts)


@dataclass
class Flock:
    """See clients.Clients."""

    place: Apart
    parts: Parts
    heard: dict[str, ClientFacts] = field(default_factory=dict)

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        desk = Desk(assignments, terms(self.parts.experiment, self.parts.strategy), RUN)
        for a in assignments:
            answer = self.place.nodes[a.client].train(desk.blob(a.client))
            if (a.round + 1, a.client) in self.place.lost:
                yield Absence(a.client, "lost on the way")
                continue
            assert len(answer) <= desk.most_bytes(a.client)
            told: Any = desk.take(a.client, answer)
            yield told

    def judge(self, state: ServerState) -> HeldOut:
        return judging.judged_by(self.parts, state, self._ask(state, "judge"))

    def close(self, state: ServerState) -> Closing | None:
        return closing.closed_by(self.parts, state, self._ask(state, "close"))

    def facts(self) -> Mapping[str, ClientFacts]:
        return self.heard

    def _ask(self, state: ServerState, kind: judging.Kind) -> dict[str, Verdict | Absence]:
        found: dict[str, Verdict | Absence] = {}
        for name, node in self.place.nodes.items():
            if name in self.place.silent:
                found[name] = Absence(name, "not connected")
                continue
            asked = judging.exam(self.parts, state, name, kind)
            answer = found[name] = judging.opened(self.parts, asked, kind, node.judge(kind, pack_exam(asked, RUN)), RUN)
            assert isinstance(answer, Verdict), answer
            self.heard[name] = answer.facts
        return found
