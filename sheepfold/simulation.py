"""A whole run: the loop of rounds.py, and all that goes around it, wherever its clients are (clients.py)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sheepfold import joining, memory, stopping
from sheepfold import state as states
from sheepfold.adapter import Adapter
from sheepfold.assembly import Parts, assemble, check
from sheepfold.clients import Clients, InProcess, Listener, Place, silent
from sheepfold.closing import rates
from sheepfold.config import Experiment
from sheepfold.errors import CheckpointError, TrainingError
from sheepfold.evaluation.benchmarks import after_run
from sheepfold.evaluation.held_out import HeldOut
from sheepfold.export import save_adapter, write_cards
from sheepfold.facts import data_facts, round_line, run_facts, with_clients
from sheepfold.halving import remedies
from sheepfold.journal import RunFolder, check_same, last_folder, new_folder
from sheepfold.judging import evaluate
from sheepfold.local.store import ClientStore
from sheepfold.outlook import Outlook
from sheepfold.results import write_results
from sheepfold.rounds import rounds
from sheepfold.state import ServerState
from sheepfold.tracking.live import followed

__all__ = ["Listener", "Outcome", "run", "silent"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    folder: Path
    state: ServerState
    closing: joining.Closing | None
    stopped_early: bool

    @property
    def adapter(self) -> Adapter:
        """All that was learned, as one adapter on the base (see ServerState.whole)."""
        return self.state.whole()


EMPTY_ROUNDS = 3
"""Rounds in a row without a single update after which a run gives up."""


def run(
    experiment: Experiment,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    listener: Listener = silent,
    place: Place | None = None,
) -> Outcome:
    """Run an experiment to its end and return what it came to; see journal.py for what it leaves in its folder.

    resume goes on from the newest state of the newest run of this name, resume_from from a kept round of it; place says
    where the clients are (None: in this process). Raises SheepfoldError of one kind or another, with one line, for
    whatever cannot go on; what was written stays.
    """
    with followed(experiment, listener) as told:
        return _run_all(experiment, resume or resume_from is not None, resume_from, told, place or InProcess())


def _run_all(
    experiment: Experiment, resume: bool, resume_from: int | None, listener: Listener, place: Place
) -> Outcome:
    check(experiment)
    site = place.site(experiment)
    after_run.check(experiment)
    folder = last_folder(experiment) if resume else None
    state = _resumed(folder, experiment, resume_from) if folder else None
    listener("stage", {"text": f"loading {experiment.model.base}"})
    try:
        folders = [folder] if folder else []
        plan = state.plan if state else None
        if plan and experiment.train.gradient_checkpointing:
            plan = replace(plan, recompute=True)

        def emulator() -> Path:
            return _begun(experiment, folders).emulator

        parts = assemble(experiment, plan, emulator, site, lambda: place.ready(experiment, emulator))
        try:
            folder = _begun(experiment, folders)
            parts.engine.store = ClientStore(folder.clients)
            parts.engine.halvings.follow(folder.halvings, lambda text: listener("halved", {"text": text}))
            return _run(parts, folder, state, listener, place.clients(parts, folder, listener))
        finally:
            parts.engine.close()
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise TrainingError(f"out of memory ({said}); {remedies(experiment)}") from None


def _begun(experiment: Experiment, folders: list[RunFolder]) -> RunFolder:
    """Return the run's folder with the experiment in it; it is made, and put into `folders`, where there is none."""
    if not folders:
        folders.append(new_folder(experiment))
    folders[0].create(experiment)
    return folders[0]


def _resumed(folder: RunFolder, experiment: Experiment, round: int | None) -> ServerState | None:
    """Return the state to go on from, None where the run died before its first one."""
    check_same(folder, experiment)
    kept = folder.kept_rounds()
    if round is None and not folder.latest.is_file() and not kept:
        folder.rewind(-1)  # it died before its first state: begin again
        return None
    if round is not None and round not in kept:
        raise CheckpointError(f"--resume-from {round}: not kept in {folder.path}; kept rounds: {kept or 'none'}")
    state = states.load(folder.latest if round is None else folder.kept(round))
    if round is not None:
        states.save(state, folder.latest)  # before the journal forgets: a kill in between loses nothing
    folder.rewind(state.round)
    return state


def _run(parts: Parts, folder: RunFolder, state: ServerState | None, listener: Listener, clients: Clients) -> Outcome:
    experiment = parts.experiment
    listener("start", {**run_facts(parts), "folder": str(folder.path)})
    if state is None:
        folder.write_json("data.json", data_facts(parts))
        state = _first(parts, folder, listener, clients)
    else:
        _check_same_data(folder, data_facts(parts))
        state = replace(state, setting=parts.setting)
        parts.engine.store.rewind(state.round)
        for line in folder.lines():
            listener("round", line)
    parts.engine.on_step = lambda steps: listener("progress", {"steps": steps})
    for state in _rounds(parts, folder, state, listener, clients):  # noqa: B020, the state handed out is the next one
        if stopping.stopped(experiment, state):
            break
    parts.engine.on_step = lambda steps: None
    parts.engine.halvings.enter(f"closing after round {state.round}")
    _export(parts, folder, state)
    closing = _closing(parts, folder, state, listener, clients)
    write_results(folder, closing)
    write_cards(folder)  # all that was trained is told before benchmarks, which may fail
    end = {"folder": str(folder.path), "adapter": state.hash(), "round": state.round}
    if experiment.evaluation.tasks:
        if why := after_run.benchmarks(parts, folder, listener):
            end["failed_benchmarks"] = why
        write_cards(folder)
    listener("end", end)
    return Outcome(folder.path, state, closing, state.round < experiment.federation.rounds)


def _first(parts: Parts, folder: RunFolder, listener: Listener, clients: Clients) -> ServerState:
    """Evaluate and save the state before round 1."""
    began = time.perf_counter()
    outlook = Outlook(parts)
    outlook.begin(0)
    state = parts.start()
    scores, judged = _judged(parts, folder, state, clients)
    stopping.check_key(parts.experiment, scores)
    line: dict[str, Any] = {"round": 0, **judged, "adapter": state.hash()}
    if parts.closed is not None:
        line["offsite"] = parts.closed.emulator.facts()
    if parts.server is not None:
        line["teacher"] = dict(parts.server.measured(state))
    line["seconds"] = {"evaluation": time.perf_counter() - began}
    outlook.complete(line)
    folder.append(line)
    state = replace(stopping.watched(parts.experiment, state, scores), plan=parts.engine.plan)
    _save(folder, state, parts.experiment)
    listener("round", line)
    return state


def _rounds(
    parts: Parts, folder: RunFolder, state: ServerState, listener: Listener, clients: Clients
) -> Iterator[ServerState]:
    """Go through the remaining rounds: evaluate, write the journal, save, and hand out each state."""
    experiment = parts.experiment
    total, every = experiment.federation.rounds, experiment.evaluation.every
    if stopping.stopped(experiment, state):
        return
    before: Mapping[str, float] = next(
        (line["held_out"]["loss"] for line in reversed(folder.lines()) if "held_out" in line), {}
    )
    empty, outlook = 0, Outlook(parts, folder.lines())
    best = state.best  # rounds() goes on from its own state, which has no part in evaluation
    lr = rates(experiment)
    outlook.begin(state.round + 1)
    for state, report in rounds(  # noqa: B020
        state, total, sampler=parts.sampler, strategy=parts.strategy, engine=clients, lr=lr, server=parts.server
    ):
        state = replace(state, best=best)
        line = round_line(report, state)
        if state.round == total or (every and state.round % every == 0):
            began = time.perf_counter()
            scores, judged = _judged(parts, folder, state, clients)
            line |= judged
            if parts.server is not None:
                line["teacher"] = dict(parts.server.measured(state))
            line["rose"] = stopping.rose(before, scores.summary())
            line["seconds"]["evaluation"] = time.perf_counter() - began
            before = scores.summary()
            state = stopping.watched(experiment, state, scores)
            best = state.best
        state = replace(state, plan=parts.engine.plan)  # what was halved stays so in a resumed run
        outlook.complete(line)
        folder.append(line)
        _save(folder, state, experiment)
        _prune(parts, folder, state, report.cohort)
        listener("round", line)
        empty = 0 if report.clients else empty + 1
        if empty == EMPTY_ROUNDS:
            raise TrainingError(f"{empty} rounds in a row without an update; the last one's reason: {report.reasons()}")
        yield state
        outlook.begin(state.round + 1)


def _judged(parts: Parts, folder: RunFolder, state: ServerState, clients: Clients) -> tuple[HeldOut, dict[str, Any]]:
    """Return the evaluation that is watched, and what the journal says of it; of a closed model's, as it was asked."""
    scores = clients.judge(state)
    told: dict[str, Any] = {"held_out": scores.as_dict()}
    for full in parts.closed.judges(parts)[1:] if parts.closed is not None else []:
        told["held_out_full"] = evaluate(full, state).as_dict()
    if scores.absent:
        told["not_judged"] = dict(scores.absent)
    if heard := clients.facts():
        data = folder.data()
        if (now := with_clients(data, heard)) != data:
            folder.write_json("data.json", now)
    return scores, told


def _check_same_data(folder: RunFolder, now: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a run would be resumed on other rows or other models than it began with."""
    before = folder.data()
    said = {"fingerprint": "the data, its partition or its tokens are", "base": "the base's weights are"}
    said |= {"emulator": "the emulator's configuration or weights are", "teacher": "the teacher's weights are"}
    for key, what in said.items():
        if before.get(key) != now.get(key):
            raise CheckpointError(f"{folder.path}: {what} not what the run began with; restore it, or start a new run")
    if list(before["clients"]) != list(now["clients"]):
        raise CheckpointError(f"{folder.path}: its clients are not those that the run began with; start a new run")


def _save(folder: RunFolder, state: ServerState, experiment: Experiment) -> None:
    """Save the state; best and kept copies first, so that a state never speaks of a file that is not there."""
    if state.best is not None and state.best.round == state.round:
        states.save(state, folder.best)
    if experiment.keep_rounds and state.round and state.round % experiment.keep_rounds == 0:
        states.save(state, folder.kept(state.round))
    states.save(state, folder.latest)


def _prune(parts: Parts, folder: RunFolder, state: ServerState, cohort: Sequence[str]) -> None:
    """Drop what the cohort's clients kept and no saved state goes back to."""
    best = [state.best.round] if state.best else []
    parts.engine.store.prune(cohort, [state.round, *folder.kept_rounds(), *best])


def _export(parts: Parts, folder: RunFolder, state: ServerState) -> None:
    """Write the last and the best adapter as folders that other tools load."""
    save_adapter(parts, state.whole(), folder.path / "adapter", rounds=state.round)
    if state.best is not None:
        best = states.load(folder.best)
        save_adapter(parts, best.whole(), folder.path / "best", rounds=best.round)


def _closing(
    parts: Parts, folder: RunFolder, state: ServerState, listener: Listener, clients: Clients
) -> joining.Closing | None:
    """Let the clients close the run, and write the table down where one was asked for."""
    if parts.apart and "centralised" in parts.experiment.baselines:
        listener("stage", {"text": "no centralised baseline: nobody has all rows"})
    closing = clients.close(state)
    if closing is not None:
        folder.write_json("closing.json", closing.as_dict())
        listener("closing", {"closing": closing})
    return closing
