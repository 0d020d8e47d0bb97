"""`sheepfold plan`: what a run would do, from the data and the base's configuration alone. No weights, no GPU."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sheepfold import planning
from sheepfold.assembly import check, check_length, load_data, read_start
from sheepfold.config import Experiment
from sheepfold.local.steps import steps_in_round
from sheepfold.models import config_only, load_tokenizer, pick_device
from sheepfold.sampler import sampler
from sheepfold.state import BatchPlan
from sheepfold.targets import find_targets, linear_shape


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
    downlink_bytes_a_round: int
    uplink_bytes_a_round: int
    base_bytes: int
    pass_bytes: int
    """Stacked adapters, gradients and moments of one pass."""
    device: str

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast, ready for JSON."""
        return asdict(self)


def forecast(experiment: Experiment) -> Forecast:
    """Return what a run of this experiment would do. Raises what the run itself would raise for its settings."""
    check(experiment)
    outline = config_only(experiment.model, experiment.device)
    check_length(experiment, outline.max_positions)
    data = load_data(experiment, load_tokenizer(experiment.model))
    chosen = sampler(experiment.federation, list(data.clients), experiment.seed)
    sizes = np.array([len(c.train) for c in data.clients.values()])
    lengths = data.tokens.lengths()
    mean_tokens = np.array([lengths[c.train].mean() if len(c.train) else 0.0 for c in data.clients.values()])
    steps = np.array([steps_in_round(experiment.train, int(n)) if n else 0 for n in sizes])
    rows = np.minimum(steps * experiment.train.batch_rows, _rows_seen(experiment, sizes, steps))
    share = chosen.size / len(sizes) * experiment.federation.rounds
    numbers, modules = _adapter_size(experiment, outline.model, outline.parameters)
    device = pick_device(experiment.device)
    plan = planning.batch_plan(experiment.train, numbers, chosen.size, device)
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
        downlink_bytes_a_round=4 * numbers * chosen.size,
        uplink_bytes_a_round=4 * numbers * chosen.size,
        base_bytes=outline.parameters * outline.dtype.itemsize,
        pass_bytes=planning.BYTES_PER_NUMBER * numbers * plan.clients_per_pass,
        device=str(device),
    )


def _rows_seen(experiment: Experiment, sizes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return the rows of `steps` steps, whose last one in every epoch may be short, (clients,)."""
    per_epoch = np.maximum(1, -(-sizes // experiment.train.batch_rows))
    whole, rest = np.divmod(steps, per_epoch)
    return np.asarray(whole * sizes + np.minimum(rest * experiment.train.batch_rows, sizes))


def _adapter_size(experiment: Experiment, model: Any, parameters: int) -> tuple[int, int]:
    """Return how many numbers travel, and how many modules are adapted."""
    start = read_start(experiment, model)
    if start is not None:
        return sum(t.numel() for t in start.tensors().values()), len(start.pairs)
    if experiment.adapter.method == "lora":
        shapes = [linear_shape(layer) for layer in find_targets(model, experiment.adapter.targets).values()]
        return sum(experiment.adapter.rank * (d_in + d_out) for d_in, d_out in shapes), len(shapes)
    if experiment.adapter.method == "full":
        return parameters, len(list(model.parameters()))
    from sheepfold.engines.carriers import carrier

    trained = [p for p in carrier(model, [], experiment.adapter, experiment.seed).model.parameters() if p.requires_grad]
    return sum(p.numel() for p in trained), len(trained)


def show(foreseen: Forecast) -> None:
    """Print a forecast for people."""
    from sheepfold.display import size
    from sheepfold.terminal import console, table

    f = foreseen
    view = table("what this run would do", "", "")
    view.show_header, view.columns[1].justify = False, "left"
    for name, value in (
        ("clients", f"{f.clients:,}, {f.cohort:,} a round, {f.rounds} rounds"),
        ("rows", f"{f.train_rows:,} for training, {f.eval_rows:,} held out"),
        ("base", f"{f.base_parameters:,} parameters, {size(f.base_bytes)} on {f.device}"),
        ("adapter", f"{f.adapter_numbers:,} numbers in {f.adapted_modules} modules, {size(4 * f.adapter_numbers)}"),
        (
            "work",
            f"{f.steps_a_round:,} client steps a round; {f.rows_in_all:,} rows, {f.tokens_in_all:,} tokens",
        ),
        (
            "passes",
            f"{f.plan.clients_per_pass} clients together, at most {f.plan.micro_tokens:,} tokens a forward pass",
        ),
        (
            "memory",
            f"{size(f.base_bytes + f.pass_bytes)} for base and stacked adapters, and one pass's activations",
        ),
        ("traffic", f"{size(f.downlink_bytes_a_round)} down and {size(f.uplink_bytes_a_round)} up a round"),
    ):
        view.add_row(name, value)
    console().print(view)
