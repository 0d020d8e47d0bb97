"""What a forward and backward pass needs beside weights: counted tensor by tensor, on a model without numbers.

The base's shapes are on the meta device, where every operation makes tensors of the right size and computes nothing.
Each storage is counted from the operation that makes it until nothing refers to it, so what autograd keeps and what
kernels pass on to one another are both there, for whatever family, adapter and engine. It takes a fraction of a second,
no weights and no GPU, and the same experiment gives the same bytes on any machine.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sheepfold.adapter import Adapter
from sheepfold.config import AdapterSettings, TrainSettings
from sheepfold.data.rows import TokenRows
from sheepfold.engines.batches import Batch, Row
from sheepfold.engines.recomputing import recomputing
from sheepfold.offsite.cut import cut_in, trained
from sheepfold.tasks.base import Task, widened

META = torch.device("meta")
_SCALAR = torch.ops.aten._local_scalar_dense.default


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations under it make, for as long as each lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _SCALAR and args[0].is_meta:
            return True  # what transformers asks of numbers is whether positions follow one another: they do
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


@contextmanager
def fused() -> Iterator[None]:
    """Let attention keep no map of tokens by tokens, as the kernels of CPU and GPU do; meta's own keeps several.

    Real tensors go through what was there before. A torch function mode would be off while layers are recomputed.
    """
    before = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more: Any, **kw: Any
    ) -> Tensor:
        if not query.is_meta:
            return before(query, key, value, attn_mask, *more, **kw)
        causal, scale = kw.get("is_causal", False), kw.get("scale")
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = kernel(query, key, value, 0.0, causal, attn_mask=attn_mask, scale=scale)[0]
        return out

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def rows_of_a_pass(tokens: TokenRows, max_tokens: int, max_rows: int) -> list[int]:
    """Return the longest rows that share a forward pass, shortest first: what needs most."""
    lengths = tokens.lengths()
    longest = int(lengths.max(initial=1))
    count = max(1, min(max_tokens // longest, max_rows))
    return [int(n) for n in lengths.argsort(kind="stable")[-count:]]


def activation_bytes(
    model: Any,
    sites: Sequence[str],
    adapter: Adapter,
    settings: AdapterSettings,
    train: TrainSettings,
    task: Task,
    tokens: TokenRows,
    rows: Sequence[int],
    *,
    dtype: torch.dtype,
    together: bool,
    recompute: bool = False,
) -> int | None:
    """Return the most bytes that one forward and backward pass over these rows has in use at once, beside weights.

    model: on the meta device, left as it is; sites: what LoRA adapts; together: whether several clients share the pass;
    recompute: whether blocks run again in the backward pass.
    None where the model's way depends on its numbers, so that shapes alone cannot tell (mixtures of experts).
    """
    batch = task.collate(tokens, [Row(n, 0) for n in rows]).to(META)
    adapted = tuple((name, tuple(t.shape)) for name, t in adapter.tensors().items())
    how = (settings.model_dump_json(), train.engine, recompute, dtype, together)
    key = (str(model.config), tuple(sites), adapted, how, task.name, tuple(batch.ids.shape), len(batch.target))
    if key not in _counted:
        copied = _frozen(model, dtype)
        made = functools.partial(_loss, copied, sites, adapter, settings, train, task, batch, together)
        _counted[key] = _peak(made, train.engine != "zeroth_order", recomputing([copied], recompute))
    return _counted[key]


_counted: dict[Any, int | None] = {}
"""What was counted in this process: many runs of one base and shape ask once"""


def _peak(made: Callable[[], Callable[[], Tensor]], grad: bool, training: AbstractContextManager[None]) -> int | None:
    """Return the most bytes that a loss and its backward pass have in use beside what they begin with."""
    try:
        with fused(), Live() as live:
            loss = made()
            live.now = live.peak = 0
            with training:
                _there_and_back(loss, grad)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            raise
        return None
    return int(live.peak)


def _there_and_back(loss: Callable[[], Tensor], grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        nats = loss()
    if grad:
        torch.autograd.backward(nats.sum())


def _frozen(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a model as `load_base` leaves it."""
    return copy.deepcopy(model).to(dtype).requires_grad_(False).eval()


def _loss(
    model: Any,
    sites: Sequence[str],
    adapter: Adapter,
    settings: AdapterSettings,
    train: TrainSettings,
    task: Task,
    batch: Batch,
    together: bool,
) -> Callable[[], Tensor]:
    """Return a function that gives the loss of a batch as the experiment's engine computes it."""
    if train.engine == "cohort":
        return _cohort_loss(model, sites, [adapter] * (2 if together else 1), settings.dropout, task, batch)
    if train.engine == "zeroth_order":
        return functools.partial(_plain_loss, model, batch, task)
    from sheepfold.engines.carriers import carrier

    beyond_peft = bool(adapter.sparse) or any(pair.core is not None for pair in adapter.pairs.values())
    part = cut_in(model)
    only = trained(model, part) if part is not None else None
    carried = carrier(model, sites, settings, 0, beyond_peft=beyond_peft, task=task, only=only)
    carried.write(adapter)
    for p in carried.factors().values():
        p.requires_grad_().grad = torch.zeros_like(p)
    carried.model.eval()
    return functools.partial(_plain_loss, carried.model, batch, task)


def _cohort_loss(
    model: Any, sites: Sequence[str], adapters: Sequence[Adapter], dropout: float, task: Task, batch: Batch
) -> Callable[[], Tensor]:
    from sheepfold.engines.dropout import RowKeys
    from sheepfold.engines.injection import CohortModel, Selection
    from sheepfold.engines.stack import stacked

    whole = [name for names in task.whole(model).values() for name in names]
    cohort = CohortModel(model, {path: model.get_submodule(path) for path in sites}, whole)
    head = task.head(model)
    # in use from now on: layers that are computed again ask for it in the backward pass
    cohort.selection = Selection(stacked(adapters, META, grad=True, whole=whole), batch.group, dropout=dropout)
    cohort.selection.keys = RowKeys(batch.group) if dropout else None
    return functools.partial(head.of, batch)


def _plain_loss(model: Any, batch: Batch, task: Task) -> Tensor:
    """Return the loss as a plain model gives it: logits of all tokens, then those of the targets in float32."""
    if task.labels:
        return widened(model(input_ids=batch.ids).logits)
    logits = model(input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids)).logits
    chosen = logits[:, -batch.ids.shape[1] :].flatten(0, 1).index_select(0, batch.position)
    return F.cross_entropy(widened(chosen), batch.target, reduction="none")
