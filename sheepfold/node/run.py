"""One run on a client machine: its charter, this machine's rows and base, and the answers to its messages.

    charter ── policy ── base's fingerprint ── rows ── policy ── tokens, base, engine ──▶ OwnRun
    assignment ──▶ train ──▶ update          exam ──▶ judge, close ──▶ verdict

What the owner could mind is looked at before anything heavy is loaded. The server's experiment says what is trained and
how; where rows and base come from, the device and every folder are this machine's own.
"""

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sheepfold import closing, judging, models
from sheepfold.adapter import Adapter
from sheepfold.assembly import Parts, Site, assemble
from sheepfold.config import Experiment, ModelSettings
from sheepfold.data.rows import FederatedData
from sheepfold.errors import ConfigError, DataError, ModelError, SheepfoldError, WireError
from sheepfold.export import save_adapter
from sheepfold.folders import replace_file, writing
from sheepfold.messages import Absence, Assignment
from sheepfold.models import Base, load_base
from sheepfold.network.charter import Charter
from sheepfold.network.site import check_devices
from sheepfold.network.transport import Kind
from sheepfold.node.data import own_data, own_rows, own_settings
from sheepfold.node.leaving import form, leaving, text
from sheepfold.node.memory import Memory
from sheepfold.node.policy import check_assignment, check_policy
from sheepfold.node.settings import NodeSettings
from sheepfold.tasks import task
from sheepfold.tasks.base import Task
from sheepfold.wire.ends import Terms, reply, terms
from sheepfold.wire.exams import Exam, Verdict, pack_verdict, unpack_exam
from sheepfold.wire.packing import pack, pack_absence
from sheepfold.wire.unpacking import unpack_assignment

Tell = Callable[[str, int, int], None]
"""Is told what the machine is at: (phase, round counted from 1, step)."""


class BaseOnce:
    """The base of the last run, for the next one with the same model settings."""

    def __init__(self) -> None:
        """Begin with none."""
        self._key: Any = None
        self._base: Base | None = None

    def loader(self, experiment: Experiment, say: Callable[[str], None]) -> Callable[..., Base]:
        """Return models.load_base, which loads nothing where the base is here as it was loaded; say: told which it is.

        Only the cohort engine gives a base back as it was; PEFT's layers stay in it, and a new head is drawn for a run.
        """
        reusable = experiment.train.engine == "cohort" and experiment.task == "causal_lm"
        key = (experiment.model, experiment.device) if reusable else None

        def load(settings: ModelSettings, device: str = "auto", tokenizer: Any = None, **more: Any) -> Base:
            here = self._base is not None and key is not None and key == self._key
            say(f"{settings.base} is loaded already" if here else f"loading {settings.base}")
            if not here or self._base is None:
                if self._base is not None:
                    self._key, self._base = None, None
                    gc.collect()  # two bases may be more than the device holds
                self._key, self._base = key, load_base(settings, device, tokenizer, **more)
            return self._base

        return load

    def drop(self) -> None:
        """Forget it."""
        self._key, self._base = None, None


@dataclass(slots=True)
class OwnRun:
    """One run, ready to answer."""

    charter: Charter
    node: NodeSettings
    parts: Parts
    agreed: Terms
    memory: Memory
    say: Callable[[str], None]

    def answer(self, kind: Kind, blob: bytes, tell: Tell) -> tuple[str, bytes]:
        """Return what a message is answered with, by its name in the ledger and as bytes.

        Raises SheepfoldError for a message that this machine will not answer.
        """
        if kind == "train":
            return self._train(blob, tell)
        asked = unpack_exam(blob, self.parts.first.adapter, self.charter.run)
        if asked.client != self.node.name:
            raise WireError(f"an exam of {asked.client[:60]!r}, and this machine is {self.node.name}")
        if asked.round > (rounds := self.parts.experiment.federation.rounds):  # a baseline trains for as many
            raise WireError(f"a state after round {asked.round}, and the run's charter has {rounds}")
        check_assignment(self.node.policy, asked.handed)
        self.memory.check(asked.handed, remembers=self._remembers)
        tell("judging" if kind == "judge" else "closing", asked.round, 0)
        verdict = judging.judge(self.parts, asked) if kind == "judge" else self._close(asked)
        return "verdict", pack_verdict(verdict, self.charter.run)

    def close(self) -> None:
        """Give the base back."""
        self.parts.engine.close()

    def _train(self, blob: bytes, tell: Tell) -> tuple[str, bytes]:
        handed = unpack_assignment(blob, self._mine(), self.charter.run)
        if handed.client != self.node.name:
            raise WireError(f"an assignment of {handed.client[:60]!r}, and this machine is {self.node.name}")
        if handed.round >= (rounds := self.parts.experiment.federation.rounds):  # its owner was told what leaves in all
            raise WireError(f"an assignment of round {handed.round + 1}, and the run's charter has {rounds}")
        check_assignment(self.node.policy, handed)
        self.memory.check(handed, remembers=self._remembers)
        self.tell_owner(handed)
        engine, step = self.parts.engine, 0

        def stepped(steps: int) -> None:
            nonlocal step
            step += steps
            tell("training", handed.round + 1, step)

        tell("training", handed.round + 1, 0)
        engine.on_step = stepped
        with self.memory.answering(handed):
            [answer] = engine.train([handed])
            said = reply(answer, handed, self.agreed, engine.store)
        if isinstance(said, Absence):
            return "absence", pack_absence(said, handed.round, self.charter.run)
        return "update", pack(replace(said, run=self.charter.run))

    def _mine(self) -> Adapter:
        """Return the adapter that this client makes itself, at its own ranks."""
        return self.parts.strategy.assign(self.parts.first, self.node.name, 0.0).adapter

    @property
    def _remembers(self) -> bool:
        """Whether the client keeps anything from round to round."""
        rule, experiment = self.parts.strategy.local, self.parts.experiment
        private = self.parts.keeps or bool(experiment.personal.ditto)
        return private or experiment.federation.wire.up == "int8" or (rule is not None and rule.finish is not None)

    def tell_owner(self, handed: Assignment | None = None) -> None:
        """Say, and write down, what will leave, where that has a form that was not told yet.

        handed: what it follows from; None: what this client will be handed in round 1.
        """
        handed = handed or self.parts.strategy.assign(self.parts.first, self.node.name, 0.0)
        told, folder = leaving(handed, self.agreed, self.parts.experiment, self.parts), self.memory.folder
        before = [form(json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("leaving*.json")]
        if form(json.loads(told.as_json())) in before:
            return
        name = f"leaving-from-round-{told.from_round}" if before else "leaving"
        for ending, content in ((".txt", text(told)), (".json", told.as_json())):
            with writing(folder / (name + ending)):
                replace_file(folder / (name + ending), content.encode())
        self.say(text(told, most=12).rstrip())

    def _close(self, asked: Exam) -> Verdict:
        """Return the last verdict; everybody's adapter, and this client's own if it has one, are in the folder then."""
        here, state = judging.sitting(self.parts, asked)
        folder = self.memory.folder
        save_adapter(here, state.whole(), folder / "adapter", rounds=asked.round)
        own = folder / ("adapter-personal" if self.parts.personal else "adapter")

        def listener(event: str, facts: Mapping[str, Any]) -> None:
            if event == "stage":
                self.say(str(facts["text"]))

        verdict = closing.close(self.parts, asked, own, listener)
        self.say(f"run {self.charter.run} is over: the adapter is in {own}")
        return verdict


def begin(
    charter: Charter, node: NodeSettings, bases: BaseOnce, say: Callable[[str], None], log: Callable[[], None]
) -> OwnRun:
    """Return a run that this machine takes part in. log: writes down the error that is being handled.

    Raises SheepfoldError, in one line, for one that it cannot, or will not, take part in.
    """
    asked = charter.settings()
    if node.name not in charter.clients:
        raise WireError(f"the run's clients are {len(charter.clients)} others, and this machine is {node.name}")
    check_policy(node.policy, asked, rows=0)  # what does not depend on rows, before they are read
    own = _own(asked, node)
    if (found := models.fingerprint(own.model, task(own))) != charter.base:
        raise ModelError(
            f"model.base {asked.model.base}: this machine's has fingerprint {found}, the run's {charter.base}; both "
            "need the same files (name a copy of the server's as `model` in the node file)"
        )
    memory = Memory(node.runs / charter.run, node.name, asked.keep_rounds)
    memory.agree(charter)
    try:
        parted = own_rows(own.data, node.name)
    except SheepfoldError as error:
        raise _unusable(log) from error
    check_policy(node.policy, asked, rows=len(parted.clients[node.name].train))

    def data(tokenizer: Any, asked_task: Task) -> FederatedData:
        try:
            return own_data(parted, own.data, node, tokenizer, asked_task)
        except SheepfoldError as error:
            raise _unusable(log) from error

    site = Site(charter.clients, data, bases.loader(own, lambda text: say(f"run {charter.run}: {text}")))
    parts = assemble(own, site=site)
    parts.engine.store = memory.store
    for note in parts.data.notes:
        say(note)
    run = OwnRun(charter, node, parts, terms(own, parts.strategy), memory, say)
    run.tell_owner()
    return run


def _own(asked: Experiment, node: NodeSettings) -> Experiment:
    """Return the experiment as it holds on this machine: rows, base, device and folders are its own."""
    if asked.task == "classification" and not asked.data.labels:
        raise ConfigError("data.labels is empty; the server must say which labels there are, and in which order")
    check_devices(asked)
    model = asked.model if node.model is None else asked.model.model_copy(update={"base": node.model, "revision": None})
    places = {"device": node.device, "cache": str(node.cache), "output": str(node.runs)}
    return asked.model_copy(update={**places, "model": model, "data": own_settings(asked.data, node)})


def _unusable(log: Callable[[], None]) -> DataError:
    """Return what is told of rows that cannot be used: what is wrong with them may quote them, and stays here."""
    log()
    return DataError("this machine's rows cannot be used as the experiment asks; its own log says why")
