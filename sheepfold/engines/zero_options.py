"""What DeepSpeed is told: `train.sharding_args`, or a file of its own options, and what the run itself says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sheepfold.config import TrainSettings, read_yaml
from sheepfold.errors import ConfigError, suggest

OWN = {"stage", "offload_optimizer", "offload_param", "config"}
SAID = {
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "gradient_clipping": "train.grad_norm",
    "gradient_accumulation_steps": "train.micro_rows",
    "train_batch_size": "train.batch_rows",
    "train_micro_batch_size_per_gpu": "train.micro_rows",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}
"""Options of DeepSpeed's that the experiment file says under its own names."""


def zero_options(train: TrainSettings, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's options for float32 or bfloat16 weights. Raises ConfigError for options that cannot be."""
    given = check(train.sharding_args)
    return {
        **given,
        "train_micro_batch_size_per_gpu": 1,  # counts its own samples alone: parts are cut by the engine
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.grad_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,  # torch's own
        "zero_force_ds_cpu_optimizer": False,
    }


def check(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's options that train.sharding_args asks for. Raises ConfigError for what is no such thing."""
    if unknown := sorted(args.keys() - OWN):
        raise ConfigError(f"train.sharding_args.{unknown[0]}: no such option; {suggest(unknown[0], OWN)}")
    if "config" in args:
        if others := sorted(args.keys() - {"config"}):
            raise ConfigError(f"train.sharding_args: config and {others[0]} are both set; write it into the file")
        return _file(Path(str(args["config"])))
    stage = args.get("stage", 3)
    _check_stage(stage, "train.sharding_args.stage")
    zero: dict[str, Any] = {"stage": stage}
    for key in ("offload_optimizer", "offload_param"):
        if key in args:
            if args[key] != "cpu":
                raise ConfigError(f"train.sharding_args.{key}: found {args[key]!r}, expected cpu")
            zero[key] = {"device": "cpu"}
    if "offload_param" in zero and stage != 3:
        raise ConfigError(f"train.sharding_args.offload_param: weights are cut in stage 3 alone, found stage {stage}")
    return {"zero_optimization": zero}


def _file(path: Path) -> dict[str, Any]:
    place = f"train.sharding_args.config {path}"
    options = read_yaml(path)  # JSON is YAML
    for key, here in SAID.items():
        if key in options:
            raise ConfigError(f"{place}: {key} is what {here} says; remove it from the file")
    zero = options.get("zero_optimization")
    if not isinstance(zero, dict):
        raise ConfigError(f"{place}: no zero_optimization section; add one, such as {json.dumps({'stage': 3})}")
    _check_stage(zero.get("stage"), f"{place}: zero_optimization.stage")
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme":
            raise ConfigError(f"{place}: {key} to nvme: clients begin with a fresh optimizer, in memory; take cpu")
    return options


def _check_stage(stage: Any, place: str) -> None:
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{place}: found {stage!r}, expected 1, 2 or 3")
