"""Rows end to end in one sequence, without padding: how a GPU gets its tokens.

Rows lie client after client, so the tokens of a client are one stretch and its products one of a grouped matmul
(owners.Packed). Positions begin anew with every row, and attention looks at a row alone: torch's variable-length kernel
on CUDA in half precision (FlashAttention, arXiv:2205.14135), elsewhere SDPA, row by row. A family that would let rows
see each other, or loses the positions, is found by comparing (`packs`) before anything trains.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sheepfold import memory
from sheepfold.data.rows import TokenRows
from sheepfold.engines.batches import Batch, Pack, Row, batch_of
from sheepfold.loading import first_line

ATTENTION = "sheepfold_packed"
"""What transformers knows the attention function below as"""


def packs(tokens: TokenRows, rows: Sequence[Row], *, max_rows: int, max_tokens: int) -> Iterator[Batch]:
    """Yield the rows in passes of at most max_rows rows and max_tokens tokens, in the order given: client by client.

    A row longer than max_tokens gets a pass of its own.
    """
    start = total = 0
    for end, row in enumerate(rows):
        length = tokens.length(row.number)
        if end > start and (end - start == max_rows or total + length > max_tokens):
            yield packed(tokens, rows[start:end])
            start, total = end, 0
        total += length
    if start < len(rows):
        yield packed(tokens, rows[start:])


def packed(tokens: TokenRows, rows: Sequence[Row]) -> Batch:
    """Return rows, sorted by client, as one sequence (1, tokens) whose targets are the next tokens of each row."""
    joined = tokens.joined([row.number for row in rows])
    ids, _, lengths = joined
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(rows)), lengths)
    pack = Pack(
        starts=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        positions=torch.from_numpy(np.arange(len(ids)) - (ends - lengths)[row])[None],
        row=torch.from_numpy(row),
        longest=int(lengths.max()),
        tokens_of=np.bincount([r.group for r in rows], weights=lengths).astype(int).tolist(),
    )
    return batch_of(rows, ids[None], joined, np.arange(len(ids)), pack)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Return causal attention of packed rows, (1, heads, tokens, d) -> (1, tokens, heads, d), as transformers calls it.

    Raises NotImplementedError for what a family asks for beyond that: soft caps, masks, sinks.
    """
    further = [name for name in ("s_aux", "position_bias") if more.get(name) is not None]
    if softcap is not None or attention_mask is not None or further or getattr(module, "is_causal", True) is False:
        raise NotImplementedError("packed attention is causal, without masks, soft caps, sinks and biases")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (tokens, heads, d)
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if window is None else window - 1
        ends, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
        out = varlen_attn(q, k, v, *ends, *longest, scale=scaling, window_size=(left, 0), enable_gqa=q.shape != k.shape)
        assert isinstance(out, Tensor)
        return out[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    rows = zip(torch.split(q, sizes), torch.split(k, sizes), torch.split(v, sizes), strict=True)
    return torch.cat([_row(*row, scaling, window) for row in rows])[None], None


def _row(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Return causal attention of one row, (tokens, heads, d)."""
    mask = None
    if window is not None and window < len(q):
        mask = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril().triu(1 - window)
    query, key, value = (t.transpose(0, 1)[None] for t in (q, k, v))
    grouped = q.shape != k.shape
    out = F.scaled_dot_product_attention(query, key, value, mask, 0.0, mask is None, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def options(pack: Pack | None) -> dict[str, Any]:
    """Return what a model's forward is called with for packed rows; nothing for others."""
    if pack is None:
        return {}
    ends = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), pack.starts)
    return {"position_ids": pack.positions, **ends, **dict.fromkeys(("max_length_q", "max_length_k"), pack.longest)}


@contextmanager
def attention(model: Any, pack: Pack | None) -> Iterator[None]:
    """Let a model attend within the rows of a pack, forward and backward; None: as it does.

    The model's own attention function comes back at the end: masks and caches of generation are its business. The
    backward pass belongs inside, since layers that are computed again attend again.
    """
    if pack is None:
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    config = model.config
    before, config._attn_implementation = config._attn_implementation, ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def may_pack(model: Any) -> bool:
    """Return whether a model's packed rows come out as they do alone, by trying three random ones.

    Neither may a row change with the one before it, not by a bit: rounding hides that where states leak only a little.
    """
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, min(1000, model.config.vocab_size), (n,), generator=draw) for n in (9, 4, 14)]
    other = torch.randint(2, min(1000, model.config.vocab_size), (9,), generator=draw)
    try:
        together, beside = _tried(model, rows, device), _tried(model, [other, rows[1], rows[2]], device)
        alone = torch.cat([_tried(model, [row], device, pack=False) for row in rows])
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError, NotImplementedError) as error:
        if memory.is_out_of_memory(error):
            raise
        # the family asks for more or does not hand on what attention needs; or torch or the GPU have no such kernel
        logging.getLogger("sheepfold").info("rows are not packed: %s", first_line(error))
        return False
    if not torch.equal(together[len(other) :], beside[len(other) :]):
        return False
    apart = (together - alone).double().norm(dim=1) / alone.double().norm(dim=1)
    # half precision rounds each kernel otherwise; wrong positions or wrong rows change a token by as much as it is
    return bool(apart.max() <= (1e-4 if together.dtype in (torch.float32, torch.float64) else 0.1))


def _tried(model: Any, rows: list[Tensor], device: torch.device, *, pack: bool = True) -> Tensor:
    """Return the hidden states of rows end to end, (tokens, width), having gone back through them too."""
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    made = Pack(starts, positions, torch.empty(0), int(lengths.max()), lengths.tolist()).to(device) if pack else None
    embedded = model.get_input_embeddings()(torch.cat(rows)[None].to(device)).detach().requires_grad_()
    with torch.enable_grad(), attention(model, made):
        hidden: Tensor = model.base_model(inputs_embeds=embedded, use_cache=False, **options(made)).last_hidden_state[0]
        torch.autograd.backward(hidden.float().sum())
    return hidden.detach()
