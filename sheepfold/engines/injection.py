"""Many adapters on one frozen base: each adapted layer adds its own client's change to every row of a batch.

    y_row = base(x_row) + s_k B_k A_k dropout(x_row),   k = client of the row

A change is a chain of matrices that a row goes through: A and B; A, core and B; or one sparse matrix. The matrices of
all clients lie stacked (stack.py), A (K, r, d_in) and B (K, d_out, r). A batch holds rows of any clients, owners.py
knows whose each row is, and batched matmuls do the rest (Punica's idea, arXiv:2310.18547, written for training).

Layers that are trained whole, such as a classifier's head, have a weight and a bias of each client's own instead,
stacked in the same flat tensor.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sheepfold.engines.dropout import RowKeys, dropout
from sheepfold.engines.owners import Owners, Rows, summed, through
from sheepfold.engines.stack import Stack
from sheepfold.errors import ModelError


@dataclass(slots=True)
class Selection:
    """Which adapters are on, and whose row each row of the coming batch is."""

    stack: Stack
    index: Tensor
    """(rows,) int64 into the stack; not looked at where the stack holds one client"""
    owners: Owners = None  # type: ignore[assignment]
    """How the batch lies; by default as `Rows`"""
    dropout: float = 0.0
    keys: RowKeys | None = None
    """Where this batch's dropout draws come from; needed where dropout > 0"""
    side: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    """What the base has changed by, for every row alike (see `chains`)"""

    def __post_init__(self) -> None:
        self.owners = self.owners or Rows(self.index)


class Site(nn.Module):
    """One adapted layer: the frozen layer, and each row's own low-rank term."""

    def __init__(self, layer: nn.Module, name: str, order: int, switch: "CohortModel") -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        self.order = order
        self._switch = [switch]  # in a list, so that torch does not register the model inside itself

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, d_in) -> (rows, tokens, d_out)"""
        y: Tensor = self.layer(x)
        selection = self._switch[0].selection
        if selection is None:
            return y
        if self.name in selection.side:
            change = x
            for matrix in selection.side[self.name]:
                change = F.linear(change, matrix)
            y = y + change
        return self._changed(x, y, selection).view_as(y)

    def _changed(self, x: Tensor, y: Tensor, selection: Selection) -> Tensor:
        """Return y with each row's own change on it."""
        stack, owners = selection.stack, selection.owners
        chain = stack.chain(self.name)
        if len(chain) == 1:  # a weight's own change: as large as the weight, without dropout or scale
            return y + _one_by_one(x, chain[0].to(x.dtype), selection.index).view_as(y)
        if selection.keys is not None:
            x = dropout(x, selection.dropout, selection.keys, self.order)
        if not stack.alone:
            x, y = owners.rows(x), owners.rows(y)
        return through(x, chain, owners, onto=y, scale=owners.spread(stack.scale(self.order)))


class WholeSite(nn.Module):
    """A layer that every client has for itself: linear, or a norm, in the stack's own precision."""

    def __init__(self, layer: nn.Linear | nn.LayerNorm, name: str, switch: "CohortModel") -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        self._switch = [switch]

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., d_in) -> (rows, ..., d_out)"""
        selection = self._switch[0].selection
        weight = None if selection is None else selection.stack.whole(f"{self.name}.weight")
        if selection is None or weight is None:
            y: Tensor = self.layer(x)
            return y
        bias, index = selection.stack.whole(f"{self.name}.bias"), selection.index
        rows = x.to(weight.dtype).view(len(x), -1, x.shape[-1])
        if isinstance(self.layer, nn.Linear):
            few = len(weight) == 1 or weight[0].numel() <= FEW_NUMBERS
            rows = through(rows, [weight], selection.owners) if few else _one_by_one(rows, weight, index)
        else:
            rows = F.layer_norm(rows, self.layer.normalized_shape, eps=self.layer.eps)
            rows = rows * _of_each(weight, index)
        if bias is not None:
            rows = rows + _of_each(bias, index)
        return rows.view(*x.shape[:-1], rows.shape[-1])


class _EachRow(torch.autograd.Function):
    """vectors[index]: (K, d) -> (rows, d). Its backward adds up the rows of each client, always in the same order."""

    @staticmethod
    def forward(ctx: Any, factors: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.clients = factors.shape[0]
        return factors.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return summed(grad, index, ctx.clients), None


FEW_NUMBERS = 1 << 14
"""A weight up to this size is copied for every row; larger ones are taken client after client."""


def _of_each(vectors: Tensor, index: Tensor) -> Tensor:
    """Return each row's own vector, (K, d) -> (rows or 1, 1, d)."""
    return (vectors if len(vectors) == 1 else _EachRow.apply(vectors, index))[:, None]  # type: ignore[no-untyped-call]


def _one_by_one(x: Tensor, matrices: Tensor, index: Tensor) -> Tensor:
    """Return each row of x through its client's matrix, client after client: no row gets a copy of the matrix."""
    if len(matrices) == 1:
        return F.linear(x, matrices[0])
    x = Rows(index).rows(x)
    order = torch.argsort(index, stable=True)
    parts = torch.split(x[order], torch.bincount(index, minlength=len(matrices)).tolist())
    done = torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, matrices, strict=True)])
    return done[torch.argsort(order)]


class CohortModel:
    """A frozen base whose adapted layers can carry any number of adapters at once."""

    def __init__(self, model: Any, sites: Mapping[str, nn.Module], whole: Collection[str] = ()) -> None:
        """Put a Site in the place of every layer in `sites`; `close` puts the layers back. Raises ModelError.

        whole: the names of tensors that clients have whole; their layers are replaced too.
        """
        if not sites:
            raise ModelError("no layer to adapt: adapter.targets matched nothing")
        head = model.get_output_embeddings()
        if odd := [name for name, layer in sites.items() if layer is head and head is not None]:
            raise ModelError(
                f"{odd[0]}: the output head; the cohort engine computes it at targets alone and does not adapt "
                "it: leave it out of adapter.targets, or use train.engine peft_model"
            )
        self.model = model
        self.layers = dict(sites)
        self.whole = tuple(whole)
        self.selection: Selection | None = None
        for order, name in enumerate(sorted(sites)):
            _replace(model, name, Site(sites[name], name, order, self))
        for name in sorted({tensor.rpartition(".")[0] for tensor in whole}):
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear | nn.LayerNorm):
                raise ModelError(
                    f"{name}: a {type(layer).__name__}, and the cohort engine trains linear layers and norms whole; "
                    "use train.engine peft_model"
                )
            self.layers[name] = layer
            _replace(model, name, WholeSite(layer, name, self))

    @contextmanager
    def using(self, selection: Selection | None) -> Iterator[None]:
        """Run the base with these adapters; None: the bare base."""
        before, self.selection = self.selection, selection
        try:
            yield
        finally:
            self.selection = before

    def close(self) -> None:
        """Put the base's own layers back."""
        for name, layer in self.layers.items():
            _replace(self.model, name, layer)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
