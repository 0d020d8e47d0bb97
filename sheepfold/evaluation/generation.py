"""Answers: greedy or sampled, batched, through transformers' own `generate` with its cache.

    prompts ─ sort by length ─ batches, padded on the left ─ generate ─ cut at the end token ─ original order

Which rows share a batch changes nothing but speed: positions count from each row's own first token, padding
is masked, and a sampled row draws from its own stream. On two CPU cores `generate` took 1.0 to 1.3 times a
bare loop over the model, so there is no loop of our own.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from sheepfold.config import GenerationSettings
from sheepfold.errors import DataError
from sheepfold.evaluation import soft_prompts
from sheepfold.models import max_positions
from sheepfold.rng import torch_stream

OnBatch = Callable[[list[int]], None]
"""Called before each batch with the numbers, in `prompts`, of its rows in order."""


def generate(
    model: Any,
    prompts: Sequence[Tensor],
    settings: GenerationSettings,
    *,
    seed: int,
    pad_token_id: int,
    eos_token_ids: Sequence[int],
    on_batch: OnBatch | None = None,
) -> list[list[int]]:
    """Return the new tokens of every prompt, in the prompts' order, without the end token.

    prompts: (tokens,) int64 each. An answer ends at an end token, after max_new_tokens, or where the model's
    positions end. Temperature 0 takes the likeliest token; else a row draws from the stream named by (seed,
    its own tokens), so a prompt gets the same draws in any batch, order or engine, and under any adapter.
    Whatever decoding options the model's own generation config holds are not applied. Raises DataError for a
    prompt without tokens, or without a position left to answer in.
    """
    limit = max_positions(model.config)
    limit = None if limit is None else limit - soft_prompts.virtual_tokens(model)
    room = [_room(row, len(prompt), settings.max_new_tokens, limit) for row, prompt in enumerate(prompts)]
    # Longest first, so that running out of memory happens at once.
    order = sorted(range(len(prompts)), key=lambda row: (room[row], -len(prompts[row])))
    answers: list[list[int]] = [[] for _ in prompts]
    alike = [len(prompt) if soft_prompts.needs_equal_lengths(model) else 0 for prompt in prompts]
    for new_tokens, rows in _batches(order, room, alike, settings.batch_rows):
        if on_batch is not None:
            on_batch(rows)
        ids, mask = pad_left([prompts[row] for row in rows], pad_token_id)
        draws = Draws([prompts[row] for row in rows], settings, seed) if settings.temperature else None
        config = decoding(new_tokens, settings.beams, pad_token_id, eos_token_ids)
        new = decode(model, ids, mask, config, [draws] if draws is not None else [])
        for row, tokens in zip(rows, new.tolist(), strict=True):
            answers[row] = until(tokens, eos_token_ids)
    return answers


class Draws:
    """Turns a batch's logits into ones whose largest entry is a draw from the settings' distribution.

    Gumbel noise added to log probabilities makes argmax an exact draw (Gumbel 1954; Maddison et al.,
    arXiv:1411.0030).
    """

    def __init__(
        self, prompts: Sequence[Tensor], settings: GenerationSettings, seed: int, repeats: Sequence[int] = ()
    ) -> None:
        """repeats: a number for each row, so that one prompt asked several times gets several draws."""
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self.temperature = settings.temperature
        self.cuts = [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        self.cuts += [TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []
        names = [hashlib.blake2b(prompt.long().cpu().numpy().tobytes()).hexdigest() for prompt in prompts]
        numbers = repeats or [0] * len(names)
        addresses = [(name, number) if number else (name,) for name, number in zip(names, numbers, strict=True)]
        self.streams = [torch_stream(seed, "generation", *address) for address in addresses]

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """ids: (rows, tokens so far), logits: (rows, vocabulary), returns: the same shape, float32."""
        scores = logits.float() / self.temperature
        for cut in self.cuts:
            scores = cut(ids, scores)
        # A row's vocabulary-sized draw costs less than the model's step; on the CPU, so that devices agree.
        uniform = torch.stack([torch.rand(scores.shape[1], generator=stream) for stream in self.streams])
        return scores - torch.log(-torch.log(uniform.clamp(min=1e-20))).to(scores.device)


def pad_left(prompts: Sequence[Tensor], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (rows, longest prompt) int64; the mask is 0 on padding, known by length."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = 1
    return ids, mask


def until(tokens: Sequence[int], stop: Sequence[int]) -> list[int]:
    """Return the tokens before the first that is in `stop`."""
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return list(tokens[:end])


def room_for(length: int, max_new_tokens: int, limit: int | None) -> int:
    """Return how many tokens may follow a prompt of this length, at most max_new_tokens."""
    return max_new_tokens if limit is None else min(max_new_tokens, limit - length)


def _room(row: int, length: int, max_new_tokens: int, limit: int | None) -> int:
    room = room_for(length, max_new_tokens, limit)
    if length == 0 or room < 1:
        raise DataError(
            f"generation: prompt {row} has {length} tokens and the model {limit} positions; an answer needs a "
            "prompt and a free position: lower data.max_tokens"
        )
    return room


def _batches(
    order: Sequence[int], room: Sequence[int], alike: Sequence[int], batch_rows: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield (new tokens, row numbers): rows of a batch may all answer equally long, and are alike."""
    for (new_tokens, _), group in groupby(order, key=lambda row: (room[row], alike[row])):
        rows = list(group)
        yield from ((new_tokens, rows[i : i + batch_rows]) for i in range(0, len(rows), batch_rows))


def decoding(new_tokens: int, beams: int, pad_token_id: int, eos_token_ids: Sequence[int]) -> Any:
    """Return transformers' settings for this many new tokens: the likeliest ones, or those that processors choose."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=beams,
        use_cache=True,
        pad_token_id=pad_token_id,
        eos_token_id=list(eos_token_ids) or None,
    )


def decode(
    model: Any, ids: Tensor, mask: Tensor, config: Any, processors: Sequence[Any] = (), **watchers: Any
) -> Tensor:
    """Return the new tokens of prompts padded on the left, (rows, at most new tokens) int64 on the CPU.

    ids, mask: (rows, longest prompt). processors change the logits of each step; watchers: transformers' own streamer
    and stopping_criteria.
    """
    with torch.no_grad(), _only(model, config):
        plain, inputs = soft_prompts.asked(model, ids.to(model.device), mask.to(model.device), config.num_beams)
        out = plain.generate(
            **inputs,
            generation_config=config,
            logits_processor=list(processors),
            **watchers,
        )
    return out[:, ids.shape[1] :].cpu()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _only(model: Any, config: Any) -> Iterator[None]:
    """Let this generation config be the model's own: `generate` fills in what is unset from there.

    Qwen 2's, for one, has a repetition penalty, which nobody asked for here.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.generation_config
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = before
