"""How a plain model carries an adapter value: LoRA pairs, any other PEFT method's tensors, or all weights.

A carrier writes an `Adapter` into the model and reads it back, strictly: a tensor that finds no place is an error.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.config import AdapterSettings
from sheepfold.engines.peft_methods import check_connected, check_targets, own_name, peft_config
from sheepfold.engines.stack import chains
from sheepfold.errors import AdapterMismatch, ConfigError
from sheepfold.loading import TROUBLE, first_line
from sheepfold.quantised import hush
from sheepfold.rng import derive
from sheepfold.tasks.base import Task
from sheepfold.tasks.causal_lm import CAUSAL_LM


class Carrier(Protocol):
    """A model, and the adapter that it carries."""

    model: Any

    def write(self, adapter: Adapter) -> None:
        """Make the model carry this adapter; raises AdapterMismatch where it does not fit."""

    def read(self) -> Adapter:
        """Return a copy, on the CPU, of the adapter that the model carries."""

    def factors(self) -> dict[str, Tensor]:
        """Return the parameters that hold it, by flat name (see Adapter.tensors)."""


def carrier(
    model: Any,
    sites: Sequence[str],
    settings: AdapterSettings,
    seed: int,
    *,
    beyond_peft: bool = False,
    task: Task = CAUSAL_LM,
    only: Sequence[str] | None = None,
) -> Carrier:
    """Return the carrier for adapter.method; raises ConfigError for methods that PEFT does not know.

    only: the tensors that method full trains, where not all of them.
    """
    hush()  # before PEFT, which imports bitsandbytes
    if settings.method == "lora" and beyond_peft:
        return HookCarrier(model, sites, settings.dropout)
    if settings.method == "lora":
        return LoraCarrier(model, sites, settings.dropout, [n for names in task.whole(model).values() for n in names])
    if settings.method == "full":
        return FullCarrier(model, only)
    return PeftCarrier(model, settings, seed, task)


MOST_KINDS = 8
"""PEFT adapters of different ranks that a model holds at once."""


class LoraCarrier:
    """LoRA through PEFT. Clients of other ranks get PEFT adapters of their own in the same model.

    Tensors that are trained whole are the model's own, in float32 or wider.
    """

    def __init__(self, model: Any, sites: Sequence[str], dropout: float, whole: Sequence[str] = ()) -> None:
        self.model: Any = model
        self._whole = _widened(model, whole)
        self._sites = list(sites)
        self._dropout = dropout
        self._names: dict[tuple[tuple[str, int, float], ...], str] = {}
        self._active = ""
        self._made = 0

    def write(self, adapter: Adapter) -> None:
        _check_sites(adapter, self._sites, self._whole)
        if adapter.sparse or any(pair.core is not None for pair in adapter.pairs.values()):
            adapter = adapter.plain()  # to look at; training these needs HookCarrier
        self._activate(adapter)
        with torch.no_grad():
            for path, pair in adapter.pairs.items():
                A, B = self._factors(path)
                A.copy_(pair.A)
                B.copy_(pair.B)
            for name, tensor in adapter.extra.items():
                self._whole[name].copy_(tensor)

    def read(self) -> Adapter:
        pairs = {}
        for path in self._sites:
            A, B = (t.detach().cpu().clone() for t in self._factors(path))
            pairs[path] = LoraPair(A, B, float(self._module(path).scaling[self._active]))
        return Adapter(pairs, _copies(self._whole))

    def factors(self) -> dict[str, Tensor]:
        found = {}
        for path in self._sites:
            found[f"{path}/A"], found[f"{path}/B"] = self._factors(path)
        return found | {f"{name}/extra": tensor for name, tensor in self._whole.items()}

    def _module(self, path: str) -> Any:
        return self.model.base_model.model.get_submodule(path)

    def _factors(self, path: str) -> tuple[Tensor, Tensor]:
        module = self._module(path)
        return module.lora_A[self._active].weight, module.lora_B[self._active].weight

    def _activate(self, adapter: Adapter) -> None:
        from peft import LoraConfig

        kind = tuple(sorted((path, pair.rank, pair.scale) for path, pair in adapter.pairs.items()))
        new = kind not in self._names
        if new:
            self._made += 1
        name = self._names.setdefault(kind, f"kind{self._made}")
        if name == self._active:
            return
        if new:
            config = LoraConfig(
                r=kind[0][1],
                lora_alpha=1,
                target_modules=self._sites,
                lora_dropout=self._dropout,
                rank_pattern={path: r for path, r, _ in kind},
                alpha_pattern={path: scale * r for path, r, scale in kind},
                fan_in_fan_out=any(type(self._plain(p)).__name__ == "Conv1D" for p in self._sites),
            )
            if self._active:
                self.model.add_adapter(name, config)
            else:
                self.model = _wrapped(self.model, config, name)
        self.model.set_adapter(name)
        self._active = name
        while len(self._names) > MOST_KINDS:  # ranks that grow or shrink would pile up
            oldest = next(kind for kind, known in self._names.items() if known != name)
            self.model.delete_adapter(self._names.pop(oldest))
        wide = next(iter(adapter.pairs.values())).A.dtype
        for path in self._sites if new else ():
            for part in (self._module(path).lora_A[name], self._module(path).lora_B[name]):
                part.to(torch.float64 if wide == torch.float64 else torch.float32)

    def _plain(self, path: str) -> nn.Module:
        module: Any = self._module(path) if self._active else self.model.get_submodule(path)
        plain: nn.Module = getattr(module, "base_layer", module)
        return plain


class PeftCarrier:
    """Any other PEFT method; its trained parameters travel whole, a prompt encoder's own ones included."""

    def __init__(self, model: Any, settings: AdapterSettings, seed: int, task: Task = CAUSAL_LM) -> None:
        config = peft_config(settings, model, task)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(derive(seed, "adapter"))
                self.model: Any = _wrapped(model, config, "default")
        except TROUBLE as error:
            raise ConfigError(
                f"adapter.options for {settings.method}: PEFT refuses them: {first_line(error)}"
            ) from None
        _widen_trained(self.model)
        trained = [(own_name(name), p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._trained: dict[str, Tensor] = dict(trained)
        assert len(trained) == len(self._trained), "two parameters of one name"
        self.model.eval()
        check_targets(self.model, settings)
        check_connected(self.model, self._trained, settings.method)

    def write(self, adapter: Adapter) -> None:
        _copy_into(self._trained, adapter)
        self.model.eval()  # so that a prompt encoder with dropout is exported as it answers

    def read(self) -> Adapter:
        return Adapter(extra=_copies(self._trained))

    def factors(self) -> dict[str, Tensor]:
        return {f"{name}/extra": p for name, p in self._trained.items()}


class FullCarrier:
    """All weights of the model, or some by name, the others frozen; tied weights travel once."""

    def __init__(self, model: Any, only: Sequence[str] | None = None) -> None:
        self.model: Any = model
        named = dict(model.named_parameters())
        self._trained: dict[str, Tensor] = named if only is None else {name: named[name] for name in only}
        for parameter in self._trained.values():
            parameter.requires_grad_(True)

    def write(self, adapter: Adapter) -> None:
        _copy_into(self._trained, adapter)

    def read(self) -> Adapter:
        return Adapter(extra=_copies(self._trained))

    def factors(self) -> dict[str, Tensor]:
        return {f"{name}/extra": p for name, p in self._trained.items()}


class HookCarrier:
    """Pairs, cores and sparse deltas, added to each layer's output by a hook: the plainest way, and the slowest."""

    def __init__(self, model: Any, sites: Sequence[str], dropout: float) -> None:
        self.model: Any = model
        self._layers = {path: model.get_submodule(path) for path in sites}
        self._dropout = dropout
        self._adapter = Adapter()
        self._params: dict[str, Tensor] = {}
        for path, layer in self._layers.items():
            layer.register_forward_hook(partial(self._add, path))

    def write(self, adapter: Adapter) -> None:
        _check_sites(adapter, list(self._layers))
        device = next(self.model.parameters()).device
        self._adapter = adapter
        tensors = {n: t.detach().clone().to(device) for n, t in adapter.tensors().items()}
        self._params = {n: t.requires_grad_(t.is_floating_point()) for n, t in tensors.items()}

    def read(self) -> Adapter:
        return self._adapter.holding(_copies(self._params))

    def factors(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._params.items() if p.is_floating_point()}

    def _add(self, path: str, _layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        x = args[0]
        if path in self._adapter.sparse:
            values, positions = self._params[f"{path}/values"], self._params[f"{path}/positions"]
            d_out, d_in = self._adapter.sparse[path].shape
            dense = values.new_zeros(d_out * d_in).index_copy(0, positions, values).view(d_out, d_in)
            return out + F.linear(x.to(values.dtype), dense).to(out.dtype)
        if path not in self._adapter.pairs:
            return None
        A, B, core = (self._params.get(f"{path}/{kind}") for kind in ("A", "B", "core"))
        assert A is not None
        assert B is not None
        low = F.linear(F.dropout(x.to(A.dtype), self._dropout, self.model.training), A)
        low = low if core is None else F.linear(low, core)
        return out + (F.linear(low, B) * self._adapter.pairs[path].scale).to(out.dtype)


class SideHooks:
    """What the base has changed by, added to the output of its own layers, below whatever adapts them."""

    def __init__(self, model: Any, sites: Sequence[str]) -> None:
        self._chains: dict[str, list[Tensor]] = {}
        self._side, self._dtype = Adapter(), torch.float32
        self._model = model
        for path in sites:
            model.get_submodule(path).register_forward_hook(partial(self._add, path))

    def put(self, side: Adapter) -> None:
        """Add this from now on."""
        if side is not self._side:
            first = next(self._model.parameters())
            self._side, self._chains, self._dtype = side, chains(side, first.device, first.dtype), first.dtype

    def _add(self, path: str, _layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if path not in self._chains:
            return None
        x = args[0].to(self._dtype)
        for matrix in self._chains[path]:
            x = F.linear(x, matrix)
        return out + x


def _wrapped(model: Any, config: Any, name: str) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what PEFT asks of transformers is for PEFT to change
        return get_peft_model(model, config, adapter_name=name)


def _widened(model: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Return parameters of the model by name, their layers in float32 where they were narrower."""
    for path in {name.rpartition(".")[0] for name in names}:
        layer = model.get_submodule(path)
        layer.to(torch.promote_types(layer.weight.dtype, torch.float32))
        layer.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
    return {name: model.get_parameter(name) for name in names}


def _widen_trained(model: Any) -> None:
    """Put what trains in half precision into float32, with its layer.

    PEFT does so for adapters, but not for copies of the base's own layers: ln_tuning's norms, whole heads. Layers in
    the middle of the model go on giving what the next one takes.
    """
    found = {n.rpartition(".")[0]: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    for path, dtype in found.items():
        if dtype.itemsize >= 4:
            continue
        layer = model.get_submodule(path).float()
        layer.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
        if "modules_to_save" not in path:
            layer.register_forward_hook(partial(_given_back, dtype))


def _given_back(dtype: torch.dtype, _layer: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return out.to(dtype)


def _check_sites(adapter: Adapter, sites: Sequence[str], whole: Collection[str] = ()) -> None:
    adapted = {*adapter.pairs, *adapter.sparse}
    if adapter.extra.keys() != set(whole) or adapted != set(sites):
        odd = sorted(adapter.extra.keys() ^ set(whole) | adapted ^ set(sites))
        raise AdapterMismatch(f"{odd[0]}: in one of adapter and model only; adapter.targets must match the adapter")


def check_whole(params: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Raise AdapterMismatch unless an adapter holds these parameters whole, and nothing else."""
    if adapter.pairs or adapter.extra.keys() != params.keys():
        odd = sorted(set(adapter.pairs) | adapter.extra.keys() ^ params.keys())
        raise AdapterMismatch(f"{odd[0]}: in one of adapter and model only")
    for name, tensor in adapter.extra.items():
        if tensor.shape != params[name].shape:
            raise AdapterMismatch(
                f"{name}: shape {tuple(tensor.shape)}, expected {tuple(params[name].shape)}; the adapter was trained "
                "with other adapter.options"
            )


def _copy_into(params: Mapping[str, Tensor], adapter: Adapter) -> None:
    check_whole(params, adapter)
    with torch.no_grad():
        for name, tensor in adapter.extra.items():
            params[name].copy_(tensor)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone() for name, t in tensors.items()}
