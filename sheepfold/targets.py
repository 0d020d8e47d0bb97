"""Which modules of a base are adapted, and the adapter that a run starts from.

The same arguments give the same modules as PEFT would, without importing it: that import alone takes six
seconds, so PEFT's table of families is read from its source file.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from sheepfold.adapter import Adapter, new_pair
from sheepfold.errors import ConfigError, ModelError, suggest
from sheepfold.rng import torch_stream

FAMILIES: dict[str, list[str] | str] = {
    "distilbert": ["q_lin", "v_lin"],  # FedKD-LoRA's students
    "albert": ["query", "value"],
    "mpnet": ["q", "v"],
    "modernbert": ["Wqkv"],
}
"""Encoders that PEFT's table does not have: queries and values, as it has for BERT."""
TABLE = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"


def find_targets(
    model: nn.Module, targets: str | tuple[str, ...] = "auto", whole: Collection[str] = ()
) -> dict[str, nn.Module]:
    """Return the modules to adapt by path, in module order.

    auto: PEFT's choice for the family. all-linear: every linear layer but the output head. A tuple: modules
    whose path is an entry, or ends in '.' + entry. whole: modules that are trained whole, and so not adapted. Raises
    ModelError where a family is not in the table, and where an entry matches nothing or something that is not linear;
    the message lists what exists.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    linear = {name: module for name, module in linear.items() if not any(_inside(name, part) for part in whole)}
    if targets == "all-linear":
        head = _output_head(model)
        return {name: module for name, module in linear.items() if module is not head}
    if targets == "auto":
        family = _family_targets(str(getattr(getattr(model, "config", None), "model_type", "")))
        if isinstance(family, str):
            return {name: module for name, module in linear.items() if re.fullmatch(family, name)}
        targets = tuple(family)
    if isinstance(targets, str):
        raise ConfigError(f"adapter.targets {targets!r}: expected auto, all-linear, or a list of module names")
    for entry in targets:
        _check_entry(entry, model, linear, whole)
    return {name: module for name, module in linear.items() if any(_matches(name, entry) for entry in targets)}


def is_linear(module: nn.Module) -> bool:
    """Return whether LoRA can adapt the module: nn.Linear (or derived from it) or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def tied_head(model: Any) -> set[str]:
    """Return the output head's path, where its weight is the input embedding's too."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return set()
    return {name for name, module in model.named_modules() if module is head}


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the module is GPT-2's Conv1D, a linear layer whose weight is stored (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear module."""
    if is_conv1d(module):
        d_in, d_out = cast(Tensor, module.weight).shape
        return d_in, d_out
    return cast(nn.Linear, module).in_features, cast(nn.Linear, module).out_features


def new_adapter(sites: Mapping[str, nn.Module], rank: int | Mapping[str, int], alpha: float, seed: int) -> Adapter:
    """Return the adapter that changes nothing yet: A random, B zero, scale alpha / rank (see adapter.new_pair).

    rank: one for all, or module path -> rank. Each module's draw has its own address, so the sites chosen do not move
    each other's numbers. Raises ConfigError where a rank exceeds a module's smaller side.
    """
    pairs = {}
    for path, module in sites.items():
        d_in, d_out = linear_shape(module)
        r = rank if isinstance(rank, int) else rank[path]
        if r > min(d_in, d_out):
            raise ConfigError(
                f"adapter.rank {r}: {path} is {d_in} -> {d_out}: its update has rank {min(d_in, d_out)} "
                "at most; choose a smaller rank, or targets without this module"
            )
        pairs[path] = new_pair(d_in, d_out, r, alpha / r, torch_stream(seed, "adapter", path))
    return Adapter(pairs)


def suffixes(model: nn.Module) -> list[str]:
    """Return the last names of all linear modules, sorted: what a list of targets can hold."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)})


def _matches(path: str, entry: str) -> bool:
    return path == entry or path.endswith(f".{entry}")


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _check_entry(entry: str, model: nn.Module, linear: Mapping[str, nn.Module], whole: Collection[str]) -> None:
    found = {name: module for name, module in model.named_modules() if name and _matches(name, entry)}
    free = {name: module for name, module in found.items() if not any(_inside(name, part) for part in whole)}
    if found and not free:
        raise ModelError(
            f"adapter.targets: {entry!r} matches {min(found)} alone, which is trained whole (adapter.modules_to_save); "
            "leave it out"
        )
    found = free
    if not found:
        raise ModelError(
            f"adapter.targets: {entry!r} matches no module; {suggest(entry, suffixes(model))}; "
            "auto takes the family's own"
        )
    if odd := sorted(found.keys() - linear.keys()):
        raise ModelError(
            f"adapter.targets: {entry!r} matches {odd[0]}, a {type(found[odd[0]]).__name__}, and LoRA adapts "
            f"linear layers only: {', '.join(suffixes(model))}"
        )


def _output_head(model: Any) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _family_targets(family: str) -> list[str] | str:
    table = FAMILIES | peft_table()
    if family not in table:
        raise ModelError(
            f"adapter.targets auto: PEFT has no default for the family {family!r}; "
            "set adapter.targets to all-linear, or to a list of module names"
        )
    return table[family]


@functools.cache
def peft_table() -> dict[str, list[str] | str]:
    """Return PEFT's default LoRA targets by model family: a list of names, or a pattern for whole paths."""
    package = importlib.util.find_spec("peft")  # looks the package up without running it
    for folder in (package.submodule_search_locations or []) if package else []:
        source = Path(folder, "utils", "constants.py")
        for node in ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else []:
            names = [n.id for n in getattr(node, "targets", []) if isinstance(n, ast.Name)]
            if isinstance(node, ast.Assign) and names == [TABLE]:
                return ast.literal_eval(node.value)  # type: ignore[no-any-return]
    raise ModelError("adapter.targets auto: PEFT's table of families was not found; name the modules, or all-linear")
