"""Which layers an emulator has, and which of its tensors are trained: the rule, and what an emulator says of itself.

    layers  [0, l) bottom adapter | [l, r) middle, some of it kept | [r, L) top adapter
            l = max(emu_l, 1)                                          r = min(emu_r, L - 1)

An emulator's configuration holds its `Cut`, so whoever loads one as a base, a client that has nothing else included,
trains what its owner listed and nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sheepfold.errors import ConfigError, ModelError
from sheepfold.layers import layer_list
from sheepfold.offsite.settings import OffsiteSettings
from sheepfold.targets import tied_head

KEY = "sheepfold_offsite"
"""The entry of an emulator's configuration that holds its cut."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which layers of a full model an emulator has, and what of it is trained."""

    layers: str
    """The dotted path of the list of layers, in both models"""
    total: int
    """How many layers the full model has"""
    source: tuple[int, ...]
    """Layer i of the emulator is the full model's layer source[i]"""
    bottom: int
    """How many of the first layers are adapter layers"""
    top: int
    """How many of the last ones are"""
    train: tuple[str, ...]
    """The groups of tensors that are trained: layers, embeddings, head, norm"""

    @property
    def adapter_layers(self) -> tuple[int, ...]:
        """The adapter layers, as the emulator counts."""
        count = len(self.source)
        return (*range(self.bottom), *range(count - self.top, count))

    def plugged(self, name: str) -> str | None:
        """Return what a module or tensor of the emulator is called in the full model; None where it has no place there.

        The kept middle has none: it stands for more than the layer that it was.
        """
        found = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)(\..*)?", name)
        if found is None:
            return name
        index = int(found[1])
        if index not in self.adapter_layers:
            return None
        return f"{self.layers}.{self.source[index]}{found[2] or ''}"

    def in_adapter_layer(self, name: str) -> bool:
        """Return whether a module or tensor of the emulator lies in one of its adapter layers."""
        return name.startswith(f"{self.layers}.") and self.plugged(name) is not None

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> "Cut":
        """Return the cut that `as_dict` wrote."""
        source, train = tuple(map(int, held["source"])), tuple(map(str, held["train"]))
        bottom, top = int(held["bottom"]), int(held["top"])
        return cls(str(held["layers"]), int(held["total"]), source, bottom, top, train)

    def as_dict(self) -> dict[str, Any]:
        """Return the cut, ready for JSON."""
        return asdict(self)


def adapter_ends(total: int, emu_l: int, emu_r: int) -> tuple[int, int]:
    """Return (l, r): the adapter layers of `total` are [0, l) and [r, total). Raises ConfigError for no middle."""
    l, r = max(emu_l, 1), min(emu_r, total - 1)  # noqa: E741, the paper's letters
    if l >= r:
        raise ConfigError(
            f"offsite.emu_l {emu_l} and emu_r {emu_r}: of this model's {total} layers, [0, {l}) and [{r}, {total}) "
            "would be adapter layers and none is left between; lower emu_l or raise emu_r"
        )
    return l, r


def kept_middle(count: int, drop_ratio: float) -> tuple[int, ...]:
    """Return which of `count` middle layers an emulator keeps: n = round(count * (1 - drop_ratio)) of them.

    Evenly spread, i * (count - 1) // (n - 1) for i < n, so the first and the last are always kept; a half rounds to the
    even number, as Python's round does. n = 1 keeps the middle one. Raises ConfigError for n = 0.
    Source: Offsite-Tuning, arXiv:2302.04870, section 3.3 (uniform layer dropping).
    """
    n = round(count * (1 - drop_ratio))
    if n == 0:
        raise ConfigError(
            f"offsite.drop_ratio {drop_ratio}: keeps round({count} x {1 - drop_ratio:g}) = 0 of {count} middle layers; "
            "lower it, so that one is kept"
        )
    if n == 1:
        return ((count - 1) // 2,)
    return tuple(i * (count - 1) // (n - 1) for i in range(n))


def cut_of(model: nn.Module, settings: OffsiteSettings) -> Cut:
    """Return the cut that the settings make of a full model; one on the meta device will do.

    Raises ModelError where its layers are not found, ConfigError for a cut that it cannot have.
    """
    if cut_in(model) is not None:
        raise ConfigError("offsite: model.base is an emulator already; remove offsite, or name the full model")
    path = layer_list(model, settings.layers)
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    total = len(blocks)
    l, r = adapter_ends(total, settings.emu_l, settings.emu_r)  # noqa: E741
    middle = [l + i for i in kept_middle(r - l, settings.drop_ratio)]
    groups = tuple(dict.fromkeys(settings.train))
    cut = Cut(path, total, (*range(l), *middle, *range(r, total)), l, total - r, groups)
    _check_ties(model, groups)
    return cut


def cut_in(model: Any) -> Cut | None:
    """Return the cut that a model's configuration holds; None where it is no emulator. Raises ModelError for others."""
    held = getattr(model.config, KEY, None)
    if held is None:
        return None
    try:
        return Cut.of(held)
    except (TypeError, ValueError, KeyError):
        raise ModelError(f"config.json: its entry {KEY} is not an emulator's; was it edited?") from None


def check_method(model: Any, method: str) -> None:
    """Raise ConfigError where the model is an emulator and adapter.method would train what its owner did not list."""
    cut = cut_in(model)
    if cut is None or method == "full" or (method == "lora" and "layers" in cut.train):
        return
    listed = ", ".join(cut.train)
    raise ConfigError(
        f"adapter.method {method!r} on an emulator: its owner lists {listed} to train; take "
        + ("full" if "layers" not in cut.train else "lora, rslora or full, which have a place in the full model")
    )


def restricted(model: Any, sites: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the modules that LoRA may adapt: of an emulator, the ones in its adapter layers.

    Raises ConfigError where these are none.
    """
    cut = cut_in(model)
    kept = {path: module for path, module in sites.items() if cut is None or cut.in_adapter_layer(path)}
    if sites and not kept:
        raise ConfigError(f"adapter.targets: none is in an adapter layer of the emulator, such as {min(sites)}")
    return kept


def trained(model: Any, cut: Cut) -> list[str]:
    """Return the names of the tensors that are trained, in module order; tied ones once. model: the emulator."""
    groups = _groups(model, cut.layers)
    return [
        name
        for name, group in groups.items()
        if group in cut.train and (group != "layers" or cut.plugged(name) is not None)
    ]


def _groups(model: Any, layers: str) -> Mapping[str, str]:
    """Return the group of every parameter: layers; embeddings, position embeddings among them; head; norm, the rest."""
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    head = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}

    def group(name: str) -> str:
        owner = name.rpartition(".")[0]
        if name.startswith(f"{layers}."):
            return "layers"
        return "embeddings" if owner in embeddings else "head" if owner in head else "norm"

    return {name: group(name) for name, _ in model.named_parameters()}


def _check_ties(model: Any, groups: Sequence[str]) -> None:
    """Raise ConfigError where only one of two groups is trained that share a tensor."""
    asked = [group for group in ("embeddings", "head") if group in groups]
    if len(asked) == 1 and tied_head(model):
        raise ConfigError(
            f"offsite.train {asked[0]}: this model's head is its input embedding (tie_word_embeddings), so both are "
            "trained or neither; name embeddings and head, or neither"
        )
