"""What a task is: how its base is loaded, how its rows become tokens and batches, and what is measured on them.

    records ── tokenize ──▶ TokenRows ── collate ──▶ Batch ── head ──▶ a loss a target, and the label given

Both engines train whatever gives a loss for each target: tokens of an answer, or the one label of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from sheepfold.config import DataSettings
    from sheepfold.data.rows import Record, TokenRows
    from sheepfold.data.tokenize import Tokenized
    from sheepfold.engines.batches import Batch, Collate
    from sheepfold.evaluation.text_metrics import Metric


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a model says of some rows."""

    logits: "Tensor"
    """(targets, labels or vocabulary), in float32 or wider"""
    target: "Tensor"
    """(targets,) int64: what was right"""
    lengths: "Tensor"
    """(rows,) int64: each row's tokens; what is behind them is padding"""
    attentions: "tuple[Tensor, ...]" = ()
    """By layer, (rows, heads, tokens, tokens) each, where they were asked for"""

    def losses(self) -> "Tensor":
        """Return the cross-entropy of each target in nats, (targets,)."""
        import torch.nn.functional as F

        return F.cross_entropy(self.logits, self.target, reduction="none")


def widened(logits: "Tensor") -> "Tensor":
    """Return logits in float32, or as they are where they are wider."""
    import torch

    return logits if logits.dtype == torch.float64 else logits.float()


class Head(Protocol):
    """The last step of a base that carries many adapters: from a batch to what is measured (cohort engine)."""

    def of(self, batch: "Batch") -> "Tensor":
        """Return the cross-entropy of each target in nats, (targets,)."""

    def judged(self, batch: "Batch") -> "tuple[Tensor, Tensor | None]":
        """Return the same losses and, where targets are labels, the label given for each, (targets,) int64."""


class Task(Protocol):
    """What clients learn to do with a row."""

    @property
    def name(self) -> str:
        """What the experiment file calls it."""

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads its bases."""

    @property
    def peft_type(self) -> str:
        """PEFT's task_type."""

    @property
    def pipeline(self) -> str:
        """What the model hub calls the task (pipeline_tag)."""

    @property
    def needs_eos(self) -> bool:
        """Whether its tokenizer must know how a text ends."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the head's outputs; none where targets are tokens."""

    @property
    def measures(self) -> tuple[str, ...]:
        """What every evaluation measures beside the loss; higher is better."""

    def check_config(self, config: Any, base: str) -> None:
        """Raise ModelError unless this configuration is of a base that the task can use."""

    def loading(self, config: Any, base: str) -> dict[str, Any]:
        """Return what its bases are loaded with, beside dtype and the like; may write labels into the configuration."""

    def complete(self, model: Any, report: Any, base: str) -> None:
        """See to the tensors that the weights lacked (transformers' loading report), or raise ModelError."""

    def tokenize(
        self, records: "Sequence[Record]", tokenizer: Any, data: "DataSettings", cache: Path | None
    ) -> "Tokenized":
        """Return the tokens of all records."""

    def head(self, model: Any) -> Head:
        """Return the head of a base that is ready to carry adapters."""

    def whole(self, model: Any) -> dict[str, list[str]]:
        """Return the modules that are trained and sent whole, with the names of their tensors."""

    def metrics(self, names: Sequence[str]) -> "dict[str, Metric]":
        """Return those of evaluation.metrics that judge generated answers; ConfigError for ones that do not exist."""

    @property
    def collate(self) -> "Collate":
        """Return the function that makes one batch of rows."""

    def predict(
        self,
        model: Any,
        tokens: "TokenRows",
        rows: "Sequence[int] | np.ndarray",
        device: "torch.device",
        *,
        attentions: bool = False,
    ) -> Predicted:
        """Return what a plain model says of these rows; attentions need a base loaded with attention 'eager'."""
