"""From an experiment to its parts: base, data, engine, sampler, strategy. Cheap checks come before heavy loading."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sheepfold import adapter_methods, planning, quantised, stopping
from sheepfold.adapter import Adapter
from sheepfold.config import Experiment
from sheepfold.data.rows import FederatedData
from sheepfold.engines import spreading
from sheepfold.engines.cohort import CohortEngine
from sheepfold.engines.injection import CohortModel
from sheepfold.engines.peft_methods import check_options
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.engines.zeroth_order import ZerothOrderEngine
from sheepfold.errors import ConfigError, ModelError, require
from sheepfold.evaluation.text_metrics import Metric
from sheepfold.local import optimizers, rules
from sheepfold.models import Base, Outline, config_only, load_base, load_tokenizer
from sheepfold.needs import Need, need_of
from sheepfold.offsite import align, full
from sheepfold.offsite.align import AlignRows
from sheepfold.offsite.cut import check_method, cut_in, restricted, trained
from sheepfold.offsite.full import Closed
from sheepfold.personal import check_patterns, check_personal, keeping_local
from sheepfold.rank_choice import may_mix
from sheepfold.ranks import client_ranks, memory_need, mixed
from sheepfold.sampler import UniformSampler, sampler
from sheepfold.state import BatchPlan, ServerState, Setting
from sheepfold.strategies import strategy
from sheepfold.strategies.base import ServerStep, Strategy, cut
from sheepfold.targets import find_targets, is_conv1d, linear_shape, new_adapter
from sheepfold.tasks import task
from sheepfold.tasks.base import Task
from sheepfold.wire.ends import over_the_wire, terms

AnyEngine = CohortEngine | PeftModelEngine


@dataclass(frozen=True, slots=True)
class Site:
    """One machine of a run between machines: who takes part, and what of all rows is here."""

    clients: Sequence[str]
    """Everybody, in the order that draws of cohorts and ranks go by"""
    data: Callable[[Any, Task], FederatedData]
    """(tokenizer, task) -> the rows here: a client's own, or the server's, which has no client's"""
    load: Callable[..., Base] = load_base
    """models.load_base, or what gives a base that was loaded before"""
    serves: bool = False
    """Whether it is the server's, which trains what its method has the server train, and has no client's rows"""


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
    """The fresh adapter, at each module's largest rank"""
    first: ServerState
    """The state before round 1"""
    task: Task
    """With the data's labels, where it has labels"""
    server: ServerStep | None = None
    """What the server trains after each fold"""
    closed: Closed | None = None
    """The full model, where clients have an emulator of it"""
    need: Need | None = None
    """What training takes of the memory, where that can be told"""
    apart: bool = False
    """Whether clients' rows are on machines of their own; `data` then has those of this machine alone"""

    @property
    def clients(self) -> Sequence[str]:
        """Everybody who takes part, wherever their rows are."""
        return self.setting.clients

    def start(self) -> ServerState:
        """Return the state before round 1."""
        return replace(self.first, plan=self.engine.plan)

    @property
    def setting(self) -> Setting:
        """What all rounds have in common."""
        return self.first.setting

    def alone(self, client: str) -> Adapter:
        """Return what a client starts from that trains by itself: the fresh adapter at its own ranks."""
        own = self.setting.ranks.get(client)
        return self.initial if own is None else at_ranks(self.initial, own, self.setting.alpha)

    @property
    def personal(self) -> bool:
        """Whether a client ends with another adapter than the global one."""
        return self.experiment.personal.wanted or self.keeps or bool(self.setting.ranks)

    @property
    def keeps(self) -> bool:
        """Whether clients keep a part of the adapter to themselves."""
        return any(self.engine.private(name) for name in self.initial.tensors())


@dataclass(frozen=True, slots=True)
class Foundation:
    """What can be known of a run without its base's weights."""

    task: Task
    outline: Outline
    tokenizer: Any
    data: FederatedData
    full: Outline | None = None
    """The full model, where `outline` is its emulator's"""
    align: AlignRows | None = None
    """What the emulator is aligned on"""


def check(experiment: Experiment, serves: bool = True) -> tuple[Strategy, dict[str, Metric]]:
    """Find out what can be found without data and model: names of parts, optimizer arguments, measures, stop keys.

    serves: whether this machine is the server, or all there is; what the server alone has is looked for there alone.
    Raises ConfigError for the first thing that is wrong.
    """
    made = strategy(experiment.federation, local_rule(experiment))
    made.check(experiment)
    if serves:
        made.check_server(experiment)
    made = over_the_wire(keeping_local(made, experiment), experiment)
    check_personal(experiment, made)
    terms(experiment, made)
    if made.pairs_only and experiment.adapter.method != "lora":
        raise ConfigError(
            f"federation.strategy {made.name}: it is about LoRA's A and B, and adapter.method is "
            f"{experiment.adapter.method!r}; fedavg, fedit, fedprox, scaffold and fedopt fold any adapter"
        )
    if experiment.adapter.method == adapter_methods.SEEDS and made.name != "fedkseed":
        raise ConfigError(
            f"federation.strategy {made.name}: adapter.method seeds goes with fedkseed alone, whose "
            "clients send scalars"
        )
    if may_mix(experiment.adapter.ranks) and not made.mixed_ranks:
        raise ConfigError(
            f"adapter.ranks: clients may differ, and federation.strategy {made.name} needs equal ranks; flora, "
            "flexlora, hetlora and heterolora take mixed ones"
        )
    check_options(experiment.adapter)
    if experiment.model.bits:
        require(f"model.bits {experiment.model.bits}", "quant", "bitsandbytes")
    asked = task(experiment)
    if made.beyond_peft and asked.name == "classification":
        raise ConfigError(
            f"federation.strategy {made.name}: it trains something else than LoRA's A and B, and has no place for a "
            "classifier's head beside it; fedavg, flora, fedex, flexlora, hetlora, fedprox, scaffold and fedopt do"
        )
    if experiment.offsite is not None and experiment.offsite.align is not None:
        align.check(experiment.offsite.align)
    optimizers.build(experiment.train, elementwise=experiment.train.engine == "cohort")
    spreading.check(experiment, made)
    if key := experiment.stop.key:
        stopping.check_name(key, asked.measures)
    return made, asked.metrics(experiment.evaluation.metrics)


def _try(name: str, metric: Metric, data: FederatedData) -> None:
    """Score one row with a metric, so that an own one that gives no number is found before anything trains."""
    if not len(data.records):
        return  # a server without rows: its clients try it
    score = metric(data.records[0], data.records[0].output)
    if not isinstance(score, int | float):
        raise ConfigError(f"evaluation.metrics {name!r}: gave a {type(score).__name__} for a row, expected a number")


def check_length(experiment: Experiment, positions: int | None) -> None:
    """Raise ConfigError where rows may be longer than the base's positions (None: it has no end of positions)."""
    virtual = adapter_methods.virtual_tokens(experiment.adapter.method, experiment.adapter.options)
    if positions is not None and experiment.data.max_tokens + virtual > positions:
        taken = f", and {virtual} virtual tokens take some" if virtual else ""
        raise ConfigError(
            f"data.max_tokens {experiment.data.max_tokens}: {experiment.model.base} has {positions} positions{taken}; "
            f"set it to {positions - virtual} or less"
        )


def local_rule(experiment: Experiment) -> rules.LocalRule | None:
    """Return the experiment's local rule with its arguments, or None."""
    train = experiment.train
    return rules.local_rule(train.local_rule, train.local_rule_args) if train.local_rule else None


def assemble(
    experiment: Experiment,
    plan: BatchPlan | None = None,
    emulator: Callable[[], Path] | None = None,
    site: Site | None = None,
    ready: Callable[[], object] | None = None,
    works: bool = False,
) -> Parts:
    """Return the parts of an experiment; `plan` is a resumed run's, else it follows from the machine.

    emulator: gives the folder of a closed model's emulator, which is made there unless it is there already. site: the
    one machine of several that this is; None: there is one, and it has all rows that the experiment names. ready:
    called when all is there but the base's weights. works: whether another process on the same data is the server.

    Raises ConfigError, DataError, ModelError or AdapterMismatch, each with its one line.
    """
    serves = not works if site is None else site.serves  # what the server trains is no client's to have
    made, metrics = check(experiment, serves)
    spreading.check_processes(experiment)
    if experiment.offsite is not None and emulator is None:
        raise ConfigError("offsite: only a run has clients that get an emulator; remove it here (offsite=null)")
    if experiment.offsite is not None and site is not None:
        raise ConfigError("offsite: an emulator has no way to another machine; remove it (offsite=null)")
    known = foundation(experiment, site)
    asked, outline, data = known.task, known.outline, known.data
    clients = list(data.clients if site is None else site.clients)
    more = 0.0 if site is None else experiment.network.over_selection
    chosen = sampler(experiment.federation, clients, experiment.seed, more)
    for name, metric in metrics.items():
        _try(name, metric, data)
    start = read_start(experiment, outline.model)
    ranks = clients_ranks(experiment, outline, clients)
    if experiment.adapter.method == "lora":
        check_patterns(experiment, [*sites_of(experiment, outline.model, asked), *whole_names(outline.model, asked)])
    # the heavy part, when all else is known to be there
    given, settings = None, experiment.model
    if emulator is not None and experiment.offsite is not None:
        given = full.written(experiment, known, emulator())
        settings = full.settings_of(given, settings)
    if ready is not None:
        ready()
    load = load_base if site is None else site.load
    base = spreading.loaded(load, experiment, settings, known.tokenizer, asked)
    train_rows = {name: rows.train for name, rows in data.clients.items()}
    sites = sites_of(experiment, base.model, asked) if experiment.adapter.method == "lora" else {}
    setting = make_setting(experiment, clients, ranks, sites, start, made)
    fresh = fresh_whole(base.model, asked)  # before an engine puts its own layers there
    engine = make_engine(experiment, base, data, sites, train_rows, made, asked)
    if isinstance(engine, PeftModelEngine) and not sites:
        initial = engine.initial()
    else:
        initial = first_adapter(experiment, sites, start, setting, fresh)
    check_patterns(experiment, [name.rpartition("/")[0] for name in initial.tensors()])
    first = made.begin(ServerState(0, initial, engine.plan, setting=setting))
    numbers = first.adapter.numbers_in_training
    need = None
    if given is None and (len(data.clients) or site is None):
        need = need_of(experiment, outline, asked, data.tokens, list(sites), first.adapter, made.local)
    engine.plan = plan or planning.batch_plan(experiment.train, numbers, chosen.size, base.device, need)
    if need is not None:
        engine.token_bytes = (need.in_a_pass(engine.plan) or 0) / engine.plan.micro_tokens
    closed = None
    if given is not None:
        whole = trained(base.model, given.cut) if experiment.adapter.method == "full" else []
        places, only = ([str(given.cut.plugged(name)) for name in names] for names in (sites, whole))

        def engine_on(full_base: Base) -> AnyEngine:
            """Return an engine on the full model, with adapters where its emulator has them."""
            own = {place: full_base.model.get_submodule(place) for place in places}
            return make_engine(experiment, full_base, data, own, train_rows, made, asked, only)

        closed = Closed(experiment, given, engine_on)
    parts = Parts(experiment, base, data, engine, chosen, made, metrics, initial, first, asked, closed=closed)
    parts = replace(parts, apart=site is not None, need=need)
    return replace(parts, server=made.server(parts)) if made.server and serves else parts


def foundation(experiment: Experiment, site: Site | None = None) -> Foundation:
    """Return what can be known without weights; a task with labels takes them from the data."""
    asked = task(experiment)
    outline = config_only(experiment.model, experiment.device, asked)
    check_length(experiment, outline.max_positions)
    tokenizer = load_tokenizer(experiment.model, asked)
    data = load_data(experiment, tokenizer) if site is None else site.data(tokenizer, asked)
    if data.labels:
        asked = task(experiment, data.labels)
        outline = config_only(experiment.model, experiment.device, asked)
    known = Foundation(asked, outline, tokenizer, data)
    if experiment.offsite is not None:
        return full.of_emulator(experiment, known)
    check_method(outline.model, experiment.adapter.method)
    return known


def sites_of(experiment: Experiment, model: Any, asked: Task) -> dict[str, Any]:
    """Return the modules that LoRA adapts, by path."""
    return restricted(model, find_targets(model, experiment.adapter.targets, asked.whole(model)))


def whole_names(model: Any, asked: Task) -> list[str]:
    """Return the names of the tensors that are trained whole beside LoRA."""
    return [name for names in asked.whole(model).values() for name in names]


def fresh_whole(model: Any, asked: Task) -> dict[str, Tensor]:
    """Return copies of those tensors as the base has them, in float32 or wider, on the CPU."""
    named = {name: model.get_parameter(name).detach() for name in whole_names(model, asked)}
    return {n: t.to("cpu", torch.promote_types(t.dtype, torch.float32), copy=True) for n, t in named.items()}


def clients_ranks(experiment: Experiment, outline: Outline, clients: list[str]) -> dict[str, Mapping[str, int]]:
    """Return every client's rank at every adapted module; nothing where adapters are no LoRA, or come from a folder.

    Raises ConfigError for ranks that the modules, the clients or their memory cannot have.
    """
    if experiment.adapter.method != "lora" or experiment.adapter.start:
        return {}
    layers = sites_of(experiment, outline.model, task(experiment))
    shapes = {path: linear_shape(layer) for path, layer in layers.items()}

    def room(ranks: Mapping[str, int]) -> int:
        return memory_need(shapes, ranks, outline.bytes, _activation_bytes(experiment, outline))

    return client_ranks(experiment.adapter.ranks, experiment.adapter.rank, clients, shapes, experiment.seed, room)


def make_setting(
    experiment: Experiment,
    clients: list[str],
    ranks: Mapping[str, Mapping[str, int]],
    sites: Mapping[str, Any],
    start: Adapter | None,
    made: Strategy,
) -> Setting:
    """Return what all rounds have in common."""
    types = list({id(own): own for own in ranks.values()}.values())
    widest = {path: max(own[path] for own in types) for path in types[0]} if types else {}
    return Setting(
        experiment.seed,
        clients,
        ranks if mixed(ranks) else {},
        widest,
        experiment.adapter.alpha if start is None else _alpha(experiment, start, made),
        experiment.train.steps,
        partial(_weight, sites),
    )


def _alpha(experiment: Experiment, start: Adapter, made: Strategy) -> float:
    """Return the alpha of a folder's adapter; raises ConfigError where it has several and the strategy needs one."""
    found = {round(pair.scale * pair.rank, 9) for pair in start.pairs.values()}
    if len(found) > 1 and made.mixed_ranks:
        raise ConfigError(
            f"adapter.start {experiment.adapter.start}: its modules have several alphas ({sorted(found)}), and "
            f"federation.strategy {made.name} scales all by one; fedavg goes on from any adapter"
        )
    return min(found)


def _activation_bytes(experiment: Experiment, outline: Outline) -> int:
    """Return about what one client's forward pass keeps for its backward pass.

    34 bytes a token, layer and unit of width in half precision, as a transformer block without recomputation keeps
    (Korthikanti et al., arXiv:2205.05198, eq. 2, without its attention maps, which sdpa does not keep).
    """
    whole: Any = outline.model.config
    config = whole.get_text_config()  # of a model that also sees, the part that reads
    layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    rows = experiment.train.micro_rows or experiment.train.batch_rows
    return 34 * rows * experiment.data.max_tokens * layers * width * outline.dtype.itemsize // 2


def _weight(sites: Mapping[str, Any], path: str) -> Tensor:
    """Return the base's weight at a module, (d_out, d_in), in float32 on the CPU."""
    weight = quantised.weight(sites[path]).float().cpu()
    return weight.T if is_conv1d(sites[path]) else weight


def at_ranks(adapter: Adapter, ranks: Mapping[str, int], alpha: float) -> Adapter:
    """Return the adapter's first rows and columns at these ranks, each pair scaled by alpha / rank."""
    pairs = {path: cut(pair, ranks[path], alpha / ranks[path]) for path, pair in adapter.pairs.items()}
    return replace(adapter, pairs=pairs)


def make_engine(
    experiment: Experiment,
    base: Base,
    data: FederatedData,
    sites: Mapping[str, Any],
    train_rows: Mapping[str, np.ndarray],
    made: Strategy,
    asked: Task,
    only: Sequence[str] | None = None,
) -> AnyEngine:
    """Return the engine that the experiment asks for, one client at a time until it gets its plan.

    only: the tensors that method full trains; None: all of a model, and of an emulator what its owner listed.
    """
    train, adapter = experiment.train, experiment.adapter
    model: Any = base.model
    plan = planning.batch_plan(train, 0, 1, base.device)
    common: dict[str, Any] = {"seed": experiment.seed, "plan": plan, "rule": made.local}
    common |= {"private": made.private, "ditto": experiment.personal.ditto, "task": asked}
    if train.engine == "cohort":
        cohort = CohortModel(model, sites, whole_names(model, asked))
        return CohortEngine(cohort, data.tokens, train_rows, train, adapter, **common)
    if train.engine == "zeroth_order":
        return ZerothOrderEngine(model, data.tokens, train_rows, train, adapter, **common)
    if only is None and (cut_ := cut_in(model)) is not None:
        only = trained(model, cut_)
    common |= {"beyond_peft": made.beyond_peft, "only": only}
    made_by = spreading.engine_class(experiment, base)
    return made_by(model, list(sites), data.tokens, train_rows, train, adapter, **common)


def load_data(experiment: Experiment, tokenizer: Any) -> FederatedData:
    """Return the experiment's data, tokenized once and cached."""
    from sheepfold.data import token_cache
    from sheepfold.data.prepare import prepare

    return prepare(experiment.data, tokenizer, token_cache.folder(experiment.cache), task(experiment))


def read_start(experiment: Experiment, model: Any) -> Adapter | None:
    """Return the adapter that the run starts from, checked against the base's shapes; None: a fresh one."""
    from sheepfold.peft_io import check_fits, read_peft

    if experiment.adapter.start is None:
        return None
    adapter = read_peft(experiment.adapter.start)
    check_fits(adapter, model)
    return adapter


def first_adapter(
    experiment: Experiment,
    sites: Mapping[str, Any],
    start: Adapter | None,
    setting: Setting,
    whole: Mapping[str, Tensor],
) -> Adapter:
    """Return the adapter before round 1: `start`, or A random and B zero beside the base's own whole tensors.

    Raises ModelError where `start` has other modules.
    """
    settings = experiment.adapter
    if start is None:
        return replace(new_adapter(sites, setting.widest, settings.alpha, experiment.seed), extra=whole)
    if odd_tensors := sorted(start.extra.keys() ^ whole.keys()):
        raise ModelError(
            f"adapter.start {settings.start}: {odd_tensors[0]} is trained whole in one of the folder and this "
            "experiment only; set task and adapter.modules_to_save as the folder has them"
        )
    if start.pairs.keys() != sites.keys():
        odd = sorted(start.pairs.keys() ^ sites.keys())[0]
        raise ModelError(
            f"adapter.start {settings.start}: {odd} is adapted in one of the folder and adapter.targets only; set "
            "adapter.targets to the folder's target_modules"
        )
    return start
