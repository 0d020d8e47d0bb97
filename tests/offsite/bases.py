"""Closed models of eight small layers to cut, and runs on their emulators."""

import json
from pathlib import Path
from typing import Any

import torch

from sheepfold.config import Experiment
from sheepfold.models import BUILTIN
from sheepfold.offsite.cut import Cut
from tests import small
from tests.runs import experiment

LAYERS = 8
FAMILIES = {"llama": {}, "qwen2": {}, "mistral": {}, "gpt2": {"n_positions": 64}, "opt": {}}
"""family -> what its configuration says beside tests/small.py's"""
ENDS = {"emu_l": 2, "emu_r": 6}
"""Layers 0, 1 and 6, 7 are adapter layers; a drop ratio of a half keeps 2 and 5 between them."""
DROPPED = (3, 4)
CUT = Cut("model.layers", LAYERS, (0, 1, 2, 5, 6, 7), 2, 2, ("layers",))
FULL = {"adapter": {"method": "full"}, "train.lr": 1e-3}
EVERYTHING = FULL | {"offsite.train": ["layers", "embeddings", "head", "norm"]}


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """Write a closed model in which no two tensors are alike, with the built-in tokenizer; return its folder."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(BUILTIN)
    count = {"n_layer": LAYERS} if family == "gpt2" else {"num_hidden_layers": LAYERS}
    made = small.model(dtype, family, vocab_size=len(tokenizer), **count, **FAMILIES[family])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(p + torch.randn(p.shape, generator=draw) * 0.1)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_of(base: Path, folder: Path, **over: Any) -> Experiment:
    """Return a run of two rounds on an emulator of a closed model; dotted keys in `over` replace."""
    usual: dict[str, Any] = {"model.base": str(base), "data.rows": 40, "train.batch_rows": 2, "offsite": dict(ENDS)}
    return experiment(folder, **usual | over)


def lines_of(outcome: Any) -> list[dict[str, Any]]:
    """Return a run's journal."""
    return [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]
