"""`sheepfold plan`: what a run would do, from the data and the base's configuration alone. No weights, no GPU."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from sheepfold import planning
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
from sheepfold.models import Outline, pick_device
from sheepfold.offsite.cut import cut_in
from sheepfold.offsite.cut import trained as offsite_names
from sheepfold.personal import check_patterns
from sheepfold.ranks import adapter_numbers
from sheepfold.sampler import sampler
from sheepfold.state import BatchPlan, ServerState
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
    """Stacked adapters, gradients and moments of one pass."""
    device: str
    public_rows: int = 0
    """Rows that the server has"""
    server: Foreseen | None = None
    """What the server trains itself"""
    full_parameters: int | None = None
    """Of the full model, where the base that clients get is its emulator"""
    full_bytes: int = 0
    """What it takes beside the emulator, where it is judged too"""

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast, ready for JSON."""
        return asdict(self)


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
    plan = planning.batch_plan(experiment.train, numbers, chosen.size, device)
    down, up = _traffic(experiment, made, known, ServerState(0, Adapter(), plan, setting=setting), numbers)
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
        base_bytes=outline.parameters * outline.dtype.itemsize,
        pass_bytes=_pass_bytes(experiment, outline, numbers * plan.clients_per_pass),
        device=str(device),
        public_rows=len(data.public),
        server=made.foresee(experiment) if made.foresee else None,
        full_parameters=None if known.full is None else known.full.parameters,
        full_bytes=_full_bytes(experiment, known.full),
    )


def _full_bytes(experiment: Experiment, full: Outline | None) -> int:
    judged = experiment.offsite is not None and "full" in experiment.offsite.evaluate
    return full.parameters * full.dtype.itemsize if full is not None and judged else 0


def _pass_bytes(experiment: Experiment, outline: Outline, numbers: int) -> int:
    """Return what a pass needs beside the base and activations; seeds: two vectors of all weights, in float32."""
    return 8 * outline.parameters if experiment.adapter.method == SEEDS else planning.BYTES_PER_NUMBER * numbers


def _rows_seen(experiment: Experiment, sizes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return the rows of `steps` steps, whose last one in every epoch may be short, (clients,)."""
    per_epoch = np.maximum(1, -(-sizes // experiment.train.batch_rows))
    whole, rest = np.divmod(steps, per_epoch)
    return np.asarray(whole * sizes + np.minimum(rest * experiment.train.batch_rows, sizes))


def _traffic(
    experiment: Experiment, made: Strategy, known: Foundation, state: ServerState, numbers: int
) -> tuple[float | None, float | None]:
    """Return the bytes of a client's assignment and update in round 1, the mean over clients; None: not foreseen."""
    outline = known.outline
    if made.beyond_peft:
        return None, None  # its first rounds are made from the base's weights, which are not loaded here
    if experiment.adapter.method == "lora":
        sites = sites_of(experiment, outline.model, known.task)
        start = read_start(experiment, outline.model)
        names = whole_names(outline.model, known.task)
        check_patterns(experiment, [*sites, *names])
        whole = {name: torch.zeros(outline.model.get_parameter(name).shape) for name in names}
        first = first_adapter(experiment, sites, start, state.setting, whole)
    elif experiment.adapter.method == SEEDS:
        first = Adapter(extra={SUMS: torch.zeros(numbers)})
    else:
        first = _in_place(experiment, outline, known.task)
    state = made.begin(replace(state, adapter=first))
    lr = round_lr(experiment.train, 0, rounds=experiment.federation.rounds)
    steps = {name: steps_in_round(experiment.train, len(c.train)) for name, c in known.data.clients.items()}
    each = list(traffic(state, made, terms(experiment, made), experiment.train.engine, lr, steps))
    down, up = np.array(each, dtype=np.float64).mean(0)
    return float(down), float(up)


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


def _shown(f: Forecast) -> str:
    from sheepfold.display import size

    if f.downlink_bytes is None or f.uplink_bytes is None:
        return "not foreseen for this method; the journal counts it"
    return f"{size(f.downlink_bytes)} down and {size(f.uplink_bytes)} up in round 1"


def _public(f: Forecast) -> str:
    return f", {f.public_rows:,} the server's" if f.public_rows else ""


def _server(s: Foreseen) -> str:
    from sheepfold.display import size

    kept = f"every saved state holds {size(s.state_bytes)} of what it learns" if s.state_bytes else "it learns nothing"
    return f"a teacher of {s.parameters:,} parameters; {size(s.bytes)} with the server's copy of the student; {kept}"


def _which(f: Forecast) -> str:
    return "" if f.full_parameters is None else f"an emulator of {f.full_parameters:,} parameters: "


def show(foreseen: Forecast) -> None:
    """Print a forecast for people."""
    from sheepfold.display import size, together
    from sheepfold.terminal import console, table

    f = foreseen
    view = table("what this run would do", "", "")
    view.show_header, view.columns[1].justify = False, "left"
    for name, value in (
        ("clients", f"{f.clients:,}, {f.cohort:,} a round, {f.rounds} rounds"),
        ("rows", f"{f.train_rows:,} for training, {f.eval_rows:,} held out{_public(f)}"),
        ("base", f"{_which(f)}{f.base_parameters:,} parameters, {size(f.base_bytes)} on {f.device}"),
        ("adapter", f"{f.adapter_numbers:,} numbers in {f.adapted_modules} modules, {size(4 * f.adapter_numbers)}"),
        (
            "work",
            f"{f.steps_a_round:,} client steps a round; {f.rows_in_all:,} rows, {f.tokens_in_all:,} tokens",
        ),
        (
            "passes",
            f"{together(f.plan.clients_per_pass)}, at most {f.plan.micro_tokens:,} tokens a forward pass",
        ),
        (
            "memory",
            f"{size(f.base_bytes + f.pass_bytes)} for base and stacked adapters, and one pass's activations"
            + (f"; {size(f.full_bytes)} for the full model" if f.full_bytes else ""),
        ),
        ("traffic", _shown(f)),
        *([("server", _server(f.server))] if f.server else []),
    ):
        view.add_row(name, value)
    console().print(view)
