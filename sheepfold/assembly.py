"""From an experiment to its parts: base, data, engine, sampler, strategy. Cheap checks come before heavy loading."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sheepfold import planning
from sheepfold.adapter import Adapter
from sheepfold.config import Experiment
from sheepfold.data.rows import FederatedData
from sheepfold.engines.cohort import CohortEngine
from sheepfold.engines.injection import CohortModel
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.errors import ConfigError, ModelError
from sheepfold.evaluation.held_out import KEYS
from sheepfold.evaluation.text_metrics import Metric
from sheepfold.evaluation.text_metrics import resolve as resolve_metric
from sheepfold.local import optimizers, rules
from sheepfold.models import Base, config_only, load_base, load_tokenizer
from sheepfold.sampler import UniformSampler, sampler
from sheepfold.state import BatchPlan, ServerState
from sheepfold.strategies import strategy
from sheepfold.strategies.base import Strategy
from sheepfold.targets import find_targets, new_adapter

AnyEngine = CohortEngine | PeftModelEngine


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything a run is made of, ready to go."""

    experiment: Experiment
    base: Base
    data: FederatedData
    engine: AnyEngine
    sampler: UniformSampler
    strategy: Strategy
    metrics: Mapping[str, Metric]
    initial: Adapter

    def start(self) -> ServerState:
        """Return the state before round 1."""
        return ServerState(0, self.initial, self.engine.plan)


def check(experiment: Experiment) -> tuple[Strategy, dict[str, Metric]]:
    """Find out what can be found without data and model: names of parts, optimizer arguments, stop keys.

    Raises ConfigError for the first thing that is wrong.
    """
    made = strategy(experiment.federation, local_rule(experiment))
    made.check(experiment)
    optimizers.build(experiment.train, elementwise=experiment.train.engine == "cohort")
    metrics = {name: resolve_metric(name) for name in experiment.evaluation.metrics}
    if (key := experiment.stop.key) and key.removeprefix("loss.") not in KEYS:
        raise ConfigError(f"stop.key {key!r}: known: {', '.join(f'loss.{k}' for k in KEYS)}")
    return made, metrics


def _try(name: str, metric: Metric, data: FederatedData) -> None:
    """Score one row with a metric, so that an own one that gives no number is found before anything trains."""
    score = metric(data.records[0], data.records[0].output)
    if not isinstance(score, int | float):
        raise ConfigError(f"evaluation.metrics {name!r}: gave a {type(score).__name__} for a row, expected a number")


def check_length(experiment: Experiment, positions: int | None) -> None:
    """Raise ConfigError where rows may be longer than the base's positions (None: it has no end of positions)."""
    if positions is not None and experiment.data.max_tokens > positions:
        raise ConfigError(
            f"data.max_tokens {experiment.data.max_tokens}: {experiment.model.base} has {positions} positions; "
            f"set it to {positions} or less"
        )


def local_rule(experiment: Experiment) -> rules.LocalRule | None:
    """Return the experiment's local rule with its arguments, or None."""
    train = experiment.train
    return rules.local_rule(train.local_rule, train.local_rule_args) if train.local_rule else None


def assemble(experiment: Experiment, plan: BatchPlan | None = None) -> Parts:
    """Return the parts of an experiment; `plan` is a resumed run's, else it follows from the machine.

    Raises ConfigError, DataError, ModelError or AdapterMismatch, each with its one line.
    """
    made, metrics = check(experiment)
    outline = config_only(experiment.model, experiment.device)
    check_length(experiment, outline.max_positions)
    tokenizer = load_tokenizer(experiment.model)
    data = load_data(experiment, tokenizer)
    chosen = sampler(experiment.federation, list(data.clients), experiment.seed)
    for name, metric in metrics.items():
        _try(name, metric, data)
    start = read_start(experiment, outline.model)
    # the heavy part, when all else is known to be there
    base = load_base(experiment.model, experiment.device, tokenizer)
    train_rows = {name: rows.train for name, rows in data.clients.items()}
    sites = find_targets(base.model, experiment.adapter.targets) if experiment.adapter.method == "lora" else {}
    initial = first_adapter(experiment, sites, start) if sites else None
    numbers = sum(t.numel() for t in initial.tensors().values()) if initial else 0
    plan = plan or planning.batch_plan(experiment.train, numbers, chosen.size, base.device)
    engine = make_engine(experiment, base, data, sites, train_rows, plan, made)
    if initial is None:
        assert isinstance(engine, PeftModelEngine)
        initial = engine.initial()
    return Parts(experiment, base, data, engine, chosen, made, metrics, initial)


def make_engine(
    experiment: Experiment,
    base: Base,
    data: FederatedData,
    sites: Mapping[str, Any],
    train_rows: Mapping[str, np.ndarray],
    plan: BatchPlan,
    made: Strategy,
) -> AnyEngine:
    """Return the engine that the experiment asks for."""
    train, adapter = experiment.train, experiment.adapter
    model: Any = base.model
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    common: dict[str, Any] = {"seed": experiment.seed, "plan": plan, "rule": made.local}
    if train.engine == "cohort":
        cohort = CohortModel(model, sites)
        return CohortEngine(cohort, data.tokens, train_rows, train, adapter, **common)
    return PeftModelEngine(model, list(sites), data.tokens, train_rows, train, adapter, **common)


def load_data(experiment: Experiment, tokenizer: Any) -> FederatedData:
    """Return the experiment's data, tokenized once and cached."""
    from sheepfold.data import token_cache
    from sheepfold.data.prepare import prepare

    return prepare(experiment.data, tokenizer, token_cache.folder(experiment.cache))


def read_start(experiment: Experiment, model: Any) -> Adapter | None:
    """Return the adapter that the run starts from, checked against the base's shapes; None: a fresh one."""
    from sheepfold.peft_io import check_fits, read_peft

    if experiment.adapter.start is None:
        return None
    adapter = read_peft(experiment.adapter.start)
    check_fits(adapter, model)
    return adapter


def first_adapter(experiment: Experiment, sites: Mapping[str, Any], start: Adapter | None) -> Adapter:
    """Return the adapter before round 1: `start`, or A random and B zero. Raises ModelError for other modules."""
    settings = experiment.adapter
    if start is None:
        return new_adapter(sites, settings.rank, settings.alpha, experiment.seed)
    if start.pairs.keys() != sites.keys():
        odd = sorted(start.pairs.keys() ^ sites.keys())[0]
        raise ModelError(
            f"adapter.start {settings.start}: {odd} is adapted in one of the folder and adapter.targets only; set "
            "adapter.targets to the folder's target_modules"
        )
    return start
