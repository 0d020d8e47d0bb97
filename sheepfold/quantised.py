"""Quantised bases through bitsandbytes: weights of 8 bits, as LLM.int8() keeps them (arXiv:2208.07339), or of 4, as
QLoRA does (NF4 with quantised scales, arXiv:2305.14314).

    y = x W' + b        W', the weight in x's dtype, is written out for one product, forward or backward, and dropped

Weights are quantised, and nothing else. LLM.int8() itself rounds activations too, but for columns in which any row of
the batch has an outlier: what a row comes to would depend on the rows beside it, and a client in a cohort would learn
something else than alone. Embeddings, norms, the output head and what a task trains whole stay in the base's dtype.
"""

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sheepfold.errors import ConfigError, ModelError, require

BLOCK = 64
"""Numbers that share a scale in NF4, as bitsandbytes cuts them."""
SCALES = 256
"""Scales that share one of their own (QLoRA's double quantisation)."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a base is quantised as its weights are read."""

    bits: int
    """8 or 4"""
    kept: tuple[str, ...]
    """Modules that stay as they are: the output head, and what a task trains whole."""
    asked: str = "model.bits"
    """Where it was asked for: model.bits or --bits."""

    @classmethod
    def of(
        cls, model: Any, bits: int | None, whole: Collection[str], asked: str = "model.bits"
    ) -> "Quantisation | None":
        """Return how a model, on the meta device, will be quantised; None where it will not be (None, 0).

        whole: modules that the task trains whole. Raises ConfigError for other bits than 8 and 4, and where
        bitsandbytes is missing.
        """
        if not bits:
            return None
        if bits not in (4, 8):
            raise ConfigError(f"{asked} {bits}: a base is quantised to 8 or 4 bits; leave it out for the base as it is")
        require(f"{asked} {bits}", "quant", "bitsandbytes")
        head = model.get_output_embeddings()
        heads = [name for name, module in model.named_modules() if head is not None and module is head]
        return cls(bits, (*heads, *whole), asked)

    def layers(self, model: nn.Module) -> Iterator[tuple[str, int, int]]:
        """Yield (path, d_in, d_out) of the layers of a model, not yet quantised, that will be."""
        for name, module in model.named_modules():
            inside = any(name == kept or name.startswith(f"{kept}.") or name.endswith(kept) for kept in self.kept)
            if type(module) is nn.Linear and not inside:
                yield name, module.in_features, module.out_features
            elif type(module).__name__ == "Conv1D" and not inside:  # GPT-2's, stored (d_in, d_out)
                yield name, *cast(Tensor, module.weight).shape

    def check(self, model: Any, dtype: torch.dtype, base: str) -> None:
        """Raise ModelError for weights that are quantised already, ConfigError for float64.

        model: on the meta device.
        """
        if found := getattr(model.config, "quantization_config", None):
            how = found.get("quant_method", "") if isinstance(found, dict) else getattr(found, "quant_method", "")
            raise ModelError(
                f"model.base {base!r}: its weights are quantised already ({how or 'as its config.json says'}); name "
                f"the weights as they were before, or remove {self.asked}"
            )
        if dtype == torch.float64:
            raise ConfigError(
                f"{self.asked} {self.bits} with model.dtype float64: quantised weights are no more exact than float32; "
                "set model.dtype to float32"
            )

    def options(self, place: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Return what from_pretrained needs to quantise as it reads."""
        from transformers import BitsAndBytesConfig

        hush()
        four = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
        how = four if self.bits == 4 else {"load_in_8bit": True}
        config = BitsAndBytesConfig(**how, llm_int8_skip_modules=list(self.kept))
        return {"quantization_config": config, "device_map": {"": str(place)}}

    def saved_bytes(self, model: nn.Module, dtype: torch.dtype) -> int:
        """Return how many bytes less the weights take than all in `dtype`."""
        saved = 0.0
        for _, d_in, d_out in self.layers(model):
            numbers = d_in * d_out
            blocks = -(-numbers // BLOCK)
            scales = 4 * d_out if self.bits == 8 else blocks + 4 * -(-blocks // SCALES)
            saved += numbers * (dtype.itemsize - self.bits / 8) - scales
        return int(saved)


def settle(model: nn.Module) -> None:
    """Let a model's quantised layers compute as this file says, on every device and in every mode."""
    from sheepfold.quantised_layers import settle as settled

    settled(model)


def is_quantised(layer: nn.Module) -> bool:
    """Return whether bitsandbytes holds the layer's weight."""
    return type(getattr(layer, "weight", None)).__name__ in ("Int8Params", "Params4bit")


def weight(layer: Any) -> Tensor:
    """Return a linear layer's weight as it is computed with, in the layout that the layer has: quantised ones written
    out, (d_out, d_in), in float32.
    """
    if not is_quantised(layer):
        found: Tensor = layer.weight.detach()
        return found
    from sheepfold.quantised_layers import written_out

    return written_out(layer, torch.float32)


def check_blocks(layers: Mapping[str, nn.Module], method: str) -> None:
    """Raise ModelError where a method has bitsandbytes itself write out 4-bit weights that it gets wrong.

    Those are, on a CPU, weights whose rows are not whole blocks.
    """
    for name, layer in layers.items():
        found, width = getattr(layer, "weight", None), getattr(layer, "in_features", 0)
        if type(found).__name__ == "Params4bit" and width % BLOCK and cast(Tensor, found).device.type == "cpu":
            raise ModelError(
                f"adapter.method {method!r}: {name} is {width} wide, and on a CPU it takes 4-bit weights of whole "
                f"blocks of {BLOCK} alone; take lora, or model.bits 8"
            )


def hush() -> None:
    """Keep bitsandbytes, which PEFT imports, from telling of casts at every call and of an optional package."""
    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
