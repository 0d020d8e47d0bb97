"""Task classification: an encoder learns the label of a sentence, or of a pair of sentences.

    [CLS] sentence [SEP]                        | label
    [CLS] sentence [SEP] second sentence [SEP]  | label      the tokenizer's own special tokens; what follows | is the
                                                            row's one target, which no model reads

`instruction` is the sentence, `input` the second one, `output` the label's name. The label's number stands behind the
tokens, so the cache, counts and batches of answers serve rows with labels as well.
"""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sheepfold.config import DataSettings, Experiment
from sheepfold.data import token_cache
from sheepfold.data.partition import natural_key
from sheepfold.data.rows import Record, TokenRows
from sheepfold.data.sources import NAMED
from sheepfold.data.tokenize import Tokenized, joined, tokenizer_digest
from sheepfold.data.turns import text_digest
from sheepfold.engines.batches import Batch, Collate, Row
from sheepfold.errors import DataError, ModelError, suggest
from sheepfold.evaluation import labels as measured
from sheepfold.evaluation.text_metrics import Metric
from sheepfold.tasks import heads
from sheepfold.tasks.base import Predicted, widened
from sheepfold.tasks.causal_lm import refuse_missing

FORMAT = 1
"""Raised whenever the same settings come to mean other tokens."""
MOST_LABELS = 256
BATCH_RECORDS = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Sentences in, one of the labels out."""

    labels: tuple[str, ...] = ()
    """In the order of the head's outputs; none as long as the data was not read"""
    measures: tuple[str, ...] = ("accuracy",)
    modules: tuple[str, ...] | None = None
    """What is trained whole; None: the head"""
    new_head: bool = False
    seed: int = 0
    """Of a new head"""
    name: str = "classification"
    auto_class: str = "AutoModelForSequenceClassification"
    peft_type: str = "SEQ_CLS"
    pipeline: str = "text-classification"
    needs_eos: bool = False

    def check_config(self, config: Any, base: str) -> None:
        """Raise ModelError unless the configuration is an encoder's that transformers can put a head on."""
        from transformers import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        maps = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
        known = all(type(config) in mapping for mapping in maps)
        if not known or getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
            kind = ", ".join(config.architectures or [config.model_type])
            raise ModelError(
                f"model.base {base!r}: {kind} is not an encoder that task classification can put a head on; choose one "
                "such as BERT, DistilBERT or RoBERTa"
            )

    def loading(self, config: Any, base: str) -> dict[str, Any]:
        """Write the labels into the configuration; raise ModelError where the base's own head has other ones."""
        if not self.labels:
            return {"config": config}
        had = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
        theirs = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
        if had and not self.new_head:
            numbered = [f"label_{number}" for number in range(len(self.labels))]
            if [t.casefold() for t in theirs] not in (numbered, [label.casefold() for label in self.labels]):
                raise ModelError(
                    f"model.base {base!r}: its head gives {_listed(theirs)}, and the data's labels are "
                    f"{_listed(self.labels)}; write them alike (data.labels), or set model.head to new"
                )
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: number for number, label in enumerate(self.labels)}
        config.num_labels = len(self.labels)
        config.problem_type = None
        return {"config": config, "ignore_mismatched_sizes": self.new_head}

    def complete(self, model: Any, report: Mapping[str, Any], base: str) -> None:
        """Draw the head's tensors that the weights lack, or all of them; raise ModelError where others are missing."""
        head = [name for names in self.whole(model).values() for name in names]
        lacking = {*report["missing_keys"], *(entry[0] for entry in report.get("mismatched_keys") or ())}
        others = sorted(lacking - set(head))
        if len(others) > 2:  # more than one layer's
            refuse_missing(others, base)
        if others:
            module = others[0].rpartition(".")[0]
            raise ModelError(
                f"model.base {base!r}: the weights lack {others[0]}, which is no part of the head; have it drawn and "
                f"trained with the head: adapter.modules_to_save [{', '.join([*self.whole(model), module])}]"
            )
        heads.draw(model, head if self.new_head else [name for name in head if name in lacking], self.seed, base)

    def tokenize(self, records: Sequence[Record], tokenizer: Any, data: DataSettings, cache: Path | None) -> Tokenized:
        """Return sentences as the tokenizer writes them, each with its label's number behind it.

        Raises DataError for conversations, for labels that `labels` does not have, and for a tokenizer that marks pairs
        in another way than 0 ... 0 1 ... 1.
        """
        given = _numbers(records, self.labels)
        texts = [[(r.instruction, r.input), (r.output, "")] for r in records]
        parts = (FORMAT, text_digest(texts), self.labels, tokenizer_digest(tokenizer), data.max_tokens, data.cut)
        fingerprint = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
        path = cache / "tokens" / f"{fingerprint}.arrow" if cache is not None else None
        if path is not None and (found := token_cache.load(path)) is not None:
            return Tokenized(found, True, fingerprint)
        encoded = [row for start in range(0, len(records), BATCH_RECORDS) for row in _encoded(
            records[start : start + BATCH_RECORDS], tokenizer, data.max_tokens, data.cut
        )]  # fmt: skip
        rows = joined(
            [
                (([*ids, label], [False] * len(ids) + [True], first), cut)
                for (ids, first, cut), label in zip(encoded, given, strict=True)
            ],
            train_on_inputs=False,
        )
        if path is None:
            return Tokenized(rows, False, fingerprint)
        token_cache.save(path, rows)
        return Tokenized(token_cache.load(path) or rows, False, fingerprint)

    def head(self, model: Any) -> "Classifier":
        """Return the model's own logits: its head's layers take each row to its own client's."""
        return Classifier(model)

    def whole(self, model: Any) -> dict[str, list[str]]:
        """Return the head, or what adapter.modules_to_save names instead."""
        return heads.head_modules(model, self.modules)

    def metrics(self, names: Sequence[str]) -> dict[str, Metric]:
        """Return nothing: labels are measured at every evaluation (see `measures`), and nothing is generated."""
        return {}

    @property
    def collate(self) -> Collate:
        """Return the collate of rows with labels."""
        return collate

    def predict(
        self,
        model: Any,
        tokens: TokenRows,
        rows: Sequence[int] | np.ndarray,
        device: torch.device,
        *,
        attentions: bool = False,
    ) -> Predicted:
        """Return the logits of every row, (rows, labels)."""
        batch = collate(tokens, [Row(int(n), 0) for n in rows]).to(device)
        assert isinstance(batch, LabelledBatch)
        more = {"output_attentions": True} if attentions else {}
        out = model(**_inputs(model, batch), **more)
        return Predicted(widened(out.logits), batch.target, batch.lengths, tuple(out.attentions) if attentions else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledBatch(Batch):
    """Rows that go through an encoder together; their labels are the targets, one a row."""

    lengths: Tensor
    """(rows,) int64: an encoder looks both ways, so it must be told where padding begins"""
    first: Tensor
    """(rows,) int64: tokens before the second sentence"""


def collate(tokens: TokenRows, rows: Sequence[Row]) -> LabelledBatch:
    """Return the rows as one right-padded batch, their labels cut off."""
    whole = [tokens.row(row.number)[0] for row in rows]
    lengths = torch.tensor([len(ids) - 1 for ids in whole])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row_ids in enumerate(whole):
        ids[i, : len(row_ids) - 1] = row_ids[:-1]
    group = torch.tensor([row.group for row in rows])
    return LabelledBatch(
        ids=ids,
        group=group,
        position=torch.arange(len(rows)),
        target=torch.stack([row_ids[-1] for row_ids in whole]),
        target_group=group,
        place=torch.tensor([row.place for row in rows]),
        useful_tokens=int(lengths.sum()),
        lengths=lengths,
        first=torch.tensor([int(tokens.prompt_tokens[row.number]) for row in rows]),
    )


class Classifier:
    """A sequence classifier with many clients' adapters and heads in it (see engines/injection.py)."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def of(self, batch: Batch) -> Tensor:
        """Return the cross-entropy of each row's label in nats, (rows,)."""
        return F.cross_entropy(_logits(self.model, batch), batch.target, reduction="none")

    def judged(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the same losses, and the likeliest label of each row, (rows,) int64."""
        logits = _logits(self.model, batch)
        return F.cross_entropy(logits, batch.target, reduction="none"), logits.argmax(1)


def _logits(model: Any, batch: Batch) -> Tensor:
    """Return (rows, labels) in float32 (float64 stays)."""
    return widened(model(**_inputs(model, batch)).logits)


def _inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Return what an encoder is called with."""
    assert isinstance(batch, LabelledBatch)
    position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    inputs = {"input_ids": batch.ids, "attention_mask": (position < batch.lengths[:, None]).long()}
    if _knows_pairs(model):
        inputs["token_type_ids"] = ((position >= batch.first[:, None]) & (position < batch.lengths[:, None])).long()
    return inputs


def _knows_pairs(model: Any) -> bool:
    """Return whether the model tells a second sentence from the first by token types."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(plain.config, "type_vocab_size", 0) < 2:
        return False
    return "token_type_ids" in inspect.signature(plain.forward).parameters


def of(experiment: Experiment, labels: tuple[str, ...] = ()) -> Classification:
    """Return an experiment's task. Raises ConfigError for measures that there are not."""
    named = NAMED.get(experiment.data.source)
    measures = dict.fromkeys(["accuracy", *(named.measures if named else ()), *experiment.evaluation.metrics])
    measured.check(list(measures))
    asked = experiment.adapter.modules_to_save
    return Classification(
        labels=labels,
        measures=tuple(measures),
        modules=None if isinstance(asked, str) else tuple(asked),
        new_head=experiment.model.head == "new",
        seed=experiment.seed,
    )


def labels_of(data: DataSettings, records: Sequence[Record]) -> tuple[str, ...]:
    """Return the labels in the order of the head's outputs: as told, as the named set numbers them, else sorted.

    Raises DataError where the records' outputs cannot be labels.
    """
    named = NAMED.get(data.source)
    if data.labels or (named and named.labels):
        return data.labels or (named.labels if named else ())
    found = sorted({record.output.strip() for record in records}, key=natural_key)
    if not 2 <= len(found) <= MOST_LABELS:
        raise DataError(
            f"data.source {data.source!r}: {len(found):,} different outputs in {len(records):,} rows, and task "
            f"classification takes 2 to {MOST_LABELS:,} as labels; set data.fields.output to the label's column"
        )
    return tuple(found)


def _numbers(records: Sequence[Record], labels: Sequence[str]) -> list[int]:
    number = {label: i for i, label in enumerate(labels)}
    for n, record in enumerate(records):
        if record.messages:
            raise DataError(f"record {n}: is a conversation, and task classification reads one sentence, or two")
        if record.output.strip() not in number:
            raise DataError(f"record {n}: the label {record.output!r:.60}; {suggest(record.output.strip(), labels)}")
    return [number[record.output.strip()] for record in records]


def _encoded(records: Sequence[Record], tokenizer: Any, max_tokens: int, cut: str) -> list[tuple[list[int], int, bool]]:
    """Return every record's (ids, tokens before its second sentence, whether it was cut)."""
    made: list[tuple[list[int], int, bool]] = [([], 0, False)] * len(records)
    for paired in (False, True):
        rows = [i for i, record in enumerate(records) if bool(record.input) == paired]
        ids, types = _written(records, rows, tokenizer, paired)
        long = [i for i, row in enumerate(ids) if len(row) > max_tokens]
        cuts = _written(records, [rows[i] for i in long], tokenizer, paired, max_tokens, cut)
        for i, *shorter in zip(long, *cuts, strict=True):
            ids[i], types[i] = shorter
        for i, row in enumerate(rows):
            made[row] = (ids[i], _first(types[i]), i in set(long))
    return made


def _written(
    records: Sequence[Record], rows: Sequence[int], tokenizer: Any, paired: bool, most: int | None = None, cut: str = ""
) -> tuple[list[list[int]], list[list[int]]]:
    """Return ids and token types of some records; at most `most` tokens, taken from the longer sentence first."""
    if not rows:
        return [], []
    if most is not None and most <= tokenizer.num_special_tokens_to_add(pair=paired):
        raise DataError(f"data.max_tokens {most}: the tokenizer's special tokens alone take as many; raise it")
    texts: list[list[str]] = [[records[i].instruction for i in rows]]
    texts += [[records[i].input for i in rows]] if paired else []
    side, tokenizer.truncation_side = tokenizer.truncation_side, cut or tokenizer.truncation_side
    try:
        out = tokenizer(
            *texts,
            truncation="longest_first" if most is not None else False,
            max_length=most,
            return_attention_mask=False,
            return_token_type_ids=True,
            verbose=False,
        )
    finally:
        tokenizer.truncation_side = side
    return list(out["input_ids"]), list(out["token_type_ids"])


def _first(types: Sequence[int]) -> int:
    """Return how many tokens stand before the second sentence: all, where the tokenizer does not tell them apart."""
    ones = sum(types)
    if list(types) != [0] * (len(types) - ones) + [1] * ones:
        raise DataError(
            "this tokenizer marks pairs in its own way (token types other than 0 ... 0 1 ... 1); use another base"
        )
    return len(types) - ones


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:6]) + (f" and {len(labels) - 6} more" if len(labels) > 6 else "")
