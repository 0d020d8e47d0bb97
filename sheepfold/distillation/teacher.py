"""fedkd's teacher before it is loaded: whether it goes with the student, and what it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sheepfold.config import Experiment, ModelSettings
from sheepfold.distillation.losses import matched_layers
from sheepfold.errors import ConfigError, ModelError
from sheepfold.models import Base, Outline, config_only, load_base, load_tokenizer
from sheepfold.tasks import task
from sheepfold.tasks.base import Task
from sheepfold.tasks.classification import Classification

if TYPE_CHECKING:
    from sheepfold.strategies.fedkd import Distillation

KEY = "federation.strategy_args.teacher"


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a server that distils takes."""

    parameters: int
    """The teacher's"""
    bytes: int
    """The teacher, and the server's own copy of the student, in memory"""
    state_bytes: int
    """What every saved state holds of it"""


def asked_for(settings: "Distillation", experiment: Experiment) -> ModelSettings:
    """Return how the teacher is loaded: in float32 where it learns, since steps of 5e-5 vanish in half precision."""
    dtype = experiment.model.dtype
    if not settings.frozen and dtype != "float64":
        dtype = "float32"
    return ModelSettings(base=settings.teacher, dtype=dtype, attention=attention(settings))


def attention(settings: "Distillation") -> Literal["auto", "eager"]:
    """Return the implementation of attention that teacher and student need: others never form the maps."""
    return "eager" if settings.attention_weight else "auto"


def check(settings: "Distillation", experiment: Experiment) -> None:
    """Raise ModelError for a teacher that is not there, ConfigError for one that does not go with the student."""
    student, teacher = _outlines(settings, experiment)
    _check_tokenizer(settings, experiment)
    if experiment.adapter.method == "full" and student.dtype.itemsize < 4:
        raise ConfigError(
            "federation.strategy fedkd with adapter.method full: the server's small steps on the student vanish in "
            f"{str(student.dtype).removeprefix('torch.')}; set model.dtype to float32"
        )
    if teacher.max_positions is not None and experiment.data.max_tokens > teacher.max_positions:
        raise ConfigError(
            f"{KEY} {settings.teacher}: it has {teacher.max_positions} positions, and data.max_tokens is "
            f"{experiment.data.max_tokens}; set that to {teacher.max_positions} or less"
        )
    (layers, _), (more, _) = shape(student.model), shape(teacher.model)
    if settings.attention_weight and not matched_layers(layers, more):
        raise ConfigError(
            f"{KEY} {settings.teacher}: it has {more} layers and the student {layers}, so that attention maps cannot "
            "be matched from the top; choose a deeper teacher, or set attention_weight to 0"
        )
    built = getattr(teacher.model.config, "architectures", None) or []
    if settings.frozen and experiment.task == "classification" and not _has_head(built):
        raise ConfigError(
            f"{KEY} {settings.teacher}: it has no classification head, and a frozen teacher would never train a new "
            "one; fine-tune it first (sheepfold finetune), or set frozen to false"
        )


def foreseen(settings: "Distillation", experiment: Experiment) -> Foreseen:
    """Return what teacher and student take on the server, from their configurations alone."""
    student, teacher = _outlines(settings, experiment)
    parameters = teacher.parameters * teacher.dtype.itemsize
    learned = 0 if settings.frozen else parameters
    if settings.attention_weight:
        (layers, heads), (_, theirs) = shape(student.model), shape(teacher.model)
        learned += 0 if heads == theirs else max(4, student.dtype.itemsize) * layers * heads * theirs
    return Foreseen(teacher.parameters, parameters + student.bytes, learned)


def load(settings: "Distillation", experiment: Experiment, asked: Task, student: Base) -> Base:
    """Return the teacher, on the student's device, with the student's tokenizer; its own head stays where it has one.

    Raises ModelError where it cannot be loaded, or its head gives other labels than the data has.
    """
    with _about_the_teacher():
        return load_base(asked_for(settings, experiment), str(student.device), student.tokenizer, task=_own_head(asked))


def shape(model: object) -> tuple[int, int]:
    """Return (layers, attention heads) of a model."""
    config = getattr(model, "config").get_text_config()  # noqa: B009, nn.Module's own type has none
    return int(config.num_hidden_layers), int(config.num_attention_heads)


def _outlines(settings: "Distillation", experiment: Experiment) -> tuple[Outline, Outline]:
    """Return student and teacher without weights."""
    asked = task(experiment)
    student = config_only(experiment.model, experiment.device, asked)
    with _about_the_teacher():
        return student, config_only(asked_for(settings, experiment), experiment.device, _own_head(asked))


def _own_head(asked: Task) -> Task:
    """Return the task for the teacher: model.head is about the student, and a teacher's head stays."""
    return replace(asked, new_head=False) if isinstance(asked, Classification) else asked


def _check_tokenizer(settings: "Distillation", experiment: Experiment) -> None:
    """Raise ConfigError where the teacher's words are numbered otherwise than the student's."""
    asked = task(experiment)
    ours = load_tokenizer(experiment.model, asked).get_vocab()
    with _about_the_teacher():
        theirs = load_tokenizer(asked_for(settings, experiment), asked).get_vocab()
    if theirs != ours:
        odd = sorted(set(theirs.items()) ^ set(ours.items()))[0][0]
        raise ConfigError(
            f"{KEY} {settings.teacher}: its tokenizer and that of {experiment.model.base} differ ({odd!r} first); "
            "teacher and student read the same tokens, so choose two of one family"
        )


def _has_head(architectures: list[str]) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in architectures)


@contextmanager
def _about_the_teacher() -> Iterator[None]:
    """Let a model's errors name the option that asked for it."""
    try:
        yield
    except ModelError as error:
        told = str(error).replace("model.base", KEY)
        raise ModelError(told.replace("set model.head to new", "name a teacher of these labels")) from None
