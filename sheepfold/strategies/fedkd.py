"""FedKD-LoRA: after each fold the server lets a teacher and the folded student learn from each other on public rows.

    clients ── fold ──▶ student ─┐                                        ┌─▶ student's adapter goes back to the clients
                                 ├─ teacher alone, then both together ─┤
    teacher (all its weights) ───┘     on data.public, distillation/      └─▶ teacher, kept by the server

The teacher never leaves the server, and may be larger than what any client can hold. Teacher and student share the
student's tokenizer. Optimizers are fresh in every round, with a rate that falls to zero, as in the release.

Source: FedKD-LoRA (Federated-Learning-for-Fine-Tuning-Large-Language-Models), its code; see distillation/losses.py for
the formula and what is ours in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sheepfold.config import Experiment
from sheepfold.errors import ConfigError, suggest
from sheepfold.strategies.base import Strategy, argument, not_together, parts_of

if TYPE_CHECKING:
    from sheepfold.assembly import Parts
    from sheepfold.distillation.teacher import Foreseen
    from sheepfold.strategies.base import ServerStep

KL_KINDS = ("log_probabilities", "forward", "raw_logits")
AROUND_THESE = ("fedavg", "fedit", "fedprox", "fedopt", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
"""Methods whose global adapter is a free value, so that the server may train it further."""
NOT_AROUND = ("scaffold", "slora")
"""Methods that change others, fedkd's included, and keep something that belongs to the factors as clients left them."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """How the server distils; all of fedkd's arguments, checked."""

    teacher: str
    frozen: bool
    teacher_epochs: int
    epochs: int
    lr: float
    student_lr: float
    weight_decay: float
    batch_rows: int
    temperature: float
    kl_weight: float
    attention_weight: float | None
    """None: as the task has it, until `_of_task` said so"""
    kl: str


def fedkd(
    of: Strategy,
    teacher: str,
    frozen: bool = False,
    teacher_epochs: int | None = None,
    epochs: int = 1,
    lr: float = 5e-5,
    student_lr: float | None = None,
    weight_decay: float = 0.01,
    batch_rows: int = 32,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    attention_weight: float | None = None,
    kl: str = "log_probabilities",
) -> Strategy:
    """Return a method whose server distils after each fold.

    teacher: hub id or folder, of the student's task and vocabulary. frozen: it teaches as it is, and learns nothing.
    teacher_epochs (1): passes over the public rows by the teacher alone, each round; epochs: by both together. lr,
    student_lr (as lr), weight_decay, batch_rows: of AdamW. temperature, kl_weight, attention_weight (classification: 1;
    causal_lm: 0, which leaves the attention maps out) and kl (one of KL_KINDS): distillation/losses.py.
    """
    settings = _checked(dict(locals()))
    if odd := sorted(set(parts_of(of)) - set(AROUND_THESE)):
        why = f"the server trains both factors of the global adapter further, which {odd[0]} has no place for"
        raise not_together("fedkd", of, f"{why}; fedkd goes with {', '.join(AROUND_THESE)}")

    def check(experiment: Experiment) -> None:
        of.check(experiment)
        _check(experiment)

    def check_server(experiment: Experiment) -> None:
        from sheepfold.distillation import teacher as teachers

        of.check_server(experiment)
        teachers.check(_of_task(settings, experiment), experiment)

    def server(parts: "Parts") -> "ServerStep":
        from sheepfold.distillation.server import Distiller

        return Distiller(parts, _of_task(settings, parts.experiment))

    def foresee(experiment: Experiment) -> "Foreseen":
        from sheepfold.distillation import teacher as teachers

        return teachers.foreseen(_of_task(settings, experiment), experiment)

    return replace(
        of, name=f"fedkd + {of.name}", check=check, check_server=check_server, server=server, foresee=foresee
    )


def _checked(given: Mapping[str, Any]) -> Distillation:
    """Return fedkd's arguments as numbers; raises ConfigError for the first that does not fit."""
    above = ("a number above 0", lambda x: x > 0)
    from_0 = ("a number of at least 0", lambda x: x >= 0)
    whole = ("a whole number above 0", lambda x: x > 0 and x % 1 == 0)
    whole_from_0 = ("a whole number of at least 0", lambda x: x >= 0 and x % 1 == 0)
    teacher, frozen, kl = given["teacher"], given["frozen"], given["kl"]
    if not isinstance(teacher, str) or not teacher:
        raise ConfigError(f"federation.strategy_args.teacher: found {teacher!r}, expected a hub id or a folder")
    if not isinstance(frozen, bool):
        raise ConfigError(f"federation.strategy_args.frozen: found {frozen!r}, expected true or false")
    if kl not in KL_KINDS:
        raise ConfigError(f"federation.strategy_args.kl: no {kl!r}; {suggest(str(kl), KL_KINDS)}")
    alone = given["teacher_epochs"]
    if frozen and alone is not None:
        raise ConfigError(
            f"federation.strategy_args.teacher_epochs {alone} has no effect on a frozen teacher; leave it out, or set "
            "it to null"
        )
    alone = 0 if frozen else 1 if alone is None else alone
    temperature = argument("temperature", given["temperature"], *above)
    if kl == "raw_logits" and temperature != 1:
        raise ConfigError(
            f"federation.strategy_args.temperature {temperature:g}: raw_logits are no distribution to soften; set it "
            "to 1, or kl to log_probabilities"
        )
    student_lr = given["lr"] if given["student_lr"] is None else given["student_lr"]
    attention = given["attention_weight"]
    return Distillation(
        teacher=teacher,
        frozen=frozen,
        teacher_epochs=int(argument("teacher_epochs", alone, *whole_from_0)),
        epochs=int(argument("epochs", given["epochs"], *whole)),
        lr=argument("lr", given["lr"], *above),
        student_lr=argument("student_lr", student_lr, *above),
        weight_decay=argument("weight_decay", given["weight_decay"], *from_0),
        batch_rows=int(argument("batch_rows", given["batch_rows"], *whole)),
        temperature=temperature,
        kl_weight=argument("kl_weight", given["kl_weight"], *from_0),
        attention_weight=None if attention is None else argument("attention_weight", attention, *from_0),
        kl=kl,
    )


def _of_task(settings: Distillation, experiment: Experiment) -> Distillation:
    """Return the arguments with the attention's weight that the task has where none was given."""
    if settings.attention_weight is not None:
        return settings
    return replace(settings, attention_weight=1.0 if experiment.task == "classification" else 0.0)


def _check(experiment: Experiment) -> None:
    asked = experiment.federation.strategy
    names = (asked,) if isinstance(asked, str) else asked
    if odd := [name for name in names if name in NOT_AROUND]:
        raise ConfigError(
            f"federation.strategy [{', '.join(names)}]: the server trains both factors of the global adapter further, "
            f"which {odd[0]} has no place for; fedkd goes with {', '.join(AROUND_THESE)}"
        )
    if not experiment.data.public.wanted and not experiment.data.partition.by.endswith(".json"):
        raise ConfigError(
            "federation.strategy fedkd: the server has no rows to distil on; set data.public.share, such as 0.2, or "
            "data.public.source"
        )
    if experiment.adapter.method not in ("lora", "full"):
        raise ConfigError(
            f"federation.strategy fedkd: the student is LoRA on the base, or all its weights, and adapter.method is "
            f"{experiment.adapter.method!r}"
        )
    if experiment.personal.keep_local:
        raise ConfigError(
            "federation.strategy fedkd: the server's student needs the whole adapter, and personal.keep_local keeps "
            "parts of it with the clients; remove one of them"
        )
    if experiment.offsite is not None:
        raise ConfigError(
            "federation.strategy fedkd: the server's student is model.base, and with offsite clients train an emulator "
            "of it; remove one of them"
        )
