"""Small real things to test with: models of two layers, ragged rows, adapters with something in them."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sheepfold.adapter import Adapter, LoraPair, SparseDelta
from sheepfold.config import AdapterSettings, TrainSettings
from sheepfold.data.rows import TokenRows
from sheepfold.engines.cohort import CohortEngine
from sheepfold.engines.injection import CohortModel
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.messages import Assignment
from sheepfold.models import BUILTIN, silence_dropout
from sheepfold.state import BatchPlan
from sheepfold.targets import linear_shape

VOCABULARY = 97
CLIENTS = {"ann": 16, "bob": 11, "cleo": 15, "dora": 18}
"""Rows of each client."""

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
_OPT = {k: v for k, v in _SHAPE.items() if k not in ("intermediate_size", "num_key_value_heads")} | {
    "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
_LAYERS = ["sliding_attention", "full_attention"]
_GEMMA = _SHAPE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("LlamaForCausalLM", _SHAPE, ("q_proj", "v_proj", "down_proj")),
    "qwen2": ("Qwen2ForCausalLM", _SHAPE, ("q_proj", "v_proj")),
    "qwen3": ("Qwen3ForCausalLM", _SHAPE | {"head_dim": 8}, ("q_proj", "v_proj")),
    "mistral": ("MistralForCausalLM", _SHAPE | {"sliding_window": 8}, ("q_proj", "v_proj")),
    "gemma": ("GemmaForCausalLM", _SHAPE | {"head_dim": 8}, ("q_proj", "v_proj")),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA | {"attn_implementation": "eager"}, ("q_proj", "v_proj")),
    "gemma3": ("Gemma3ForCausalLM", _GEMMA | {"layer_types": _LAYERS}, ("q_proj", "v_proj")),
    "gpt2": ("GPT2LMHeadModel", _GPT2, ("c_attn", "c_proj")),
    "opt": ("OPTForCausalLM", _OPT, ("q_proj", "v_proj")),
    "phi": ("PhiForCausalLM", _SHAPE, ("q_proj", "v_proj")),
}
"""family -> (class, config, adapted modules)"""


def model(dtype: torch.dtype = torch.float64, family: str = "llama", **config: Any) -> Any:
    """Return a small frozen model with random weights, silent as `load_base` makes it."""
    import transformers

    cls = getattr(transformers, FAMILIES[family][0])
    torch.manual_seed(0)
    made = cls(cls.config_class(**({"attn_implementation": "sdpa"} | FAMILIES[family][1] | config)))
    silence_dropout(made)
    return made.to(dtype).requires_grad_(False).eval()


class Whole(TorchFunctionMode):
    """Let nothing of float64 become float32 on the way.

    Families write softmax and norms in float32, which leaves 1e-8, and of a padded position under a sliding window, all
    of whose scores are the least float64, makes NaN.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        told = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            narrows = torch.float32 in (told.get("dtype"), *(a for a in args[1:] if isinstance(a, torch.dtype)))
            if func is Tensor.float or (func is Tensor.to and narrows):
                return args[0]
            if narrows:
                told["dtype"] = torch.float64
        return func(*args, **told)


def tokens(rows: int = sum(CLIENTS.values()), seed: int = 0, shortest: int = 5, longest: int = 40) -> TokenRows:
    """Return ragged rows of random tokens; the second half of each is its answer."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    is_target = np.zeros(offsets[-1], dtype=bool)
    for start, end in itertools.pairwise(offsets):
        is_target[start + (end - start) // 2 : end] = True
    ids = rng.integers(3, VOCABULARY, offsets[-1]).astype(np.int32)
    return TokenRows(ids, is_target, offsets, (lengths // 2).astype(np.int32), np.zeros(rows, dtype=bool))


def client_rows() -> dict[str, np.ndarray]:
    """Return each client's row numbers into `tokens()`."""
    ends = np.cumsum(list(CLIENTS.values()))
    return {c: np.arange(end - n, end) for (c, n), end in zip(CLIENTS.items(), ends, strict=True)}


def sites(base: Any, family: str = "llama") -> dict[str, Any]:
    """Return the modules to adapt, by path."""
    return {name: m for name, m in base.named_modules() if name.endswith(FAMILIES[family][2])}


def adapter(base: Any, rank: int, seed: int, family: str = "llama", dtype: torch.dtype = torch.float64) -> Adapter:
    """Return an adapter whose A and B both hold random numbers, alpha 16."""
    draw = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, (d_in, d_out) in shapes(base, family).items():
        A = torch.randn(rank, d_in, generator=draw, dtype=torch.float64) / 6
        B = torch.randn(d_out, rank, generator=draw, dtype=torch.float64) / 6
        pairs[name] = LoraPair(A.to(dtype), B.to(dtype), 16 / rank)
    return Adapter(pairs)


def shapes(base: Any, family: str = "llama") -> dict[str, tuple[int, int]]:
    """Return (d_in, d_out) of each module to adapt, injected or not."""
    return {path: linear_shape(getattr(layer, "layer", layer)) for path, layer in sites(base, family).items()}


def with_cores(adapter: Adapter, seed: int = 0) -> Adapter:
    """Return the adapter with a random core in every pair."""
    draw = torch.Generator().manual_seed(seed)

    def cored(pair: LoraPair) -> LoraPair:
        core = torch.randn(pair.rank, pair.rank, generator=draw, dtype=torch.float64)
        return replace(pair, core=core.to(pair.A.dtype))

    return Adapter({path: cored(pair) for path, pair in adapter.pairs.items()})


def sparse(base: Any, share: float, seed: int = 0, family: str = "llama", mask: int = 0) -> Adapter:
    """Return random changes at a share of each weight's positions; the same `mask`, the same positions."""
    draw, where = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(mask)
    deltas = {}
    for path, (d_in, d_out) in shapes(base, family).items():
        at = torch.randperm(d_in * d_out, generator=where)[: max(1, int(share * d_in * d_out))].sort().values
        values = torch.randn(len(at), generator=draw, dtype=torch.float64) / 20
        deltas[path] = SparseDelta(values, at, (d_out, d_in))
    return Adapter(sparse=deltas)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: matrices this small are done before a second thread has woken up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quick() -> Iterator[None]:
    """One thread, and no waiting for the disk: what a power cut leaves is not what these tests are about."""
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def saved(folder: Path, family: str = "llama", **config: Any) -> Path:
    """Write a small base with the built-in one's tokenizer, for whole runs in no time; return its folder."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(BUILTIN)
    config = {"vocab_size": len(tokenizer), "initializer_range": 0.2} | config
    model(torch.float32, family, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cohort_engine(base: Any, train: TrainSettings, family: str = "llama", **over: Any) -> CohortEngine:
    """Return a cohort engine over the four clients; over: plan, seed, rule, dropout, rows, tokens, store, ..."""
    return CohortEngine(CohortModel(base, sites(base, family)), *_engine(train, over), **_keywords(train, over))


def peft_engine(base: Any, train: TrainSettings, family: str = "llama", **over: Any) -> PeftModelEngine:
    """Return the reference engine over the same clients. The base is PEFT's afterwards."""
    return PeftModelEngine(base, list(sites(base, family)), *_engine(train, over), **_keywords(train, over))


def _engine(train: TrainSettings, over: dict[str, Any]) -> tuple[Any, ...]:
    settings = AdapterSettings(dropout=over.get("dropout", 0.0))
    return over.get("tokens", tokens()), over.get("rows", client_rows()), train, settings


def _keywords(train: TrainSettings, over: dict[str, Any]) -> dict[str, Any]:
    again = bool(train.gradient_checkpointing)
    plan = over.get("plan", BatchPlan(4, train.micro_rows or train.batch_rows, 120, recompute=again))
    further = {name: over[name] for name in ("private", "ditto", "store", "beyond_peft") if name in over}
    return {"seed": over.get("seed", 1), "plan": plan, "rule": over.get("rule"), **further}


def assignments(adapters: dict[str, Adapter], round: int = 0, lr: float = 1e-3) -> list[Assignment]:
    """Return one assignment a client, each of which took part in all rounds before."""
    return [Assignment(client, round, a, lr, last=round) for client, a in adapters.items()]


def gap(left: Adapter, right: Adapter) -> float:
    """Return the largest difference between two adapters' numbers."""
    ours, theirs = left.tensors(), right.tensors()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@torch.no_grad()
def logits_with(base: Any, adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    """Return the base's logits with an adapter, by an oracle of its own: hooks that add scale * B A x to each site."""
    hooks = []
    for path, pair in adapter.pairs.items():

        def add(_module: Any, args: Any, out: torch.Tensor, pair: LoraPair = pair) -> torch.Tensor:
            return out + pair.scale * (args[0] @ pair.A.T @ pair.B.T)

        hooks.append(base.get_submodule(path).register_forward_hook(add))
    logits: torch.Tensor = base(ids).logits
    for hook in hooks:
        hook.remove()
    return logits
