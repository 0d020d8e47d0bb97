"""Losses at target positions only, never the logits of all tokens at once.

Transformers' `labels=` computes logits for prompts and padding too, and in float32 for all of them together: at a
vocabulary of 128,000 that is most of a step's memory. Here the hidden states of the targets alone go through the head,
chunk by chunk. A target's gradient (its softmax less one at the target) is known as soon as its logits are, so it goes
back through the frozen head in the forward pass, and no logits are kept or computed twice (as Liger Kernel does it,
arXiv:2410.10989, section 3.2, for a head that trains).
"""

from typing import Any

import torch
from torch import Tensor

from sheepfold.engines import packing
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


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden states through a frozen head, (targets, width) -> (targets,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, head: "Head") -> Tensor:
        chunk = max(1, CHUNK_NUMBERS // int(head.output.weight.shape[0]))
        parts = zip(torch.split(hidden, chunk), torch.split(target, chunk), strict=True)
        losses, back = zip(*(head.loss_and_gradient(*part, ctx.needs_input_grad[0]) for part in parts), strict=True)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(back))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return (back * grad[:, None]).to(back.dtype), None, None


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
        multiply = float(getattr(config, "logit_scale", None) or 1.0)
        self.multiply = multiply / float(getattr(config, "logits_scaling", None) or 1.0)
        self._check()

    def hidden(self, ids: Tensor, **packed: Any) -> Tensor:
        """Return the last hidden states, (rows, tokens, width). No mask and no cache: padding is on the right."""
        out: Tensor = self.body(input_ids=ids, use_cache=False, **packed).last_hidden_state
        return out

    def of(self, batch: Batch) -> Tensor:
        """Return the cross-entropy of each target of a batch in nats, (targets,)."""
        return self.losses(self.hidden(batch.ids, **packing.options(batch.pack)), batch.position, batch.target)

    def judged(self, batch: Batch) -> tuple[Tensor, None]:
        """Return the same losses; targets are tokens, and no labels are given."""
        return self.of(batch), None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, (n, width) -> (n, vocabulary), in float32 (float64 stays)."""
        logits: Tensor = self.output(hidden)
        if self.multiply != 1.0:
            logits = logits * self.multiply
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(self, hidden: Tensor, position: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of each target in nats, (targets,).

        hidden: (rows, tokens, width); position: (targets,) into rows * tokens, without repeats; target: (targets,).
        """
        taken: Tensor = _Take.apply(hidden.reshape(-1, hidden.shape[-1]), position)  # type: ignore[no-untyped-call]
        losses: Tensor = _CrossEntropy.apply(taken, target, self)  # type: ignore[no-untyped-call]
        return losses

    def loss_and_gradient(self, hidden: Tensor, target: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses of some targets, (n,), and where wanted what each one's loss is to its hidden state."""
        logits = self.logits(hidden)
        log_odds = logits.log_softmax(1)
        losses = -log_odds.gather(1, target[:, None])[:, 0]
        if not wanted:
            return losses, None
        grad = log_odds.exp_()
        grad[torch.arange(len(target), device=target.device), target] -= 1
        bend = 1 - (logits / self.softcap).square() if self.softcap else None
        if bend is not None:
            grad.mul_(bend)
        if self.multiply != 1.0:
            grad.mul_(self.multiply)
        return losses, grad.to(hidden.dtype) @ self.output.weight

    @torch.no_grad()
    def _check(self) -> None:
        """Compare with the model's own forward once: a family that treats its logits otherwise is found here."""
        device = self.output.weight.device
        if device.type == "meta":  # shapes only, for an estimate
            return
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
