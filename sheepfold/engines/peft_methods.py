"""PEFT's methods as an experiment names them: their configuration, checked, and what must be true before they train.

PEFT takes a misspelt enum for its default, a text for a truth, and a target that matches nothing in silence; all of
that is one clear line here.
"""

import dataclasses
import enum
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sheepfold.adapter_methods import WHOLE
from sheepfold.config import AdapterSettings
from sheepfold.errors import ConfigError, ModelError, suggest
from sheepfold.quantised import check_blocks, hush
from sheepfold.targets import find_targets, is_conv1d, is_linear
from sheepfold.tasks.base import Task
from sheepfold.tasks.causal_lm import CAUSAL_LM

UNFIT = {
    "adalora": "it moves ranks between modules as it trains, so that clients' factors no longer mean the same; "
    "hetlora prunes ranks, flexlora and flora take mixed ones",
    "cpt": "it trains on a loss of its own, and rows have no types of tokens here",
    "multitask_prompt_tuning": "it needs a task's number with every row",
    "poly": "it needs a task's number with every row",
    "xlora": "it mixes adapters that are trained already",
}
"""PEFT's methods that a round cannot train, and why."""
_GIVEN = ("task_type", "peft_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision")
_RANKED = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}
_IS_DORA = ("use_dora", "use_rslora")


def config_class(method: str) -> Any:
    """Return PEFT's configuration class for a method; raises ConfigError for one that is not there, or not fit."""
    hush()
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if method in UNFIT:
        raise ConfigError(f"adapter.method {method!r}: not possible here: {UNFIT[method]}")
    known = {str(kind.value).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()} | {"dora": LoraConfig}
    if method not in known:
        names = [name for name in known if name not in UNFIT]
        raise ConfigError(f"adapter.method {method!r}: PEFT has none; {suggest(method, [*names, 'rslora', 'full'])}")
    return known[method]


def check_options(settings: AdapterSettings) -> None:
    """Raise ConfigError for a method that PEFT lacks, and for options that its configuration class does not take."""
    if settings.method in ("lora", *WHOLE):
        return
    fields = {field.name: field for field in dataclasses.fields(config_class(settings.method)) if field.init}
    dora = settings.method == "dora"
    for key, value in settings.options.items():
        where = f"adapter.options.{key}"
        if dora and key in _RANKED:
            raise ConfigError(f"{where}: say it as adapter.{_RANKED[key]}")
        if key in _GIVEN or (dora and key in _IS_DORA):
            raise ConfigError(f"{where}: follows from the experiment; remove it")
        if key not in fields:
            free = [name for name in fields if name not in _GIVEN and not (dora and name in (*_RANKED, *_IS_DORA))]
            raise ConfigError(f"{where}: {settings.method} has no such option; {suggest(key, free)}")
        _check_value(where, value, fields[key].default)
    _check_used(settings.method, settings.options)


def _check_used(method: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for options of encoders that are not there.

    FederatedScope-LLM's list for P-tuning says encoder_dropout with an encoder that has none, so that is let through.
    """
    idle = {
        "prefix_tuning": ("encoder_hidden_size", "prefix_projection", options.get("prefix_projection", False)),
        "p_tuning": ("encoder_num_layers", "LSTM", options.get("encoder_reparameterization_type") == "LSTM"),
    }
    key, needs, there = idle.get(method, ("", "", True))
    if key in options and not there:
        raise ConfigError(f"adapter.options.{key}: has no effect without {needs}; remove it")


def _check_value(where: str, value: Any, default: Any) -> None:
    """Raise ConfigError for what PEFT would take for something else without a word."""
    names = [str(one.value) for one in type(default)] if isinstance(default, enum.Enum) else []
    if names and value not in names:
        raise ConfigError(f"{where}: found {value!r}; {suggest(str(value), names)}")
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ConfigError(f"{where}: found {value!r}; expected true or false")
    if type(default) in (int, float) and type(value) not in (int, float):
        raise ConfigError(f"{where}: found {value!r}; expected a number")


def peft_config(settings: AdapterSettings, model: Any, task: Task = CAUSAL_LM) -> Any:
    """Return PEFT's configuration for a model. Raises ConfigError, or ModelError for targets that are not there."""
    check_options(settings)
    made = config_class(settings.method)
    own: dict[str, Any] = {}
    if settings.method == "ia3" and any(is_conv1d(module) for module in model.modules()):
        own = {"fan_in_fan_out": True}  # PEFT finds out by itself, with a warning
    if settings.method == "dora":
        sites = find_targets(model, settings.targets)
        check_blocks(sites, settings.method)
        own = {
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "target_modules": list(sites),
            "fan_in_fan_out": any(is_conv1d(layer) for layer in sites.values()),
            "use_dora": True,
        }
    whole = list(task.whole(model))
    if whole and "modules_to_save" in inspect.signature(made).parameters:
        own["modules_to_save"] = whole
    return made(task_type=task.peft_type, **(own | dict(settings.options)))


def check_targets(model: Any, settings: AdapterSettings) -> None:
    """Raise ModelError for a target, asked for or PEFT's default for the family, that adapts nothing in this model."""
    config = model.peft_config["default"]
    found = getattr(model.base_model, "targeted_module_names", None)
    for key in ("target_modules", "feedforward_modules"):
        asked = getattr(config, key, None)
        if found is None or not isinstance(asked, list | set | tuple):
            continue
        for entry in sorted(asked):
            if not any(path == entry or path.endswith(f".{entry}") for path in found):
                linear = (name for name, module in model.get_base_model().named_modules() if is_linear(module))
                known = {name.removesuffix(".base_layer").rpartition(".")[2] for name in linear}
                raise ModelError(f"adapter.options.{key}: {entry!r} adapts no module; {suggest(entry, known)}")


def check_connected(model: Any, trained: Mapping[str, Tensor], method: str) -> None:
    """Raise ConfigError where nothing trains, or where a trained tensor has no part in what the model puts out."""
    if not trained:
        raise ConfigError(f"adapter.method {method!r}: nothing trains with these adapter.options")
    device = next(iter(trained.values())).device
    if device.type == "meta":  # shapes only, for a forecast
        return
    ids = torch.zeros(1, 4, dtype=torch.long, device=device)
    with torch.enable_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
        gradients = torch.autograd.grad(out.square().sum(), list(trained.values()), allow_unused=True)
    idle = _named(trained, (gradient is None for gradient in gradients))
    if idle:
        raise ConfigError(
            f"adapter.method {method!r}: {len(idle)} of {len(trained)} trained tensors change nothing in this model, "
            f"such as {idle[0]}; choose other adapter.options, or another method"
        )


def _named(tensors: Iterable[str], chosen: Iterable[bool]) -> list[str]:
    return [name for name, is_it in zip(tensors, chosen, strict=True) if is_it]


def own_name(parameter: str) -> str:
    """Return a parameter's name as it travels: without PEFT's wrapping and its word for the adapter.

    base_model.model.model.layers.0.mlp.down_proj.ia3_l.default ─▶ model.layers.0.mlp.down_proj.ia3_l
    """
    return ".".join(part for part in parameter.removeprefix("base_model.model.").split(".") if part != "default")
