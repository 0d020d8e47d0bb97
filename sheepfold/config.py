"""The experiment file: every option, its meaning, unit and default, and what cannot be combined.

One file describes a run in simulation and between machines. Nothing heavy is imported here, so a wrong key, value or
combination is reported before torch, a data set or a model is loaded.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from sheepfold import adapter_methods, rank_choice, tracking
from sheepfold.errors import ConfigError, suggest
from sheepfold.network.settings import NetworkSettings
from sheepfold.offsite import settings as offsite_settings
from sheepfold.offsite.settings import OffsiteSettings
from sheepfold.section import Fraction, Positive, Section, Share, first_problem

RankChoice = Annotated[
    Positive | str | tuple[Positive | Mapping[str, Positive], ...] | Mapping[str, Any] | None,
    BeforeValidator(rank_choice.validate),
]


class ModelSettings(Section):
    """The frozen base that every client shares."""

    base: str = "builtin:tiny"
    """Hub id, local folder, or `builtin:tiny`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, where it is not beside the weights."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights; auto: float32 on a CPU, bfloat16 where the device has it, else float16."""
    bits: Literal[8, 4] | None = None
    """Quantise the base's linear layers with bitsandbytes as they are read: to 8 bits (as LLM.int8() keeps them) or 4
    (NF4, as QLoRA); needs sheepfold[quant]. null: as they are."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation, as transformers names it; auto: sdpa, or eager for families without it."""
    head: Literal["auto", "new"] = "auto"
    """task classification; auto: the base's own head, or a new one where the base has none; new: a new one anyway."""


class AdapterSettings(Section):
    """What the clients train on top of the base."""

    method: str = "lora"
    """lora, rslora (both engines); dora, prefix, p-tuning, prompt, ia3 or another of PEFT's, by its name there; full:
    all weights (all these: peft_model engine); seeds: all weights, without gradients (zeroth_order engine)."""
    rank: Positive = 8
    """LoRA rank r; this, ranks, alpha, dropout and targets are for lora, rslora and dora."""
    ranks: RankChoice = None
    """Instead of rank, where clients or modules differ: a list, dealt to the clients; client -> rank, with a default; a
    distribution over FlexLoRA's types (homo, random, heavy_tail, heavy_tail_strong, normal); {distribution, types};
    {by-memory, types}. A rank is a number, or one for each group: {attention: 30, mlp: 200} (docs/from-flexlora.md)."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """LoRA alpha: the adapter's output is scaled by alpha / rank (rslora: by alpha / sqrt(rank), and written down as
    lora with the alpha that this makes)."""
    dropout: Share = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    """auto: PEFT's table for the model family; all-linear: every linear layer but the head; or module names."""
    modules_to_save: Literal["auto"] | tuple[str, ...] = "auto"
    """Modules trained and sent whole beside the LoRA pairs, as PEFT calls them; auto: a classifier's head, nothing of a
    causal LM."""
    start: str | None = None
    """A PEFT folder to start from, instead of A random and B zero; rank and alpha are then the folder's."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of the PEFT config class, for methods other than lora; of seeds: candidates (4096), how many directions
    there are, and eps (0.0005), how far a step looks along one."""

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        return adapter_methods.settled(values)

    @model_validator(mode="after")
    def _virtual_tokens(self) -> Self:
        adapter_methods.check_soft(self.method, self.options)
        if self.method == adapter_methods.SEEDS:
            adapter_methods.seed_options(self.options)
        return self

    @model_validator(mode="after")
    def _one_way_to_say_ranks(self) -> Self:
        if self.ranks is not None and self.method != "lora":
            raise ValueError(f"ranks has no effect with method {self.method!r}; remove it")
        if self.ranks is not None and self.start:
            raise ValueError("ranks has no effect with start, whose folder says the ranks; remove one of them")
        if self.ranks is not None and self.rank != 8:  # 8 may be a resolved file's: it has every default written out
            raise ValueError(
                f"rank {self.rank} and ranks are both set; keep one of them (rank=8, the default, counts as unset)"
            )
        return self


class PartitionSettings(Section):
    """How one pile of rows becomes clients."""

    by: str = "iid"
    """iid, order (consecutive rows), shards, dirichlet, meta, natural, quantity, files (per-client files), a partition
    file (.json), or module:function."""
    clients: Positive = 10
    """Number of clients; natural and files take it from the data."""
    seed: int = 42
    """The partition's own seed: the run's seed never moves rows between clients."""
    column: str = "category"
    """The label that shards, dirichlet and meta look at; for natural: the client column ('client')."""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """Dirichlet concentration (dirichlet: of labels over clients; quantity: of sizes)."""
    min_rows: Annotated[int, Field(ge=0)] = 1
    """dirichlet, quantity: redraw until every client has this many rows."""
    shards_per_client: Positive = 2
    """shards: rows sorted by label are cut into clients x this many shards."""
    holdout_per_category: Annotated[int, Field(ge=0)] = 0
    """Rows of each category kept out of every client, as a global test set (Shepherd holds out 10)."""


class PublicSettings(Section):
    """Rows that the server has, and no client: for fedkd to distil on, and for `sheepfold finetune --on public`."""

    share: Share = 0.0
    """This share of the rows."""
    pick: Literal["first", "random"] = "first"
    """Which rows the share is: the first ones, or any (drawn by data.partition.seed)."""
    source: str | None = None
    """Instead of a share: another split of the source (such as validation), or a file, all of it."""

    @model_validator(mode="after")
    def _one_way_to_say_rows(self) -> Self:
        if self.source is not None and self.share:
            raise ValueError(
                f"share {self.share} and source {self.source!r} are both set; keep one of them (share=0 counts "
                "as unset)"
            )
        if self.pick != "first" and not self.share:
            raise ValueError(f"pick {self.pick!r} has no effect without share; set share, such as 0.2")
        return self

    @property
    def wanted(self) -> bool:
        """Whether the server has rows of its own."""
        return bool(self.share or self.source)


class DataSettings(Section):
    """Where rows come from, how they are split, and how they become tokens."""

    source: str = "corpus"
    """corpus (built in), a named set (dolly, alpaca, ...), a hub id, a local file or folder, or module:function."""
    path: str | None = None
    """A local file or folder with the named source's rows, where the hub is not wanted."""
    split: str = "train"
    """Which split of a hub data set; all: every split, kept apart as training, evaluation and test rows."""
    test_split: str | None = None
    """Another split of the source (such as validation), or a file, as the global test set, which no client holds."""
    fields: Mapping[str, str] = Field(default_factory=dict)
    """Field map for own data: instruction, input, output, category, client, messages -> column name; an empty name
    means that there is none."""
    rows: Positive | None = None
    """Take at most this many rows; for the built-in corpus: how many to make (2,000 where not set, at most 8,000)."""
    subsample: Fraction = 1.0
    """Keep this share of the rows of each category (Natural Instructions: of each task)."""
    seed: int = 42
    """Seed of the built-in corpus, the subsample and the split inside each client."""
    partition: PartitionSettings = PartitionSettings()
    public: PublicSettings = PublicSettings()
    eval_share: Share = 0.1
    """Share of each client's rows held out for evaluation."""
    test_share: Share = 0.0
    """Share of each client's rows held out for a final test."""
    labels: tuple[str, ...] = ()
    """task classification: the labels, in the order of the head's outputs; default: the named set's, else sorted."""
    template: str = "auto"
    """auto (the tokenizer's chat template, else alpaca), chat, alpaca, alpaca_short, alpaca_legacy, vigogne, plain,
    vicuna, baize, a template file, or module:function."""
    system: str | None = None
    """System message for chat templates."""
    train_on_inputs: bool = False
    """Also learn the prompt's tokens, not only the answer's."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Longest row in tokens, prompt and answer together."""
    cut: Literal["right", "left"] = "right"
    """Which end of an over-long row is cut."""

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Self:
        if self.eval_share + self.test_share >= 1:
            raise ValueError(
                f"eval_share {self.eval_share} + test_share {self.test_share} leaves no training rows; "
                "make the sum less than 1"
            )
        return self


class TrainSettings(Section):
    """What one client does in one round."""

    engine: Literal["auto", "cohort", "peft_model", "zeroth_order"] = "auto"
    """cohort: LoRA of all sampled clients in one pass; peft_model: any adapter.method, one client at a time;
    zeroth_order: adapter.method seeds; auto: cohort for lora, zeroth_order for seeds, peft_model for other methods."""
    steps: Positive | None = None
    """Optimizer steps a round; set this or epochs."""
    epochs: Annotated[int, Field(gt=0)] | None = None
    """Passes over the client's rows a round; 1 where neither is set."""
    batch_rows: Positive = 16
    """Rows per optimizer step."""
    micro_rows: Positive | None = None
    """Rows of one client per forward pass; default: batch_rows. Smaller needs less memory, same result."""
    optimizer: str = "adamw"
    """adamw, sgd, or any class of torch.optim by name; built fresh each round. adapter.method seeds: sgd."""
    optimizer_args: Mapping[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, such as momentum, betas, eps."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """The optimizer's weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate within a round, from its peak to zero (linear, cosine)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up at the start of each round."""
    round_schedule: Literal["constant", "linear", "cosine", "halve"] = "constant"
    """Peak learning rate over rounds; halve: half from round `halve_after` on."""
    halve_after: Positive = 15
    """Rounds at the full rate before `round_schedule: halve` halves it (FlexLoRA: 15)."""
    grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """L2 bound on each client's own gradient; null: no bound. adapter.method seeds: bound on a step's
    scalar, by default none."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, a third more time, the same result; null: where a
    forward pass that does not fit the memory gets no smaller (not with sharding, nor in finetune); false: never."""
    packing: bool | None = None
    """cohort: rows end to end without padding, each attending to itself; null: on a GPU in bfloat16, for families whose
    rows come out the same in a trial; true: anywhere, though on a CPU padding rows of like length is faster."""
    compile: bool = False
    """cohort: compile the base's blocks with torch.compile: for long runs, since the first steps take a minute."""
    clients_per_pass: Positive | None = None
    """cohort: how many clients share a pass; default: as many as memory allows."""
    batch_devices: tuple[str, ...] = ()
    """peft_model: devices of this process that share each client's batch, such as [cuda:0, cuda:1]; each has a replica
    of the model. `device` is the first of them."""
    sharding: Literal["none", "fsdp", "deepspeed"] = "none"
    """peft_model, under torchrun: all processes train one client together, each with its share of the model (fsdp:
    torch's FSDP2; deepspeed: ZeRO) and of every step's rows. See docs/engines.md."""
    sharding_args: Mapping[str, Any] = Field(default_factory=dict)
    """deepspeed: {stage: 1, 2 or 3 (default), offload_optimizer: cpu, offload_param: cpu}, or {config: a file of
    DeepSpeed's own options}."""
    local_rule: str | None = None
    """A further penalty on every client's loss: proximal, or module:rule (see docs/extending.md)."""
    local_rule_args: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of the rule, such as mu."""

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps {self.steps} and epochs {self.epochs} are both set; keep one of them")
        if self.micro_rows is not None and self.micro_rows > self.batch_rows:
            raise ValueError(
                f"micro_rows {self.micro_rows} is more than batch_rows {self.batch_rows}; "
                "a micro-batch is a part of a step"
            )
        if self.halve_after != 15 and self.round_schedule != "halve":
            raise ValueError(f"halve_after {self.halve_after} has no effect without round_schedule halve")
        if self.local_rule_args and self.local_rule is None:
            raise ValueError("local_rule_args has no effect without local_rule; set local_rule, such as proximal")
        for key in ("packing", "compile"):
            if getattr(self, key) and self.engine not in ("auto", "cohort"):
                raise ValueError(f"{key} has no effect in engine {self.engine}; remove it")
        if problem := self._over_devices():
            raise ValueError(problem)
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self

    def _over_devices(self) -> str | None:
        """Return what is wrong with how a client is spread over devices; None where nothing is."""
        asked = {"batch_devices": bool(self.batch_devices), f"sharding {self.sharding}": self.sharding != "none"}
        named = [name for name, is_asked in asked.items() if is_asked]
        if len(named) == 2:
            return f"{' and '.join(named)} are both set; keep one way to spread a client over devices"
        if named and self.engine not in ("auto", "peft_model"):
            return f"{named[0]} has no effect in engine {self.engine}; set engine to peft_model"
        if len(self.batch_devices) == 1:
            return f"batch_devices has {self.batch_devices[0]} alone; name two or more, or set `device` instead"
        if self.sharding_args and self.sharding != "deepspeed":
            return f"sharding_args has no effect with sharding {self.sharding}; remove it"
        return None


class WireSettings(Section):
    """How numbers travel, each way (docs/wire.md)."""

    up: Literal["fp32", "bf16", "int8"] = "fp32"
    """Updates: fp32, every number as it is; bf16, each client's change in bfloat16; int8, its change in 8 bits with a
    scale a row, and what that lost added to its next one."""
    down: Literal["fp32", "bf16", "int8"] = "fp32"
    """Assignments: fp32, every number as it is; bf16 or int8, rounded, where the server goes on with its exact ones."""


class FederationSettings(Section):
    """Who takes part, and how updates become one adapter."""

    strategy: str | Annotated[tuple[str, ...], Field(min_length=1)] = "fedavg"
    """How updates fold: fedavg, fedit, flora, fedex, flexlora, hetlora, heterolora, ffa_lora, rolora, fedsa, fed_sb,
    fedkseed (adapter.method seeds), or module:strategy.
    fedprox, scaffold, fedopt (fedavgm, fedadam, fedyogi, fedadagrad), slora and fedkd change another:
    a list composes, outermost first, such as [fedprox, flexlora]; by themselves they change fedavg."""
    strategy_args: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of the methods, such as mu or tau; each goes to the method that takes it (docs/methods.md). Those in a
    section named as a method, {fedprox: {mu: 0.1}}, are that method's alone, and wait while another one runs."""
    rounds: Positive = 5
    """Communication rounds."""
    clients_per_round: Positive | None = None
    """Clients sampled each round; set this or fraction."""
    fraction: Fraction | None = None
    """Share of the clients sampled each round: max(int(fraction * clients), 1); all where neither is set."""
    weights: Literal["auto", "rows", "target_tokens", "processed_rows", "uniform"] = "auto"
    """A client's weight in the fold: its training rows, their target tokens, the rows it processed, or 1; auto: as the
    method's paper has it, rows for most."""
    wire: WireSettings = WireSettings()
    norm_bound: Annotated[float, Field(gt=0)] | None = None
    """L2 bound on all that one client's update changes: clients shorten theirs to it, and the server rejects what is
    longer; null: no bound."""

    @model_validator(mode="after")
    def _number_or_fraction(self) -> Self:
        if self.clients_per_round is not None and self.fraction is not None:
            raise ValueError(
                f"clients_per_round {self.clients_per_round} and fraction {self.fraction} are both set; "
                "keep one of them"
            )
        return self


class PersonalSettings(Section):
    """What a client has for itself, beside what everybody shares."""

    keep_local: tuple[str, ...] = ()
    """Modules whose adapter is never sent, by path or pattern ('layers.3', '*.down_proj'): each client has its own."""
    ditto: Annotated[float, Field(gt=0)] | None = None
    """Each sampled client also trains an adapter of its own, held near the global one: Ditto's lambda."""
    finetune_steps: Positive | None = None
    """After the last round every client trains the global adapter this many steps further on its own rows."""

    @model_validator(mode="after")
    def _one_last_word(self) -> Self:
        if self.ditto and self.finetune_steps:
            raise ValueError(
                "ditto has no effect with finetune_steps, which makes adapters of its own; keep one of them"
            )
        return self

    @property
    def wanted(self) -> bool:
        """Whether clients end with adapters of their own."""
        return bool(self.keep_local or self.ditto or self.finetune_steps)


class GenerationSettings(Section):
    """How answers are generated for generative metrics."""

    max_new_tokens: Positive = 32
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""
    top_p: Fraction = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many likeliest tokens; 0: no limit."""
    beams: Positive = 1
    """Search this many beams for the likeliest answer; 1: no search. More than one needs temperature 0."""
    batch_rows: Positive = 64
    """Rows generated together."""

    @model_validator(mode="after")
    def _search_or_sample(self) -> Self:
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(
                f"beams {self.beams} and temperature {self.temperature} are both set; search (temperature 0) or sample "
                "(beams 1)"
            )
        return self


class EvaluationSettings(Section):
    """What is measured, on which rows, and when."""

    every: Annotated[int, Field(ge=0)] = 1
    """Evaluate before round 1 and after every n-th round and the last; 0: only before and after the run."""
    split: Literal["eval", "test"] = "eval"
    """Which held-out rows of each client."""
    rows_per_client: Positive | None = None
    """At most this many held-out rows a client, always the same ones."""
    metrics: tuple[str, ...] = ()
    """Generative metrics at the end and in the closing table: exact_match, rouge_l, or module:metric. With task
    classification: what every evaluation measures beside accuracy: matthews, f1."""
    generation: GenerationSettings = GenerationSettings()
    batch_rows: Positive = 32
    """Rows per forward pass of the held-out loss, and of benchmarks."""
    tasks: tuple[str, ...] = ()
    """Benchmarks at the end of the run, such as [gsm8k, mmlu], or own rows, such as exact_match:rows.jsonl; see
    docs/evaluate.md and `sheepfold eval --tasks list`."""
    task_data: str | None = None
    """Folder with the benchmarks' files, or a file of own rows; null: the hub."""
    task_fields: Mapping[str, str] = Field(default_factory=dict)
    """Field map of own rows, as data.fields, and choices."""
    task_limit: Positive | None = None
    """At most this many rows of each task."""
    task_shots: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null: as many as the benchmark has."""
    task_new_tokens: Positive | None = None
    """Longest answer in tokens; null: as the benchmark says."""
    task_template: bool = False
    """Wrap the benchmarks' prompts in data.template, instead of the harness's plain prompts."""
    allow_code: bool = False
    """Agree to run programs that the model wrote (humaneval, humaneval_x)."""

    @model_validator(mode="after")
    def _tasks_have_a_use_for_their_options(self) -> Self:
        usual = {name: field.get_default(call_default_factory=True) for name, field in type(self).model_fields.items()}
        options = [name for name in usual if name.startswith(("task_", "allow"))]
        idle = [name for name in options if getattr(self, name) != usual[name]]
        if idle and not self.tasks:
            raise ValueError(f"{idle[0]} has no effect without tasks; set evaluation.tasks, such as [gsm8k]")
        return self


class StopSettings(Section):
    """Early stop on one named key of the held-out report."""

    key: str | None = None
    """Such as 'loss.weighted', 'loss.plain', 'loss.worst_decile' or 'loss.global'; with task classification also
    'accuracy.weighted' and so on; null: never stop early."""
    patience: Positive = 3
    """Evaluations without improvement before the run stops."""
    delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as improvement: better than the best (a lower loss, a higher accuracy) by more than this."""


class CardSettings(Section):
    """What only people know, for the model card."""

    license: str | None = None
    """Licence of the adapter, as the hub names it, such as apache-2.0."""
    base_license: str | None = None
    """Licence of the base; default: what its own README.md states."""
    data_license: str | None = None
    """Licence of the training data."""
    authors: tuple[str, ...] = ()
    """Who answers for it."""
    intended_use: str | None = None
    """What it is for, in a sentence or two."""


class Experiment(Section):
    """One run, wholly described."""

    name: str = "demo"
    """The run's name, and its folder's."""
    task: Literal["causal_lm", "classification"] = "causal_lm"
    """What is learned: answers, token by token, or a row's label."""
    seed: int = 0
    """Seed of everything but the data (see data.seed and data.partition.seed)."""
    output: str = "runs"
    """Folder that holds the runs' folders."""
    cache: str | None = None
    """Folder of the token cache; default: $SHEEPFOLD_CACHE, else ~/.cache/sheepfold."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    federation: FederationSettings = FederationSettings()
    network: NetworkSettings = NetworkSettings()
    personal: PersonalSettings = PersonalSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    offsite: OffsiteSettings | None = None
    """Closed models: clients get an emulator of model.base instead (docs/offsite.md); null: they get model.base."""
    stop: StopSettings = StopSettings()
    baselines: tuple[Literal["local", "centralised"], ...] = ()
    """Also train every client alone, and all rows in one place, for the closing table."""
    keep_rounds: Positive | None = None
    """Keep the state of every n-th round, for --resume-from."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Also hand the journal to these, as it grows (docs/tracking.md)."""
    tracker_args: Mapping[str, Mapping[str, str]] = Field(default_factory=dict)
    """Arguments of the trackers, such as {wandb: {project: sheep, mode: offline}}."""
    card: CardSettings = CardSettings()

    @model_validator(mode="before")
    @classmethod
    def _engine_of_the_method(cls, values: Any) -> Any:
        return _with_engine(values)

    @model_validator(mode="after")
    def _trackers_take_their_arguments(self) -> Self:
        tracking.check_arguments(self.trackers, self.tracker_args)
        return self

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        asked, partition = self.federation.clients_per_round, self.data.partition
        named = partition.by in ("iid", "order", "shards", "dirichlet", "meta", "quantity")
        if asked and named and asked > partition.clients:
            raise ValueError(
                f"federation.clients_per_round {asked} is more than data.partition.clients {partition.clients}"
            )
        needed, engine = adapter_methods.engine(self.adapter.method), self.train.engine
        if engine != needed and "zeroth_order" in (engine, needed):
            raise ValueError(f"adapter.method {self.adapter.method!r} needs train.engine {needed}, found {engine}")
        if self.adapter.method != "lora" and engine == "cohort":
            raise ValueError(
                f"adapter.method {self.adapter.method!r} needs train.engine peft_model; the cohort engine trains lora"
            )
        if problem := self._without_effect():
            raise ValueError(problem)
        if self.adapter.options and self.adapter.method in ("lora", "full"):
            raise ValueError(f"adapter.options has no effect with adapter.method {self.adapter.method!r}; remove it")
        if self.adapter.method in adapter_methods.CACHED and self.train.gradient_checkpointing:
            raise ValueError(
                f"train.gradient_checkpointing with adapter.method {self.adapter.method!r}: checkpointing drops the "
                "attention cache, which holds the prefix; set it to false, or take p-tuning or prompt"
            )
        if problem := offsite_settings.problem(self) or self._over_quantised_weights():
            raise ValueError(problem)
        if self.adapter.start and self.adapter.method != "lora":
            raise ValueError(f"adapter.start has no effect with adapter.method {self.adapter.method!r}; remove it")
        if self.train.clients_per_pass and engine != "cohort":
            raise ValueError(f"train.clients_per_pass has no effect in train.engine {engine}; remove it")
        if self.train.batch_devices and self.device not in ("auto", self.train.batch_devices[0]):
            raise ValueError(
                f"device {self.device!r} is not the first of train.batch_devices ({self.train.batch_devices[0]}); "
                "leave it auto"
            )
        if self.stop.key and self.evaluation.every == 0:
            raise ValueError("stop.key needs evaluations during the run; set evaluation.every to 1 or more")
        if any(c in self.name for c in "/\\\0") or self.name in ("", ".", ".."):
            raise ValueError(f"name {self.name!r} must be a plain folder name")
        return self

    def _over_quantised_weights(self) -> str | None:
        """Return what cannot be done over quantised weights; None where all can."""
        bits, method = self.model.bits, self.adapter.method
        if bits and method in adapter_methods.WHOLE:
            return (
                f"model.bits {bits} with adapter.method {method!r}: it trains the weights themselves, and quantised "
                "ones stay as they are; take lora, or remove model.bits"
            )
        if bits and method not in adapter_methods.OVER_QUANTISED:
            known = ", ".join(adapter_methods.OVER_QUANTISED)
            return f"model.bits {bits} with adapter.method {method!r}: it needs whole weights; these do not: {known}"
        if bits and self.offsite is not None:
            return f"model.bits {bits} with offsite: an emulator is made of whole weights; remove one of them"
        if bits and self.model.dtype == "float64":
            return f"model.bits {bits} with model.dtype float64: quantised weights are no more exact than float32"
        return None

    def _without_effect(self) -> str | None:
        """Return what to say of an option that the task has no use for; None where there is none."""
        classifies = self.task == "classification"
        data, whole = self.data, self.adapter.modules_to_save != "auto"
        others = {
            "data.labels": bool(data.labels),
            "model.head": self.model.head != "auto",
            "adapter.modules_to_save": whole,
        }
        generative = {
            "data.template": data.template != "auto",
            "data.system": data.system is not None,
            "data.train_on_inputs": data.train_on_inputs,
            "train.packing": bool(self.train.packing),
            "evaluation.generation": self.evaluation.generation != GenerationSettings(),
        }
        for key, is_set in (generative if classifies else others).items():
            if is_set:
                return f"{key} has no effect with task {self.task}; remove it"
        if whole and self.adapter.method != "lora":
            return f"adapter.modules_to_save has no effect with adapter.method {self.adapter.method!r}; remove it"
        return None


def _with_engine(values: Any) -> Any:
    """Return an experiment's values with the engine that `auto` stands for; values that mean nothing as they are."""
    train = values.get("train", {}) if isinstance(values, Mapping) else None
    if isinstance(train, TrainSettings):
        train = train.model_dump(exclude_unset=True)
    if not isinstance(train, Mapping):
        return values
    adapter = values.get("adapter", {})
    if not isinstance(adapter, AdapterSettings):
        try:
            adapter = AdapterSettings.model_validate(adapter)
        except ValidationError:
            return values  # the section's own checks say what is wrong with it
    if adapter.method == adapter_methods.SEEDS:
        train = {"optimizer": "sgd", "grad_norm": None, **train}
    if train.get("engine", "auto") == "auto":
        spread = train.get("batch_devices") or train.get("sharding", "none") != "none"
        alone = spread and adapter.method != adapter_methods.SEEDS
        train = {**train, "engine": "peft_model" if alone else adapter_methods.engine(adapter.method)}
    return {**values, "train": train}


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment of a file or of a shipped recipe's name (None: demo), with `key.path=value` applied.

    Raises ConfigError with one line that names the file, the key, the value found and the value expected.
    """
    if path is None:
        path = recipe("demo")
    path = Path(path)
    if not path.exists() and not path.suffix:
        path = recipe(path.name)
    return build(_with_overrides(read_yaml(path), overrides), source=path.name)


def recipe(name: str) -> Path:
    """Return the path of a shipped experiment file."""
    root = Path(__file__).parent
    known = {file.stem: file for folder in (root.parent, root) for file in (folder / "recipes").glob("*.yaml")}
    if name not in known:
        raise ConfigError(f"{name}: no such experiment file, and no recipe of that name; {suggest(name, known)}")
    return known[name]


def build(values: Mapping[str, Any], source: str = "experiment") -> Experiment:
    """Return the experiment that these values describe; raise ConfigError for the first thing that is wrong."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected a mapping of options, found a {type(values).__name__}")
    try:
        return Experiment.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_problem(error, Experiment)}") from None


def dump(experiment: Experiment) -> str:
    """Return the experiment as YAML, every option resolved; `build` of its values gives the experiment back."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping; raise ConfigError where there is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if not isinstance(error, UnicodeDecodeError):  # such as a date that no calendar has
            raise ConfigError(f"{path}: not valid YAML ({error or 'nested too deeply'})") from None
        raise ConfigError(f"{path}: cannot be read ({error}); expected a YAML text file") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such experiment file; `sheepfold run` without a file runs the demo") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a YAML text file") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f"line {where.line + 1}: " if where else ""
        raise ConfigError(f"{path}: {line}not valid YAML ({getattr(error, 'problem', None) or 'syntax'})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    return values


def _with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {text!r}: expected key.path=value, such as train.lr=0.001")
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override {text!r}: {parent!r} holds a value, not a section")
            node = child
        try:
            node[last] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"override {text!r}: the value is not valid YAML; quote it") from None
    return values


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the experiment file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema()}
