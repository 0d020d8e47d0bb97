"""A model of some of another's blocks: where its list of blocks is, and how it is cut so that all of it agrees.

    0 1 2 3 4 5  ── keep_layers(model, (1, 3, 5)) ──▶  0 1 2      weights of 1 3 5, configuration and places of 0 1 2

DistilBERT's student starts as every other layer of its teacher (arXiv:1910.01108, section 3), offsite-tuning's emulator
as layers spread over a middle (arXiv:2302.04870). Some families build a block by its place (windows, sparse layers,
scales), so what the configuration builds before and after is compared first, on the meta device: a cut model is the
same in memory and read from a file, or it is refused.
"""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sheepfold.errors import ConfigError, ModelError, suggest
from sheepfold.loading import TROUBLE, first_line, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACE = re.compile(r"(layer|block)_?(idx|id|index|number)")
"""Attributes that hold a block's place; the key-value cache is found by it."""
TOKENS = re.compile(r"_(id|ids|tokens)$|^architectures$")
"""Lists of a configuration that are never one entry a block, however long they are."""
NUMBERED = ("mlp_only_layers", "moe_layers")
"""Lists of a configuration that hold blocks' places."""
FIRST = ("max_window_layers", "first_k_dense_replace")
"""Numbers of a configuration that say how many of the first blocks are otherwise."""


def layer_list(model: nn.Module, name: str | None = None) -> str:
    """Return the dotted path of the list of transformer blocks; name: what the user named, where given.

    Unnamed, it is the one nn.ModuleList that is as long as the configuration says and lies in no other such list.
    Raises ModelError where none or several are, and where the name is no list's.
    """
    lists: dict[str, int] = {p: len(m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if name is not None:
        if name not in lists:
            raise ModelError(f"layer list {name!r}: no list of modules in this model; {suggest(name, lists)}")
        return name
    total = _total(model)
    right = [path for path, length in lists.items() if length == total]
    outermost = [path for path in right if not any(path.startswith(f"{other}.") for other in right)]
    if len(outermost) != 1:
        found = ", ".join(f"{path} ({lists[path]})" for path in outermost or lists) or "no list at all"
        raise ModelError(
            f"{type(model).__name__}: {len(outermost) or 'no'} lists of {total} blocks, where one was expected, in "
            f"{found}; name the list of blocks by its path (models shrink: --list)"
        )
    return outermost[0]


def kept_indices(total: int, layers: Sequence[int]) -> tuple[int, ...]:
    """Return the blocks to keep; raise ConfigError unless they are at least one of 0 to total - 1, in rising order."""
    kept = tuple(layers)
    if not kept:
        raise ConfigError("layers: none is kept; name at least one block")
    for index in kept:
        if not 0 <= index < total:
            raise ConfigError(f"layers: there is no block {index}; this model has {total}, 0 to {total - 1}")
    for one, following in itertools.pairwise(kept):
        if one >= following:
            what = "named twice" if one == following else f"named behind {one}"
            raise ConfigError(f"layers: block {following} is {what}; name each block once, in rising order")
    return kept


def keep_layers(model: "PreTrainedModel", layers: Sequence[int], name: str | None = None) -> None:
    """Cut a model in place to these blocks, in order; it then saves, loads and generates as a model of that size.

    Its configuration counts the blocks kept, lists of one entry a block are cut alike, and the blocks carry their new
    places. Models on the meta device are cut as well. Cut before adapters are put in. Raises ConfigError for layers
    that are not there, ModelError where the list of blocks is not found, or where the family would build other blocks
    at these places; the model is whole then.
    """
    path = layer_list(model, name)
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    total = _total(model)
    if len(blocks) != total:
        raise ModelError(_uncounted(path, len(blocks), total))
    kept = kept_indices(total, layers)
    places = _places(model, path, kept)
    modules = dict(model.named_modules())
    if missing := [where for where, _, _ in places if where not in modules]:
        raise ModelError(
            f"{missing[0]}: is not in this model as its configuration builds it; cut it before changing it"
        )
    for where, attribute, value in places:
        setattr(modules[where], attribute, value)
    for index in reversed(range(total)):
        if index not in kept:
            del blocks[index]
    changed = _changes(model.config, kept)
    text = model.config.get_text_config()
    copies = (getattr(module, "config", None) for module in modules.values())  # families copy theirs into parts (T5)
    for config in {id(c): c for c in (text, *copies) if type(c) is type(text)}.values():
        _set(config, changed)


def _places(model: "PreTrainedModel", path: str, kept: tuple[int, ...]) -> list[tuple[str, str, int]]:
    """Return what must be renumbered: (module's path before the cut, attribute, value after it).

    Raises ModelError where the model that the cut configuration builds is not the cut model in all else: classes,
    parameters' shapes, and plain values such as scales and windows.
    """
    config = copy.deepcopy(model.config)
    total = _total(model)
    _set(config.get_text_config(), _changes(config, kept))
    before, after = _outline(model, model.config), _outline(model, config)
    if path not in after or len(list(after[path].children())) != len(kept):  # an encoder-decoder's other half
        raise ModelError(_uncounted(path, total, total))
    places: list[tuple[str, str, int]] = []
    for where, new in after.items():
        origin = _origin(where, path, kept)
        for attribute, was, becomes in _differences(before.get(origin), new):
            if PLACE.search(attribute) or (was, becomes) == (total, len(kept)):
                places.append((origin, attribute, becomes))
                continue
            raise ModelError(
                f"{origin}: {attribute} is {was} among {total} blocks, and {becomes} where it comes to stand among "
                f"{len(kept)}; this family builds blocks by their place: keep others"
            )
    return places


def _differences(old: nn.Module | None, new: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield what the new module, its parts left aside, has otherwise than the old one: (name, old value, new value)."""
    ours, theirs = _described(old), _described(new)
    for name, value in theirs.items():  # a value that the new one has no more is no longer used
        if ours.get(name) != value:
            yield name, ours.get(name), value


def _described(module: nn.Module | None) -> dict[str, Any]:
    if module is None:
        return {}
    plain = {n: v for n, v in vars(module).items() if v is None or isinstance(v, (bool, int, float, str))}
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    return {"class": type(module).__name__, **plain, "parameters": shapes}


def _uncounted(path: str, length: int, total: int) -> str:
    return (
        f"layer list {path!r}: its {length} modules are not the {total} blocks that the configuration counts, "
        "which are all that can be cut"
    )


def _origin(where: str, path: str, kept: tuple[int, ...]) -> str:
    """Return a module's path before the cut."""
    if not where.startswith(f"{path}."):
        return where
    index, dot, rest = where[len(path) + 1 :].partition(".")
    return f"{path}.{kept[int(index)]}{dot}{rest}"


def _outline(model: "PreTrainedModel", config: Any) -> dict[str, nn.Module]:
    """Return the modules that a configuration builds once it has been saved and read, without numbers in them."""
    try:
        again = type(config).from_dict(config.to_dict())
        with quiet(), torch.device("meta"):
            return dict(type(model)(again).named_modules())
    except TROUBLE as error:
        raise ModelError(
            f"{type(model).__name__}: its configuration with {_count(config.get_text_config())} blocks builds no model "
            f"({first_line(error)})"
        ) from None


def _changes(config: Any, kept: tuple[int, ...]) -> dict[str, Any]:
    """Return the entries of the text configuration that differ when only these blocks are kept."""
    text = config.get_text_config()
    total, entries = _count(text), vars(text)
    changes: dict[str, Any] = {}
    for name, value in entries.items():
        if name in NUMBERED and isinstance(value, (list, tuple)):
            changes[name] = [place for place, index in enumerate(kept) if index in value]
        elif name in FIRST and isinstance(value, int):
            changes[name] = sum(index < value for index in kept)
        elif isinstance(value, (list, tuple)) and len(value) == total and not TOKENS.search(name):
            changes[name] = type(value)(value[index] for index in kept)
    if "attention_types" in entries:  # GPT-Neo reads its list of kinds in runs: [[kinds], how often]
        changes["attention_types"] = [[[kind], 1] for kind in changes["attention_layers"]]
    return changes | {"num_hidden_layers": len(kept)}


def _set(config: Any, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        setattr(config, name, value)


def _count(text: Any) -> int | None:
    return getattr(text, "num_hidden_layers", None)


def _total(model: Any) -> int:
    total = _count(model.config.get_text_config())
    if not isinstance(total, int):
        raise ModelError(f"{type(model).__name__}: its configuration does not say how many blocks it has")
    return total
