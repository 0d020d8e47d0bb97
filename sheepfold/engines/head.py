"""Losses at target positions only, never the logits of all tokens at once.

Transformers' `labels=` computes logits for prompts and padding too, and in float32 for all of them together: at a
vocabulary of 128,000 that is most of a step's memory. Here the hidden states of the targets alone go through the head,
chunk by chunk, and the backward pass recomputes each chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sheepfold.engines.batches import Batch
from sheepfold.errors import ModelError

CHUNK_NUMBERS = 1 << 24
"""Logits held at once: 64 MiB in float32."""


class _Take(torch.autograd.Function):
    """x[index] for an index without repeats: its backward writes each row once, in no order that matters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        full = grad.new_zeros(ctx.rows, grad.shape[1])
        full[index] = grad
        return full, None


class Head:
    """A causal language model as two halves: hidden states, and the logits of some of them."""

    def __init__(self, model: Any) -> None:
        """Take a transformers causal LM apart. Raises ModelError for a model that this would change."""
        self.model = model
        self.body = model.base_model
        self.output = model.get_output_embeddings()
        config = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.multiply: float = float(getattr(config, "logit_scale", None) or 1.0)
        self.divide: float = float(getattr(config, "logits_scaling", None) or 1.0)
        self._check()

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the last hidden states, (rows, tokens, width). No mask and no cache: padding is on the right."""
        out: Tensor = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return out

    def of(self, batch: Batch) -> Tensor:
        """Return the cross-entropy of each target of a batch in nats, (targets,)."""
        return self.losses(self.hidden(batch.ids), batch.position, batch.target)

    def judged(self, batch: Batch) -> tuple[Tensor, None]:
        """Return the same losses; targets are tokens, and no labels are given."""
        return self.of(batch), None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, (n, width) -> (n, vocabulary), in float32 (float64 stays)."""
        logits: Tensor = self.output(hidden)
        if self.multiply != 1.0 or self.divide != 1.0:
            logits = logits * self.multiply / self.divide
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(self, hidden: Tensor, position: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of each target in nats, (targets,).

        hidden: (rows, tokens, width); position: (targets,) into rows * tokens, without repeats; target: (targets,).
        """
        taken: Tensor = _Take.apply(hidden.reshape(-1, hidden.shape[-1]), position)  # type: ignore[no-untyped-call]
        vocabulary = self.output.weight.shape[0]
        chunk = max(1, CHUNK_NUMBERS // int(vocabulary))
        if len(target) <= chunk:
            return self._cross_entropy(taken, target)
        parts = zip(torch.split(taken, chunk), torch.split(target, chunk), strict=True)
        return torch.cat([checkpoint(self._cross_entropy, h, t, use_reentrant=False) for h, t in parts])

    def _cross_entropy(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden), target, reduction="none")

    @torch.no_grad()
    def _check(self) -> None:
        """Compare with the model's own forward once: a family that treats its logits otherwise is found here."""
        device = self.output.weight.device
        ids = torch.arange(2, 10, device=device)[None] % self.model.config.vocab_size
        whole = self.model(input_ids=ids, use_cache=False).logits[0]
        ours = self.logits(self.hidden(ids)[0])
        gap = float((whole.to(ours.dtype) - ours).abs().max())
        size = float(whole.abs().max())
        if not gap <= 1e-3 * max(size, 1.0):
            raise ModelError(
                f"{type(self.model).__name__}: its logits are not head(hidden states) (they differ by {gap:.3g}); "
                "use train.engine peft_model for this family"
            )
