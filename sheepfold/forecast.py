"""`sheepfold plan`: what a run would do, from the data and the base's configuration alone. No weights, no GPU."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sheepfold import memory, planning
from sheepfold.adapter import Adapter
from sheepfold.adapter_methods import SEEDS, seed_options
from sheepfold.assembly import (
    Foundation,
    check,
    clients_ranks,
    first_adapter,
    foundation,
    make_setting,
    read_start,
    sites_of,
    whole_names,
)
from sheepfold.config import Experiment
from sheepfold.distillation.teacher import Foreseen
from sheepfold.engines.seed_carrier import SEEDS as SUMS
from sheepfold.local.steps import round_lr, steps_in_round
from sheepfold.models import Outline, config_only, pick_device
from sheepfold.needs import need_of
from sheepfold.offsite.cut import cut_in
from sheepfold.offsite.cut import trained as offsite_names
from sheepfold.personal import check_patterns
from sheepfold.ranks import adapter_numbers
from sheepfold.sampler import sampler
from sheepfold.state import BatchPlan, ServerState, Setting
from sheepfold.strategies.base import Strategy
from sheepfold.targets import linear_shape
from sheepfold.tasks.base import Task
from sheepfold.wire.ends import terms
from sheepfold.wire.foresight import traffic


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would do."""

    clients: int
    cohort: int
    rounds: int
    train_rows: int
    eval_rows: int
    base_parameters: int
    adapter_numbers: int
    adapted_modules: int
    steps_a_round: int
    """Optimizer steps of all sampled clients, on average over clients."""
    rows_in_all: int
    tokens_in_all: int
    """Expected, with the clients' mean row length."""
    plan: BatchPlan
    downlink_bytes: int | None
    """Of round 1, over all sampled clients; None: not foreseen for this method"""
    uplink_bytes: int | None
    base_bytes: int
    pass_bytes: int
    """Stacked adapters, gradients and moments of one pass, and the copies that become updates"""
    activation_bytes: int | None
    """What a forward and backward pass needs besides; None: not foreseen for this method or model"""
    fold_bytes: int
    """The server's: the global adapter and the sum of the updates"""
    library_bytes: int
    """What a process takes without a model; on a GPU nothing, where torch counts tensors alone"""
    device: str
    public_rows: int = 0
    """Rows that the server has"""
    by_tokens: bool = True
    """Whether a forward pass is bounded by the plan's tokens; else by its rows of one client"""
    sharded: bool = False
    """Whether processes cut the model between them: bytes here are those of a whole one"""
    server: Foreseen | None = None
    """What the server trains itself"""
    full_parameters: int | None = None
    """Of the full model, where the base that clients get is its emulator"""
    full_bytes: int = 0
    """What it takes beside the emulator, where it is judged too"""

    @property
    def peak_bytes(self) -> int | None:
        """What the run is expected to have in use at its peak; None: not foreseen."""
        if self.activation_bytes is None:
            return None
        models = self.base_bytes + self.full_bytes + (self.server.bytes if self.server else 0)
        return self.library_bytes + models + self.fold_bytes + self.pass_bytes + self.activation_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast, ready for JSON."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def forecast(experiment: Experiment) -> Forecast:
    """Return what a run of this experiment would do. Raises what the run itself would raise for its settings."""
    made, _ = check(experiment)
    known = foundation(experiment)
    outline, data, asked = known.outline, known.data, known.task
    chosen = sampler(experiment.federation, list(data.clients), experiment.seed)
    sizes = np.array([len(c.train) for c in data.clients.values()])
    lengths = data.tokens.lengths()
    mean_tokens = np.array([lengths[c.train].mean() if len(c.train) else 0.0 for c in data.clients.values()])
    steps = np.array([steps_in_round(experiment.train, int(n)) if n else 0 for n in sizes])
    rows = np.minimum(steps * experiment.train.batch_rows, _rows_seen(experiment, sizes, steps))
    share = chosen.size / len(sizes) * experiment.federation.rounds
    ranks = clients_ranks(experiment, outline, list(data.clients))
    start = read_start(experiment, outline.model)
    setting = make_setting(experiment, list(data.clients), ranks, {}, start, made)
    numbers, modules = _adapter_size(experiment, outline, setting.widest, asked)
    device = pick_device(experiment.device)
    libraries = memory.in_use(torch.device("cpu")) if device.type != "cuda" else 0
    first, sites = _first(experiment, known, setting, numbers)
    need = need_of(experiment, _fresh(experiment, known), asked, data.tokens, sites, first, made.local)
    planned_by = need if known.full is None else None  # as a run with an emulator does
    plan = planning.batch_plan(experiment.train, numbers, chosen.size, device, planned_by)
    state = ServerState(0, first, plan, setting=setting)
    down, up = _traffic(experiment, made, known, state)
    return Forecast(
        clients=len(sizes),
        cohort=chosen.size,
        rounds=experiment.federation.rounds,
        train_rows=int(sizes.sum()),
        eval_rows=int(sum(len(c.eval) for c in data.clients.values())),
        base_parameters=outline.parameters,
        adapter_numbers=numbers,
        adapted_modules=modules,
        steps_a_round=round(float(steps.mean()) * chosen.size),
        rows_in_all=round(float(rows.sum()) * share),
        tokens_in_all=round(float((rows * mean_tokens).sum()) * share),
        plan=plan,
        downlink_bytes=None if down is None else round(down * chosen.size),
        uplink_bytes=None if up is None else round(up * chosen.size),
        base_bytes=outline.bytes,
        pass_bytes=need.vectors + need.client * plan.clients_per_pass,
        activation_bytes=None if made.beyond_peft else need.in_a_pass(plan),
        fold_bytes=need.server,
        library_bytes=libraries,
        device=str(device),
        public_rows=len(data.public),
        by_tokens=experiment.train.engine == "cohort",
        sharded=experiment.train.sharding != "none",
        server=made.foresee(experiment) if made.foresee else None,
        full_parameters=None if known.full is None else known.full.parameters,
        full_bytes=_full_bytes(experiment, known.full),
    )


def _full_bytes(experiment: Experiment, full: Outline | None) -> int:
    judged = experiment.offsite is not None and "full" in experiment.offsite.evaluate
    return full.parameters * full.dtype.itemsize if full is not None and judged else 0


def _rows_seen(experiment: Experiment, sizes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return the rows of `steps` steps, whose last one in every epoch may be short, (clients,)."""
    per_epoch = np.maximum(1, -(-sizes // experiment.train.batch_rows))
    whole, rest = np.divmod(steps, per_epoch)
    return np.asarray(whole * sizes + np.minimum(rest * experiment.train.batch_rows, sizes))


def _traffic(
    experiment: Experiment, made: Strategy, known: Foundation, state: ServerState
) -> tuple[float | None, float | None]:
    """Return the bytes of a client's assignment and update in round 1, the mean over clients; None: not foreseen."""
    if made.beyond_peft:
        return None, None  # its first rounds are made from the base's weights, which are not loaded here
    lr = round_lr(experiment.train, 0, rounds=experiment.federation.rounds)
    steps = {name: steps_in_round(experiment.train, len(c.train)) for name, c in known.data.clients.items()}
    each = list(traffic(made.begin(state), made, terms(experiment, made), experiment.train.engine, lr, steps))
    down, up = np.array(each, dtype=np.float64).mean(0)
    return float(down), float(up)


def _first(experiment: Experiment, known: Foundation, setting: Setting, numbers: int) -> tuple[Adapter, list[str]]:
    """Return the adapter before round 1, and the modules that LoRA adapts."""
    outline = known.outline
    if experiment.adapter.method == SEEDS:
        return Adapter(extra={SUMS: torch.zeros(numbers)}), []
    if experiment.adapter.method != "lora":
        return _in_place(experiment, _fresh(experiment, known), known.task), []
    sites = sites_of(experiment, outline.model, known.task)
    start = read_start(experiment, outline.model)
    names = whole_names(outline.model, known.task)
    check_patterns(experiment, [*sites, *names])
    whole = {name: torch.zeros(outline.model.get_parameter(name).shape) for name in names}
    return first_adapter(experiment, sites, start, setting, whole), list(sites)


def _fresh(experiment: Experiment, known: Foundation) -> Outline:
    """Return the base's outline as it is before PEFT puts its layers there, which it does for good."""
    return known.outline if known.full is not None else config_only(experiment.model, experiment.device, known.task)


def _in_place(experiment: Experiment, outline: Outline, asked: Task) -> Adapter:
    """Return the whole tensors that train where there are no pairs: names and shapes, no numbers."""
    model: Any = outline.model
    if experiment.adapter.method == "full":
        trained = {name: (model.get_parameter(name).shape, outline.dtype) for name in _whole_model(model)}
    else:
        from sheepfold.engines.carriers import carrier

        carried = carrier(model, [], experiment.adapter, experiment.seed, task=asked)
        trained = {n.removesuffix("/extra"): (t.shape, torch.float32) for n, t in carried.factors().items()}
    return Adapter(extra={n: torch.empty(shape, dtype=d, device="meta") for n, (shape, d) in trained.items()})


def _whole_model(model: Any) -> list[str]:
    """Return the names of the tensors that method full trains: all, or those that an emulator's owner listed."""
    cut = cut_in(model)
    return offsite_names(model, cut) if cut else [name for name, _ in model.named_parameters()]


def _adapter_size(experiment: Experiment, outline: Outline, widest: Mapping[str, int], asked: Task) -> tuple[int, int]:
    """Return how many numbers the global adapter has, and how many modules are adapted."""
    model: Any = outline.model
    start = read_start(experiment, model)
    if start is not None:
        return sum(t.numel() for t in start.tensors().values()), len(start.pairs) + len(asked.whole(model))
    if experiment.adapter.method == "lora":
        sites, whole = sites_of(experiment, model, asked), asked.whole(model)
        numbers = adapter_numbers({path: linear_shape(layer) for path, layer in sites.items()}, widest)
        numbers += sum(model.get_parameter(name).numel() for name in whole_names(model, asked))
        return numbers, len(sites) + len(whole)
    if experiment.adapter.method == "full":
        names = _whole_model(model)
        return sum(model.get_parameter(name).numel() for name in names), len(names)
    if experiment.adapter.method == SEEDS:
        return seed_options(experiment.adapter.options).candidates, len(list(model.parameters()))
    from sheepfold.engines.carriers import carrier

    carried = carrier(model, [], experiment.adapter, experiment.seed, task=asked)
    trained = [p for p in carried.model.parameters() if p.requires_grad]
    return sum(p.numel() for p in trained), len(trained)
