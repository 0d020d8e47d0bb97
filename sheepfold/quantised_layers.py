"""The layers of a quantised base, as they compute here: bitsandbytes' own storage, and products that no row shares.

bitsandbytes has two products for 8 bits and two for 4, and chooses by device, mode and whether a gradient is asked for.
LLM.int8() rounds activations together with the other rows of the batch. On CPUs with AVX-512 BF16 the first evaluation
repacks 4-bit weights for a product without a backward pass, and training goes on with wrong gradients; and on any CPU
a weight of 4 bits whose rows are not whole blocks is written out wrong, since blocks run on over the ends of rows. Here
8 bits, and 4 on a CPU, are one product with the weight as it is written out.
"""

import copy
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Product(torch.autograd.Function):
    """x W', for a weight that is written out for each pass: kept for the backward one, it would fill the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return F.linear(x, written_out(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ written_out(ctx.layer, grad.dtype), None


def _product(x: Tensor, layer: Any) -> Tensor:
    y: Tensor = _Product.apply(x, layer)  # type: ignore[no-untyped-call]
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class EightBit(bnb.nn.Linear8bitLt):  # type: ignore[misc]  # it has no types of its own
    """A frozen linear layer whose weight is kept in 8 bits, with one scale a row."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        return _product(x, self)


class FourBit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A frozen linear layer whose weight is kept in 4 bits, with one scale for every 64 numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        if x.device.type == "cpu":
            return _product(x, self)
        y: Tensor = super().forward(x)  # the same product, with kernels for few rows
        return y


def settle(model: nn.Module) -> None:
    """Put a model's quantised layers to work as this file says."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear8bitLt:
            module.__class__ = EightBit
        elif type(module) is bnb.nn.Linear4bit:
            module.__class__ = FourBit


@torch.no_grad()
def written_out(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return a quantised layer's weight, (d_out, d_in), in `dtype`."""
    if isinstance(layer, bnb.nn.Linear4bit):
        state = layer.weight.quant_state
        flat = copy.copy(state)
        flat.shape = torch.Size((1, state.shape.numel()))  # so that blocks may run on over the ends of rows
        wide: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, flat)
        return wide.view(state.shape).to(dtype)
    scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    numbers: Tensor = layer.weight.data
    return numbers.to(dtype, copy=True).mul_((scale / 127)[:, None])
