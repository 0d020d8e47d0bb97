"""Small encoders to classify with: two layers, random weights, rows with labels, adapters with heads."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sheepfold.adapter import Adapter
from sheepfold.config import AdapterSettings, Experiment, TrainSettings, build
from sheepfold.data.rows import TokenRows
from sheepfold.engines.cohort import CohortEngine
from sheepfold.engines.injection import CohortModel
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.models import silence_dropout
from sheepfold.state import BatchPlan
from sheepfold.targets import find_targets, new_adapter
from sheepfold.tasks.classification import Classification
from tests import runs, small

LABELS = ("bad", "good", "neither")
TASK = Classification(labels=LABELS)
WORDS = [f"w{i}" for i in range(40)]
BERT: dict[str, Any] = {
    "vocab_size": small.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
DISTILBERT: dict[str, Any] = {
    "vocab_size": small.VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", BERT),
    "distilbert": ("DistilBertForSequenceClassification", DISTILBERT),
    "roberta": ("RobertaForSequenceClassification", BERT | {"type_vocab_size": 1, "pad_token_id": 1}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", BERT | {"relative_attention": True, "pos_att_type": ["p2c"]}),
    "modernbert": ("ModernBertForSequenceClassification", BERT | {"global_attn_every_n_layers": 2}),
}
"""family -> (class, config)"""


def model(dtype: torch.dtype = torch.float64, family: str = "bert") -> Any:
    """Return a small frozen classifier with random weights, silent as `load_base` makes it."""
    import transformers

    name, config = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    made = cls(cls.config_class(**config, num_labels=len(LABELS)))
    silence_dropout(made)
    return made.to(dtype).requires_grad_(False).eval()


def tokens(rows: int = sum(small.CLIENTS.values()), seed: int = 0) -> TokenRows:
    """Return ragged rows of random tokens, every other one a pair, each with its label behind it."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 30, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    ids = rng.integers(3, small.VOCABULARY, offsets[-1]).astype(np.int32)
    is_target = np.zeros(offsets[-1], dtype=bool)
    for i, (_, end) in enumerate(itertools.pairwise(offsets)):
        ids[end - 1], is_target[end - 1] = i % len(LABELS), True
    first = np.where(np.arange(rows) % 2, lengths, lengths // 2)
    return TokenRows(ids, is_target, offsets, first.astype(np.int32), np.zeros(rows, dtype=bool))


def adapter(base: Any, rank: int, seed: int) -> Adapter:
    """Return an adapter with random factors, and a random head."""
    draw = torch.Generator().manual_seed(seed)
    made = new_adapter(find_targets(base, "auto", TASK.whole(base)), rank, 16.0, seed)
    heads = {name: base.get_parameter(name) for names in TASK.whole(base).values() for name in names}
    whole = Adapter(made.pairs, heads).to(torch.float64)
    return whole.holding(
        {n: torch.randn(t.shape, generator=draw, dtype=torch.float64) / 6 for n, t in whole.tensors().items()}
    )


def cohort_engine(base: Any, train: TrainSettings, **over: Any) -> CohortEngine:
    """Return a cohort engine over the four clients of tests/small.py."""
    names = [name for names in TASK.whole(base).values() for name in names]
    cohort = CohortModel(base, find_targets(base, "auto", TASK.whole(base)), names)
    return CohortEngine(cohort, *_engine(train, over), **_keywords(train, over))


def peft_engine(base: Any, train: TrainSettings, **over: Any) -> PeftModelEngine:
    """Return the reference engine over the same clients. The base is PEFT's afterwards."""
    sites = list(find_targets(base, "auto", TASK.whole(base)))
    return PeftModelEngine(base, sites, *_engine(train, over), **_keywords(train, over))


def _engine(train: TrainSettings, over: dict[str, Any]) -> tuple[Any, ...]:
    settings = AdapterSettings(dropout=over.get("dropout", 0.0))
    return over.get("tokens", tokens()), small.client_rows(), train, settings


def _keywords(train: TrainSettings, over: dict[str, Any]) -> dict[str, Any]:
    plan = over.get("plan", BatchPlan(4, train.micro_rows or train.batch_rows, 120))
    return {"seed": over.get("seed", 1), "plan": plan, "rule": over.get("rule"), "task": TASK}


def saved(folder: Path, family: str = "bert", head: bool = False) -> Path:
    """Write a small encoder, with or without a head, and a tokenizer of a few words; return its folder."""
    import transformers

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    words = {word: i for i, word in enumerate(vocabulary)}
    name, config = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    whole = cls(cls.config_class(**config | {"vocab_size": len(words)}, num_labels=2))
    (whole if head else whole.base_model).save_pretrained(folder)
    tokenizer = {"bert": "BertTokenizer", "distilbert": "DistilBertTokenizer"}.get(family, "BertTokenizer")
    made: Any = getattr(transformers, tokenizer)(vocab=words)
    made.save_pretrained(folder)
    (folder / "vocab.txt").unlink()
    return folder


def rows(folder: Path, count: int = 96, paired: bool = False) -> Path:
    """Write rows whose label follows from their first word; return the file."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(count):
        words = [WORDS[rng.integers(2)], *rng.choice(WORDS[8:], rng.integers(1, 8))]
        label = "good" if int(words[0][1:]) % 2 else "bad"
        second = " ".join(rng.choice(WORDS, rng.integers(1, 6)).tolist()) if paired else ""
        lines.append("\t".join([" ".join(words), second, label]))
    path = folder / "rows.tsv"
    path.write_text("sentence\tother\tlabel\n" + "\n".join(lines) + "\n")
    return path


def experiment(folder: Path, **over: Any) -> Experiment:
    """Return a run of four clients, two rounds of two steps; dotted keys in `over` replace."""
    base = folder / "base"
    if not base.is_dir():
        saved(base)
    values: dict[str, Any] = {
        "name": "small",
        "task": "classification",
        "output": str(folder / "runs"),
        "cache": str(folder / "cache"),
        "model": {"base": str(base)},
        "adapter": {"rank": 4},
        "data": {
            "source": str(rows(folder)),
            "fields": {"instruction": "sentence", "input": "other", "output": "label", "category": "label"},
            "max_tokens": 24,
            "partition": {"by": "iid", "clients": 4},
            "eval_share": 0.2,
        },
        "train": {"steps": 2, "batch_rows": 4, "lr": 3e-3},
        "federation": {"rounds": 2},
    }
    return build(runs.placed(values, over))
