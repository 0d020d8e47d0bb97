"""One client over several devices: which engine does that for an experiment, and what cannot be spread.

train.batch_devices          replicas in one process           replicas.py
train.sharding: fsdp         torch's FSDP2, under torchrun     sharding.py
train.sharding: deepspeed    ZeRO through Accelerate, likewise deepspeed.py
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sheepfold import adapter_methods
from sheepfold.devices import group
from sheepfold.engines import zero_options
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.errors import ConfigError, require
from sheepfold.local import optimizers
from sheepfold.models import Base, pick_device, pick_dtype
from sheepfold.rank_choice import may_mix

if TYPE_CHECKING:
    from sheepfold.config import Experiment
    from sheepfold.strategies.base import Strategy


def check(experiment: "Experiment", made: "Strategy") -> None:
    """Raise ConfigError for what this experiment asks to be spread over devices and cannot be, before any loading."""
    train = experiment.train
    if train.batch_devices:
        _check_replicas(experiment)
    if train.sharding == "none":
        return
    place = f"train.sharding {train.sharding}"
    refused = {
        "model.bits": bool(experiment.model.bits),
        "offsite": experiment.offsite is not None,
        "evaluation.tasks": bool(experiment.evaluation.tasks),
        f"adapter.method {experiment.adapter.method}": experiment.adapter.method in adapter_methods.SOFT,
        f"federation.strategy {made.name}": made.beyond_peft or made.server is not None,
    }
    for key, is_asked in refused.items():
        if is_asked:
            raise ConfigError(f"{place}: {key} needs the whole model in one process; remove one of them")
    whole = experiment.adapter.method == "full"
    if whole and (experiment.personal.ditto or (made.local is not None and made.local.penalty is not None)):
        raise ConfigError(
            f"{place}: a penalty (fedprox, personal.ditto, train.local_rule) looks at whole weights, and with "
            "adapter.method full no process has them; take lora, or remove it"
        )
    if train.sharding == "deepspeed":
        _check_deepspeed(experiment, made, place)


def check_processes(experiment: "Experiment") -> None:
    """Raise ConfigError where a model is to be cut between processes, and there is one."""
    if experiment.train.sharding != "none" and not group.several():
        raise ConfigError(
            f"train.sharding {experiment.train.sharding}: there is one process; start one a device with torchrun, such "
            "as torchrun --nproc-per-node 2 -m sheepfold run experiment.yaml"
        )


def check_alone(experiment: "Experiment", what: str) -> None:
    """Raise ConfigError where `what`, which one process does, is asked of several."""
    if (sharding := experiment.train.sharding) != "none":
        raise ConfigError(f"{what}: train.sharding {sharding} is for `sheepfold run` alone; set train.sharding=none")
    if group.several():
        raise ConfigError(f"{what}: `sheepfold run` alone is shared by processes; start this without torchrun")


def _check_replicas(experiment: "Experiment") -> None:
    if group.several():
        raise ConfigError(
            f"train.batch_devices: they are one process's, and here are {group.world()}; start one without torchrun, "
            "or set train.sharding instead"
        )
    for name in experiment.train.batch_devices:
        try:
            pick_device(name)
        except ConfigError as error:
            raise ConfigError(f"train.batch_devices: {error}") from None
    if experiment.model.bits:
        raise ConfigError("train.batch_devices: a quantised base has no replicas; remove it, or model.bits")


def _check_deepspeed(experiment: "Experiment", made: "Strategy", place: str) -> None:
    train, method = experiment.train, experiment.adapter.method
    zero_options.check(train.sharding_args)
    dtype = pick_dtype(experiment.model.dtype, pick_device(experiment.device))
    if dtype not in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"{place}: it trains float32 or bfloat16, found model.dtype {name}; set one of them")
    require(place, "deepspeed", "accelerate", "deepspeed")
    rule = made.local
    if method not in ("lora", "full"):
        raise ConfigError(f"{place}: it trains lora and full, found adapter.method {method}; fsdp takes it")
    if may_mix(experiment.adapter.ranks):
        raise ConfigError(
            f"{place}: its parameters stay the same for all clients, so set adapter.rank; fsdp mixes ranks"
        )
    if experiment.personal.ditto or (rule and (rule.penalty or rule.correction or rule.mean_gradient)):
        raise ConfigError(
            f"{place}: its gradients belong to DeepSpeed, so nothing adds to them: fedprox, scaffold, personal.ditto "
            "and train.local_rule need train.sharding fsdp"
        )
    if {"ffa_lora", "rolora"} & set(made.name.split(" + ")):
        raise ConfigError(f"{place}: federation.strategy {made.name} freezes a factor; use train.sharding fsdp")
    kind = optimizers.optimizer_class(train.optimizer).__name__
    if kind not in optimizers.ELEMENTWISE:
        raise ConfigError(f"{place}: train.optimizer {kind} couples numbers that ZeRO keeps apart; take adamw or sgd")


def loaded(load: Callable[..., Base], experiment: "Experiment", settings: Any, tokenizer: Any, task: Any) -> Base:
    """Return the base on the device that trains it; one that processes will cut between them stays on the CPU."""
    train = experiment.train
    device = train.batch_devices[0] if train.batch_devices else experiment.device
    if train.sharding == "none":
        return load(settings, device, tokenizer, task=task)
    place = pick_device(device)
    dtype = str(pick_dtype(settings.dtype, place)).removeprefix("torch.")
    base = load(settings.model_copy(update={"dtype": dtype}), "cpu", tokenizer, task=task)
    return replace(base, device=place)


def engine_class(experiment: "Experiment", base: Base) -> Callable[..., PeftModelEngine]:
    """Return what makes the peft_model engine that an experiment asks for."""
    train = experiment.train
    if train.batch_devices:
        from sheepfold.engines.replicas import ReplicaEngine

        return partial(ReplicaEngine, devices=[pick_device(name) for name in train.batch_devices])
    if train.sharding == "fsdp":
        from sheepfold.engines.sharding import ShardedEngine

        return partial(ShardedEngine, device=base.device)
    if train.sharding == "deepspeed":
        from sheepfold.engines.deepspeed import ZeroEngine

        return partial(ZeroEngine, device=base.device)
    return PeftModelEngine
