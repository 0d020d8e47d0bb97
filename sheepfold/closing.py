"""The end of a run: last words of its clients, wherever their rows are, and the closing table.

A client fine-tunes, goes home with its adapter, trains the baselines asked for, and its held-out rows compare. Between
machines each does so with its own rows, and only sums and counts come back; nobody there can train on all rows in one
place, so the centralised baseline is left out.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sheepfold import joining, marks
from sheepfold.adapter import Adapter
from sheepfold.assembly import Parts
from sheepfold.config import Experiment
from sheepfold.export import save_adapter
from sheepfold.joining import Closing
from sheepfold.journal import RunFolder
from sheepfold.judging import comparing, facts_of, judge, sitting
from sheepfold.local.steps import round_lr
from sheepfold.local.store import ClientStore, folder_name
from sheepfold.marks import Marks
from sheepfold.messages import Absence
from sheepfold.state import ServerState
from sheepfold.wire.exams import Exam, Verdict

Tell = Callable[[str, Mapping[str, Any]], None]


def rates(experiment: Experiment) -> Callable[[int], float]:
    """Return the peak learning rate of each round, counted from 0."""
    return partial(round_lr, experiment.train, rounds=experiment.federation.rounds)


def measured(parts: Parts) -> list[str]:
    """Return the closing table's measures."""
    return ["loss", *parts.task.measures, *parts.metrics]


def close_here(parts: Parts, folder: RunFolder, state: ServerState, listener: Tell) -> Closing | None:
    """Train the baselines asked for, and compare; None where neither baseline nor metric is asked for.

    Adapters that clients go home with are written into the run's folder.
    """
    asked = parts.experiment.baselines
    tuned = _tuned(parts, state, listener)
    if parts.experiment.personal.wanted or parts.keeps:
        shutil.rmtree(folder.personal, ignore_errors=True)  # of an earlier end of this run
        stores = [store for store in (parts.engine.store, tuned) if store is not None]
        for client in dict.fromkeys(c for store in stores for c in store.clients(parts.data.clients)):
            own = joining.going_home(parts, state, tuned, client)
            save_adapter(parts, own, folder.personal / folder_name(client), rounds=state.round)
    elif not comparing(parts):
        return None
    local = _alone(parts, state, listener)
    central = None
    if "centralised" in asked:
        listener("stage", {"text": "training on all rows in one place"})
        central = joining.train_centrally(parts, state, rates(parts.experiment))
    listener("stage", {"text": "comparing on held-out rows"})
    judges = [parts] if parts.closed is None else parts.closed.judges(parts)
    return joining.compare(judges[-1], state, local, central, measured(parts), tuned)


def close(parts: Parts, asked: Exam, folder: Path, listener: Tell) -> Verdict:
    """Return what the held-out rows of this machine's one client say at the end of a run.

    What it goes home with is written into `folder`: its own adapter where it ends with one, else everybody's.
    """
    here, state = sitting(parts, asked)
    tuned = _tuned(here, state, listener)
    home = joining.going_home(here, state, tuned, asked.client) if parts.personal else state.whole()
    save_adapter(parts, home, folder, rounds=state.round)
    if not comparing(parts):
        return judge(parts, asked)
    made = joining.contenders(here, state, _alone(here, state, listener), tuned=tuned)
    rows = marks.evaluation_rows(here)[asked.client]
    listener("stage", {"text": "comparing on held-out rows"})
    work = [(i, rows) for i in range(len(made))]
    found = marks.marks(here, list(made.values()), work, measured(here))
    named = {name.partition(":")[0]: mark for name, mark in zip(made, found, strict=True)}
    generated = {m: {name: mark.metrics[m] for name, mark in named.items()} for m in parts.metrics}
    return Verdict(asked.client, asked.round, {n: m.score for n, m in named.items()}, facts_of(parts), generated)


def closed_by(parts: Parts, state: ServerState, verdicts: Mapping[str, Verdict | Absence]) -> Closing | None:
    """Return the closing table of these verdicts and the server's own test rows; None where none was asked for.

    Without test rows of the server's, everybody's rows are those that judged, together.
    """
    if not comparing(parts):
        return None
    measures, holdout, everybody = measured(parts), parts.data.holdout, ("base", "federated")
    own = {c: _marks(verdicts[c]) for c in parts.clients if isinstance(verdicts.get(c), Verdict)}
    judged = {c: named for c, named in own.items() if named["federated"].score.loss.count}
    named = [(client, subject, mark) for client, of in judged.items() for subject, mark in of.items()]
    if len(holdout):
        made = joining.contenders(parts, state, {})
        work = [(i, holdout) for i, name in enumerate(made) if name in everybody]
        found = marks.marks(parts, list(made.values()), work, measures)
        named += [("shared", subject, mark) for subject, mark in zip(everybody, found, strict=True)]
    elif judged:
        for subject in everybody:
            first, *others = [of[subject] for of in judged.values()]
            named.append(("shared", subject, sum(others, start=first)))
    shared = len(holdout) or sum(_judging(parts, verdicts[c]) for c in judged)
    return Closing(joining.table(named, measures), list(parts.clients), shared, measures[1:])


def _marks(verdict: Verdict | Absence) -> dict[str, Marks]:
    assert isinstance(verdict, Verdict)
    generated = verdict.metrics
    return {n: Marks(score, {m: of[n] for m, of in generated.items()}) for n, score in verdict.scores.items()}


def _judging(parts: Parts, verdict: Verdict | Absence) -> int:
    """Return how many rows of a client were asked."""
    assert isinstance(verdict, Verdict)
    settings = parts.experiment.evaluation
    rows = int(getattr(verdict.facts, settings.split))
    return rows if settings.rows_per_client is None else min(rows, settings.rows_per_client)


def _tuned(parts: Parts, state: ServerState, listener: Tell) -> ClientStore | None:
    steps = parts.experiment.personal.finetune_steps
    if not steps:
        return None
    listener("stage", {"text": "fine-tuning for every client"})
    return joining.fine_tune(parts, state, rates(parts.experiment)(max(0, state.round - 1)), steps)


def _alone(parts: Parts, state: ServerState, listener: Tell) -> dict[str, Adapter]:
    if "local" not in parts.experiment.baselines:
        return {}
    listener("stage", {"text": "training every client alone"})
    return joining.train_alone(parts, state.round, rates(parts.experiment))
