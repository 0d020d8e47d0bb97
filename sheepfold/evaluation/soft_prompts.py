"""Answers under virtual tokens: what transformers' own `generate` is asked with, so that padding changes nothing.

    prompt, p-tuning   embeddings   padding | virtual tokens | prompt
    prefix             a cache that holds the prefix already, then padding | prompt

PEFT's own way puts virtual tokens before the padding and drops the positions, so a short row of a batch would get other
answers than by itself.
"""

from typing import Any

import torch
from torch import Tensor

from sheepfold.adapter_methods import CACHED
from sheepfold.errors import DataError


def virtual_tokens(model: Any) -> int:
    """Return how many positions a PEFT model's virtual tokens take before a row's own; 0 where it has none."""
    config = _soft(model)
    return int(config.num_virtual_tokens) if config is not None else 0


def needs_equal_lengths(model: Any) -> bool:
    """Return whether only rows of one length may share a batch.

    A window over the cache counts its places, so padding between the prefix and a row would push the prefix out.
    """
    config = _soft(model)
    text = model.config.get_text_config() if config is not None else None
    return config is not None and _is_cached(config) and getattr(text, "sliding_window", None) is not None


def asked(model: Any, ids: Tensor, mask: Tensor, beams: int) -> tuple[Any, dict[str, Any]]:
    """Return the model whose `generate` is to be called, and with what, for prompts padded on the left.

    ids, mask: (rows, longest prompt), on the model's device. `generate` then returns the prompts' ids and the new ones.
    Raises DataError for rows of several lengths where they cannot share a batch.
    """
    config = _soft(model)
    if config is None:
        return model, {"input_ids": ids, "attention_mask": mask}
    base = model.get_base_model()
    wide = torch.cat([mask.new_ones(len(mask), config.num_virtual_tokens), mask], dim=1)
    if needs_equal_lengths(model) and not bool(mask.all()):
        raise DataError(
            f"generation: {base.config.model_type} attends within a window, and the prefix would leave it by the "
            "padding of shorter rows; ask for prompts of different lengths one by one"
        )
    if _is_cached(config):
        # transformers copies a row's ids and mask for every beam, but not a cache
        prefix = model.get_prompt(batch_size=len(ids) * beams)
        return base, {"input_ids": ids, "attention_mask": wide, "past_key_values": prefix}
    own = model.word_embeddings(ids)
    rows = torch.cat([model.get_prompt(batch_size=len(ids)).to(own), own], dim=1)
    order = wide.argsort(dim=1, stable=True)  # padding first, the rest as it stands
    embeddings = rows.gather(1, order[:, :, None].expand_as(rows))
    return base, {"input_ids": ids, "inputs_embeds": embeddings, "attention_mask": wide.gather(1, order)}


def _is_cached(config: Any) -> bool:
    return str(config.peft_type.value).lower() in CACHED


def _soft(model: Any) -> Any:
    """Return the configuration of the virtual tokens that are switched on, if there are any."""
    config = getattr(model, "active_peft_config", None)
    on = config is not None and config.is_prompt_learning and model.has_active_enabled_adapter
    return config if on else None
