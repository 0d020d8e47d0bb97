"""A data owner's policy: its own file, which an experiment is held against before anything is loaded or trained.

    # policy.yaml
    max_rank: 16              # of any pair
    methods: [lora]           # adapter.method
    full_weights: false       # whole weights, or sparse changes of them, may be sent
    rows_per_round: 500       # training rows that one round may process
    tasks: [causal_lm]
    models: [builtin:tiny]    # bases and tokenizers that may be named
    generation: false         # the model may answer this machine's rows
    code: false               # code that the experiment names, or that the model wrote, may run here
    files: false              # files of this machine that the experiment names may be read

What the file leaves out has the careful value above, but no bound on rows and models. The first thing that is asked for
and not given refuses the experiment, in one line that names both. Code that comes with a model never runs. Where rows
come from, and who holds which, is this machine's own to say: what the experiment says of these is not looked at.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from sheepfold.config import Experiment, read_yaml
from sheepfold.errors import ConfigError, PolicyError
from sheepfold.messages import Assignment
from sheepfold.rank_choice import Given, parse
from sheepfold.section import Section, first_problem

Positive = Annotated[int, Field(gt=0)]

WHOLE = ("slora", "fed_sb")
"""Strategies in which changes of the weights themselves are sent, in their first rounds or always."""


SENT_WHOLE = ("modules_to_save", "trainable_token_indices")
"""Options of PEFT's by which parts of the base train beside an adapter, and are sent as they are."""


class Policy(Section):
    """What a data owner gives, and no more."""

    max_rank: Positive = 16
    """Largest rank of a pair."""
    methods: tuple[str, ...] = ("lora",)
    """adapter.method that may train here; rslora is written down as lora."""
    full_weights: bool = False
    """Whether whole weights may be sent, or sparse changes of them: they tell more about rows than a low rank does."""
    rows_per_round: Positive | None = None
    """Training rows, repeats counted, that one round, or fine-tuning after the last, may process; null: no bound."""
    tasks: tuple[str, ...] = ("causal_lm",)
    """causal_lm, classification."""
    models: tuple[str, ...] | None = None
    """What model.base and model.tokenizer may be; null: any that this machine finds."""
    generation: bool = False
    """Whether the model may answer this machine's rows during evaluation."""
    code: bool = False
    """Whether code that the experiment names (module:function), or that the model wrote, may run here."""
    files: bool = False
    """Whether files that the experiment names (a template, adapter.start) may be read here."""


def read_policy(path: Path) -> Policy:
    """Return a policy file's policy. Raises ConfigError, in one line, for what is no policy."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such policy file; leave `policy` out for the careful one")
    values = read_yaml(path)
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error, Policy)}") from None


def check_policy(policy: Policy, experiment: Experiment, rows: int | None = None) -> None:
    """Raise PolicyError for the first thing that an experiment asks for and the policy does not give.

    rows: training rows on this machine, which say how many rows an epoch processes; None: not known.
    """
    if refusal := next(refusals(policy, experiment, rows), None):
        raise PolicyError(refusal)


def refusals(policy: Policy, experiment: Experiment, rows: int | None = None) -> Iterator[str]:
    """Yield a line for each thing that an experiment asks for and the policy does not give."""
    method = experiment.adapter.method
    if experiment.task not in policy.tasks:
        yield _line("task", experiment.task, "tasks", _listed(policy.tasks))
    if method not in policy.methods and not (method == "full" and policy.full_weights):
        yield _line("adapter.method", method, "methods", _listed(policy.methods))
    if not policy.full_weights and (whole := _whole(experiment)):
        yield _line(*whole, "full_weights", "false")
    if method != "full" and (rank := largest_rank(experiment)) > policy.max_rank:
        yield _line("adapter.ranks" if experiment.adapter.ranks else "adapter.rank", rank, "max_rank", policy.max_rank)
    own = experiment.adapter.options.get("r")  # of PEFT's other methods
    if isinstance(own, int) and own > policy.max_rank:
        yield _line("adapter.options.r", own, "max_rank", policy.max_rank)
    most = policy.rows_per_round
    for key, asked in _rows_asked(experiment, rows):
        if most is not None and (asked is None or asked > most):
            yield _line(key, "unknown" if asked is None else f"{asked:,}", "rows_per_round", f"{most:,}")
    for key, named in {"model.base": experiment.model.base, "model.tokenizer": experiment.model.tokenizer}.items():
        if policy.models is not None and named is not None and named not in policy.models:
            yield _line(key, named, "models", _listed(policy.models))
    if not policy.generation and (generative := _generates(experiment)):
        yield _line(*generative, "generation", "false")
    if not policy.code and (code := next(_code(experiment), None)):
        yield _line(*code, "code", "false")
    if not policy.files and (file := next(_files(experiment), None)):
        yield _line(*file, "files", "false")
    if _remote_code(experiment.model_dump()):
        yield "the experiment asks for trust_remote_code, and code that comes with a model never runs here; remove it"


def check_assignment(policy: Policy, handed: Assignment) -> None:
    """Raise PolicyError where what arrives is more than the experiment's text let expect, such as a folder's ranks."""
    for path, pair in handed.adapter.pairs.items():
        if pair.rank > policy.max_rank:
            raise PolicyError(_line(f"rank {pair.rank} for", path, "max_rank", policy.max_rank))
    if handed.adapter.sparse and not policy.full_weights:
        raise PolicyError(
            _line("changes of whole weights, such as", min(handed.adapter.sparse), "full_weights", "false")
        )


def largest_rank(experiment: Experiment) -> int:
    """Return the largest rank that any client or module may be handed."""
    choice = experiment.adapter.ranks
    if choice is None:
        return experiment.adapter.rank
    form = parse(choice)
    if isinstance(form, Given):
        asked = list(form.ranks.values()) if isinstance(form.ranks, Mapping) else list(form.ranks)
    else:
        asked = list(form.types)
    return max(max(rank.values()) if isinstance(rank, Mapping) else rank for rank in asked)


def _whole(experiment: Experiment) -> tuple[str, str] | None:
    """Return the option by which whole weights, or changes of them, would be sent."""
    if experiment.adapter.method == "full":
        return "adapter.method", "full"
    named = experiment.federation.strategy
    for name in (named,) if isinstance(named, str) else named:
        if name in WHOLE and not (name == "fed_sb" and experiment.federation.strategy_args.get("start") == "base"):
            return "federation.strategy", name
    for option in SENT_WHOLE:
        if asked := experiment.adapter.options.get(option):
            return f"adapter.options.{option}", str(asked)
    saved = experiment.adapter.modules_to_save
    return ("adapter.modules_to_save", str(list(saved))) if saved not in ("auto", ()) else None


def _rows_asked(experiment: Experiment, rows: int | None) -> Iterator[tuple[str, int | None]]:
    """Yield the options by which rows are processed, and how many in one round; None: not known.

    A client that is trained alone, for the closing table, goes through rounds as large as the federation's.
    """
    train, after = experiment.train, experiment.personal.finetune_steps
    twins = 2 if experiment.personal.ditto else 1
    if train.steps is not None:
        yield "train.steps x train.batch_rows", twins * train.steps * train.batch_rows
    else:
        yield "train.epochs x this machine's rows", None if rows is None else twins * (train.epochs or 1) * rows
    if after is not None:
        yield "personal.finetune_steps x train.batch_rows", after * train.batch_rows


def _generates(experiment: Experiment) -> tuple[str, str] | None:
    """Return the option by which the model would answer rows here."""
    if experiment.task == "causal_lm" and experiment.evaluation.metrics:
        return "evaluation.metrics", experiment.evaluation.metrics[0]
    return None


def _code(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield the options that name code of their own, or run the model's."""
    e, named = experiment, experiment.federation.strategy
    for key, values in {
        "federation.strategy": (named,) if isinstance(named, str) else named,
        "train.local_rule": (e.train.local_rule,),
        "data.template": (e.data.template,),
        "evaluation.metrics": e.evaluation.metrics,
    }.items():
        yield from ((key, value) for value in values if value and ":" in value and "/" not in value)
    if e.evaluation.allow_code:
        yield "evaluation.allow_code", "true"


def _files(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield the options that name files, which would be looked for on this machine."""
    if experiment.data.template.endswith(".json"):
        yield "data.template", experiment.data.template
    if experiment.adapter.start is not None:
        yield "adapter.start", experiment.adapter.start
    for name, value in experiment.adapter.options.items():
        if isinstance(value, str) and ("/" in value or "\\" in value):
            yield f"adapter.options.{name}", value


def _remote_code(values: Any) -> bool:
    """Return whether anything in an experiment would let a library run code that it downloads."""
    if isinstance(values, Mapping):
        return bool(values.get("trust_remote_code")) or any(map(_remote_code, values.values()))
    return isinstance(values, list | tuple) and any(map(_remote_code, values))


def _line(key: str, asked: object, own: str, given: object) -> str:
    return f"the experiment asks for {key} {asked}, and this machine's policy gives {own} {given}; ask its owner"


def _listed(names: tuple[str, ...]) -> str:
    return f"[{', '.join(names)}]"
