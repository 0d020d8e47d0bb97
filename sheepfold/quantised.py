"""Quantised bases through bitsandbytes: 8 bits (LLM.int8(), arXiv:2208.07339) or 4 (NF4, arXiv:2305.14314)."""

import logging
import warnings
from typing import Any

import torch
from torch import nn

from sheepfold.errors import ConfigError, ModelError, require

BLOCK = 64
"""Numbers that share a scale in NF4, as bitsandbytes cuts them."""


def options(bits: int, place: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what from_pretrained needs to quantise as it reads. Raises ConfigError: other bits, no bitsandbytes."""
    if bits not in (4, 8):
        raise ConfigError(f"--bits {bits}: a base is quantised to 8 or 4 bits; leave it out for the base as it is")
    require(f"--bits {bits}", "quant", "bitsandbytes")
    from transformers import BitsAndBytesConfig

    hush()
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    return {"quantization_config": config, "device_map": {"": str(place)}}


def check(model: nn.Module, bits: int, place: torch.device, base: str) -> None:
    """Raise ModelError for 4 bits on a CPU where a layer's width is not whole blocks: the first token would fail."""
    if bits != 4 or place.type != "cpu":
        return
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and getattr(module, "in_features", 0) % BLOCK:
            raise ModelError(
                f"model.base {base!r}: {name} is {getattr(module, 'in_features', 0)} wide, and on a CPU 4 bits need "
                f"a multiple of {BLOCK}; take --bits 8, or a GPU"
            )


def hush() -> None:
    """Keep bitsandbytes, which PEFT imports, from telling of casts at every call and of an optional package."""
    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
