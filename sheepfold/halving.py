"""What a run takes smaller parts of because memory ran out, and where: a resumed run does so at the same places.

How a cohort is cut decides floating-point sums. So each halving is on disk, with its place in the run, before the work
that did not fit begins anew: a run that is killed and resumed cuts as the uninterrupted one did, to the bit, even on a
machine that has room by then. From the next saved state on, the state's plan has it.

    stage (round 3) ── units: a pass of the cohort, an evaluation, ... counted from 0 ── plan at that unit
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from sheepfold.adapter_methods import CACHED, SEEDS
from sheepfold.config import Experiment
from sheepfold.errors import CheckpointError
from sheepfold.state import BatchPlan


class Halvings:
    """The plan that holds now, and every place at which it was halved."""

    def __init__(self, plan: BatchPlan) -> None:
        """Begin with a plan; what is halved is kept in memory and logged, until `follow` says where else."""
        self.plan = plan
        self.tell: Callable[[str], None] = logging.getLogger("sheepfold").warning
        self._path: Path | None = None
        self._known: dict[tuple[str, int], tuple[BatchPlan, list[str]]] = {}
        self._stage, self._units = "", -1
        self._said: list[str] = []

    def follow(self, path: Path, tell: Callable[[str], None]) -> None:
        """Do again what this file has, and add to it; `tell` hears of each new halving, in one line.

        A last line that a dying process left half-written is dropped. Raises CheckpointError for another file.
        """
        self._path, self.tell = path, tell
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            for line in (json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")):
                plan = BatchPlan(**line["plan"])
                plan = replace(plan, recompute=plan.recompute or self.plan.recompute)  # it may be asked for since
                self._keep((line["stage"], line["unit"]), plan, line["text"])
            if text and not text.endswith("\n"):
                path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); was it edited? start a new run") from None

    def enter(self, stage: str) -> None:
        """Begin a stage of the run, such as a round: its units are counted from 0."""
        self._stage, self._units, self._said = stage, -1, []

    def next_unit(self) -> None:
        """Begin a unit of work that is done anew where memory runs out, with the plan that it had to have before."""
        self._units += 1
        if (self._stage, self._units) in self._known:
            self.plan, said = self._known[self._stage, self._units]
            self._said += said

    def halve(self, plan: BatchPlan, why: str) -> None:
        """Go on with a smaller plan. Raises CheckpointError where the disk refuses to keep that."""
        text = f"{self._stage}: {why}" if self._stage else why
        self._write(plan, text)
        self._keep((self._stage, self._units), plan, text)
        self.plan = plan
        self._said.append(text)
        self.tell(text)

    @property
    def said(self) -> list[str]:
        """What was halved since this stage began, a line each."""
        return list(self._said)

    def _keep(self, place: tuple[str, int], plan: BatchPlan, text: str) -> None:
        _, said = self._known.get(place, (plan, []))
        self._known[place] = plan, [*said, text]

    def _write(self, plan: BatchPlan, text: str) -> None:
        if self._path is None:
            return
        line = {"stage": self._stage, "unit": self._units, "plan": asdict(plan), "text": text}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be written ({error.strerror}); free some space") from None


def remedies(experiment: Experiment) -> str:
    """Return, in words, what needs less memory and is not tried without being asked for."""
    train, method = experiment.train, experiment.adapter.method
    found = ["data.max_tokens or adapter.rank lower", "model.bits", "a smaller base"]
    alone = train.sharding == "none"  # processes that share a model halve nothing
    tried = train.gradient_checkpointing or (alone and train.gradient_checkpointing is None)
    if not tried and method not in (*CACHED, SEEDS):
        found.insert(0, "train.gradient_checkpointing")
    if not alone:
        found.insert(0, "train.micro_rows lower")
    return f"set {', or '.join(found)}, in a new run"


def smaller(
    plan: BatchPlan, *, clients: bool, tokens: int | None, recompute: bool = False
) -> tuple[BatchPlan, str] | None:
    """Return a plan that needs less memory in training, and a line that says how; None where it is the smallest.

    clients: whether the clients of a pass are to be halved before a forward pass is; tokens: the longest row's, under
    which a forward pass over many clients gets no smaller (None: the engine cuts by rows of one client); recompute:
    whether gradient checkpointing may be turned on, where forward passes get no smaller.
    """
    fewer = max(1, plan.clients_per_pass // 2)
    words = f"out of memory with {plan.clients_per_pass} clients in a pass, going on with {fewer}"
    fewer_clients = (replace(plan, clients_per_pass=fewer), words) if plan.clients_per_pass > 1 else None
    if clients and fewer_clients:
        return fewer_clients
    if tokens is None and plan.micro_rows > 1:
        words = f"out of memory with {plan.micro_rows} rows in a forward pass, going on with {plan.micro_rows // 2}"
        return replace(plan, micro_rows=plan.micro_rows // 2), words
    if tokens is not None and plan.micro_tokens > tokens:
        fewer = max(tokens, plan.micro_tokens // 2)
        words = f"out of memory with {plan.micro_tokens:,} tokens in a forward pass, going on with {fewer:,}"
        return replace(plan, micro_tokens=fewer), words
    if recompute and not plan.recompute:
        words = "out of memory with the shortest forward passes, going on with gradient checkpointing"
        return replace(plan, recompute=True), words
    return fewer_clients
