"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, written and read without PEFT.

    base_model.model.<module path>.lora_A.weight   (r, d_in)
    base_model.model.<module path>.lora_B.weight   (d_out, r)

What is written loads with plain `PeftModel.from_pretrained`. What is read is read whole or refused: a key or
an option that plain LoRA does not have is an error, since dropping it would change the model in silence.
"""

import json
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.errors import AdapterMismatch, CheckpointError, ModelError
from sheepfold.folders import replace_file
from sheepfold.targets import is_linear, linear_shape

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
"""LoraConfig options that change what an adapter computes, and their values under plain LoRA."""
REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base too: an adapter trained so is no update of the published base."""


def write_peft(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    base_name: str,
    targets: Sequence[str] | None = None,
    *,
    fan_in_fan_out: bool = False,
    revision: str | None = None,
    dropout: float = 0.0,
    task_type: str = "CAUSAL_LM",
    whole: Sequence[str] | None = None,
) -> None:
    """Write the adapter as a PEFT folder; files that are there are replaced, each in one move, weights first.

    `targets` is what PEFT will match modules with (default: the full paths, which match nothing else);
    `fan_in_fan_out` is PEFT's word for a base of Conv1D layers (GPT-2). Tensors in `extra` are written under
    modules_to_save, so their names must be parameter paths; `whole` are the modules that hold them (default: each
    tensor's own layer). Raises AdapterMismatch for an adapter without
    pairs, and CheckpointError where the folder cannot be written.
    """
    config = _config(adapter, base_name, targets)
    config["task_type"] = task_type
    if whole:
        config["modules_to_save"] = list(whole)
    config |= {"fan_in_fan_out": fan_in_fan_out, "revision": revision, "lora_dropout": dropout}
    folder = Path(folder)
    try:
        replace_file(folder / WEIGHTS, save(_keyed(adapter), metadata={"format": "pt"}))
        replace_file(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{folder}: the adapter cannot be written ({reason}); choose another place") from None


def read_peft(path: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> Adapter:
    """Return the adapter of a PEFT folder, or of a weights file.

    A file's configuration is `config`, else adapter_config.json beside it or one folder up (Shepherd keeps
    one for all rounds). `.bin` files are unpickled with weights_only=True. Raises ModelError for files that
    are missing, damaged, or not plain LoRA; AdapterMismatch for tensors that do not belong together.
    """
    weights, settings_file = _locate(Path(path), Path(config) if config else None)
    settings = _read_config(settings_file)
    return _assemble(_read_tensors(weights), settings, weights)


def check_fits(adapter: Adapter, model: nn.Module) -> None:
    """Raise AdapterMismatch unless every pair, and every whole tensor, has its place in the model, and its shape."""
    parameters = dict(model.named_parameters())
    for name, tensor in adapter.extra.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            there = f"of shape {tuple(parameters[name].shape)}" if name in parameters else "not there"
            raise AdapterMismatch(
                f"{name}: whole in the adapter, with shape {tuple(tensor.shape)}; in the base it is {there}; use the "
                "adapter's own base and task"
            )
    modules = dict(model.named_modules())
    for path, pair in adapter.pairs.items():
        if path not in modules or not is_linear(modules[path]):
            there = f"a {type(modules[path]).__name__}" if path in modules else "not there"
            raise AdapterMismatch(f"{path}: adapted, but in the base it is {there}; use the adapter's own base")
        d_in, d_out = linear_shape(modules[path])
        if pair.A.shape[1] != d_in or pair.B.shape[0] != d_out or pair.A.shape[0] != pair.B.shape[1]:
            raise AdapterMismatch(
                f"{path}: A is {tuple(pair.A.shape)}, B is {tuple(pair.B.shape)}, expected (r, {d_in}) and "
                f"({d_out}, r); the adapter belongs to another base"
            )


def _config(adapter: Adapter, base_name: str, targets: Sequence[str] | None) -> dict[str, Any]:
    if not adapter.pairs:
        raise AdapterMismatch("the adapter has no LoRA pairs; other methods' folders are written by PEFT itself")
    ranks = adapter.ranks
    alphas = {path: _alpha(pair) for path, pair in adapter.pairs.items()}
    (rank, alpha), _ = Counter((ranks[path], alphas[path]) for path in ranks).most_common(1)[0]
    # PEFT takes the first pattern that ends a module's path: longest first, so that none hides another.
    order = sorted(ranks, key=len, reverse=True)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: ranks[path] for path in order if ranks[path] != rank},
        "alpha_pattern": {path: alphas[path] for path in order if alphas[path] != alpha},
        "target_modules": sorted(targets) if targets else sorted(ranks),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.extra}) or None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _alpha(pair: LoraPair) -> float | int:
    """Return the alpha for which alpha / r is the pair's scale to the bit, as an integer where one is."""
    near = pair.scale * pair.rank
    for alpha in (round(near), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if alpha / pair.rank == pair.scale:
            return alpha
    return near


def _keyed(adapter: Adapter) -> dict[str, Tensor]:
    keyed: dict[str, Tensor] = {}
    for path, pair in sorted(adapter.pairs.items()):
        keyed[f"{PREFIX}{path}.lora_A.weight"], keyed[f"{PREFIX}{path}.lora_B.weight"] = pair.A, pair.B
    keyed |= {f"{PREFIX}{name}": tensor for name, tensor in sorted(adapter.extra.items())}
    return {key: tensor.detach().cpu().contiguous() for key, tensor in keyed.items()}


def _locate(path: Path, config: Path | None) -> tuple[Path, Path]:
    if path.is_dir():
        weights = next((path / name for name in (WEIGHTS, PICKLED) if (path / name).is_file()), None)
        if weights is None:
            raise ModelError(f"{path}: no {WEIGHTS} or {PICKLED} in it; give a PEFT folder or a weights file")
        places = [path / CONFIG]
    elif path.is_file():
        weights, places = path, [path.parent / CONFIG, path.parent.parent / CONFIG]
    else:
        raise ModelError(f"{path}: no such adapter; give a PEFT folder or a weights file")
    found = next((place for place in ([config] if config else places) if place.is_file()), None)
    if found is None:
        raise ModelError(f"{config or places[0]}: no such file; only it tells alpha and the kind of adapter")
    return weights, found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{path}: not a PEFT configuration (JSON with peft_type)") from None
    if kind != "LORA":
        raise ModelError(f"{path}: peft_type is {kind}, expected LORA; only LoRA adapters can be read")
    for option, plain in PLAIN.items():
        if settings.get(option) not in plain:
            raise ModelError(f"{path}: {option} is {settings[option]!r}, not plain LoRA; merge it with PEFT first")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REBASING):
        raise ModelError(
            f"{path}: init_lora_weights is {start!r}, which changed the base too; convert the adapter to "
            "plain LoRA with PEFT (save_pretrained, path_initial_model_for_weight_conversion)"
        )
    if not settings.get("r") or not settings.get("lora_alpha"):
        raise ModelError(f"{path}: r or lora_alpha is missing")
    return dict(settings)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: Any
    try:
        if path.suffix == ".safetensors":
            tensors = load(path.read_bytes())
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        what = "holds more than tensors, and unpickling that could run code"
        raise ModelError(f"{path}: {what}: refused; use a safetensors copy") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: damaged or cut short ({line}); copy it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ModelError(f"{path}: expected a dictionary of tensors")
    return tensors


def _assemble(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], where: Path) -> Adapter:
    halves: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    saved = tuple(f".{module}." for module in settings.get("modules_to_save") or ())
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        # PEFT drops the adapter's name ('default') on saving; scripts that saved the state themselves kept
        # it.
        if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name):
            halves.setdefault(match[1], {})[match[2]] = tensor
        elif any(module in f".{name}" for module in saved):
            extra[name] = tensor
        else:
            raise ModelError(f"{where}: {key} is no part of a plain LoRA adapter; merge it with PEFT first")
    if not halves:
        raise ModelError(f"{where}: holds no lora_A or lora_B; it is not a LoRA adapter")
    return Adapter({path: _pair(path, halves[path], settings, where) for path in sorted(halves)}, extra)


def _pair(path: str, half: Mapping[str, Tensor], settings: Mapping[str, Any], where: Path) -> LoraPair:
    if set(half) != {"A", "B"}:
        raise AdapterMismatch(f"{where}: {path} has lora_{min(half)} without its other half; copy it again")
    A, B = half["A"], half["B"]
    rank = _pattern(settings.get("rank_pattern"), path, settings["r"])
    if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == rank:
        raise AdapterMismatch(
            f"{where}: {path}: A is {tuple(A.shape)}, B is {tuple(B.shape)}, expected ({rank}, d_in) and "
            f"(d_out, {rank}); these weights do not belong to this configuration"
        )
    alpha = _pattern(settings.get("alpha_pattern"), path, settings["lora_alpha"])
    return LoraPair(A, B, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the first pattern's value that ends the path, else the default (peft.utils.get_pattern_key)."""
    hits = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(hits, default)
