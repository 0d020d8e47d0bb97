"""Task causal_lm: a decoder learns answers, token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sheepfold.config import DataSettings
from sheepfold.data import templates
from sheepfold.data.rows import IGNORED, Record, TokenRows
from sheepfold.data.tokenize import Tokenized, tokenize
from sheepfold.engines.batches import Collate, next_tokens
from sheepfold.engines.head import Head
from sheepfold.errors import ModelError
from sheepfold.evaluation.text_metrics import Metric, resolve
from sheepfold.tasks.base import Predicted, widened


@dataclass(frozen=True, slots=True)
class CausalLM:
    """Instruction and input are given, the output is learned."""

    name: str = "causal_lm"
    auto_class: str = "AutoModelForCausalLM"
    peft_type: str = "CAUSAL_LM"
    pipeline: str = "text-generation"
    needs_eos: bool = True
    labels: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()

    def check_config(self, config: Any, base: str) -> None:
        """Raise ModelError unless the configuration is a decoder-only language model's."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        heads = ("forcausallm", "lmheadmodel", "forconditionalgeneration")
        built = [a for a in config.architectures or [] if a.lower().endswith(heads)]
        encoder = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", True) is False
        if encoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (config.architectures and not built):
            kind = ", ".join(config.architectures or [config.model_type])
            raise ModelError(f"model.base {base!r}: {kind} is not a causal language model; choose one (...ForCausalLM)")

    def loading(self, config: Any, base: str) -> dict[str, Any]:
        """Return nothing: the weights' own configuration will do."""
        return {}

    def complete(self, model: Any, report: Mapping[str, Any], base: str) -> None:
        """Raise ModelError for a missing tensor: it is never a random one."""
        refuse_missing(sorted(report["missing_keys"]), base)

    def tokenize(self, records: Sequence[Record], tokenizer: Any, data: DataSettings, cache: Path | None) -> Tokenized:
        """Return prompts and answers as the settings' template has them."""
        return tokenize(
            records,
            tokenizer,
            templates.find(data, tokenizer),
            max_tokens=data.max_tokens,
            cut=data.cut,
            train_on_inputs=data.train_on_inputs,
            cache=cache,
        )

    def head(self, model: Any) -> Head:
        """Return hidden states and the logits of targets alone."""
        return Head(model)

    def whole(self, model: Any) -> dict[str, list[str]]:
        """Return nothing: the output head stays frozen."""
        return {}

    def metrics(self, names: Sequence[str]) -> dict[str, Metric]:
        """Return the metrics of generated answers."""
        return {name: resolve(name) for name in names}

    @property
    def collate(self) -> Collate:
        """Return the batches in which each hidden state predicts the next token."""
        return next_tokens

    def predict(
        self,
        model: Any,
        tokens: TokenRows,
        rows: Sequence[int] | np.ndarray,
        device: torch.device,
        *,
        attentions: bool = False,
    ) -> Predicted:
        """Return the logits of every target token of these rows, (targets, vocabulary)."""
        pairs = [tokens.row(int(n)) for n in rows]
        ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in pairs], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(
            [row_labels for _, row_labels in pairs], batch_first=True, padding_value=IGNORED
        )
        lengths = torch.tensor([len(ids) for ids, _ in pairs])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        more = {"output_attentions": True} if attentions else {}
        out = model(input_ids=ids.to(device), attention_mask=mask.to(device), **more)
        logits = out.logits[:, -ids.shape[1] :]  # soft prompts come before the row's own tokens
        keep = labels[:, 1:] != IGNORED
        chosen = logits[:, :-1][keep.to(device)]
        target = labels[:, 1:][keep].to(device)
        return Predicted(widened(chosen), target, lengths.to(device), tuple(out.attentions) if attentions else ())


def refuse_missing(missing: Sequence[str], base: str) -> None:
    """Raise ModelError where the weights lack tensors."""
    if missing:
        raise ModelError(
            f"model.base {base!r}: the weights lack {len(missing)} tensors, such as {missing[0]}; "
            "download or copy the base again"
        )


CAUSAL_LM = CausalLM()
