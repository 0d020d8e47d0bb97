"""What is trained: a base, clients with rows, and how; a setting has a name, and makes the same parts in any process.

Bases: builtin:tiny, `lab` (the small Llama beside the project), a folder, or a Llama shape with random weights and
random rows: nothing is downloaded, and the base is made on its device.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.shared import shared
from sheepfold.adapter import Adapter
from sheepfold.assembly import AnyEngine, Site, assemble, load_data
from sheepfold.config import Experiment, build
from sheepfold.data.rows import ClientRows, FederatedData, TokenRows
from sheepfold.messages import Assignment
from sheepfold.models import BUILTIN, Base, config_only, load_base, load_tokenizer, pick_device, pick_dtype
from sheepfold.targets import find_targets, new_adapter

SHAPES: dict[str, dict[str, int]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
"""Llama models of 135 million, 1.1 and 6.7 billion parameters"""
MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Setting:
    """What one measurement trains."""

    base: str = "builtin:tiny"
    clients: int = 16
    rows: int = 64
    batch: int = 4
    """Rows of a client's step"""
    micro: int = 2
    """Rows of a forward pass, where clients train one after the other"""
    targets: tuple[str, ...] = ("q", "k", "v", "o")
    """Adapted projections of every layer"""
    masked: bool = True
    """Whether answers alone are learned; else prompts too"""
    dtype: str = "auto"
    """The base's; auto: float32 on a CPU, bfloat16 on a GPU that has it"""
    source: str | None = None
    """Where rows come from; None: the built-in corpus, or Dolly for other bases"""
    path: str | None = None

    @property
    def name(self) -> str:
        """The setting in words, without its base."""
        cut = f"in {self.micro}s" if self.micro < self.batch else "in one go"
        learned = "answers" if self.masked else "all tokens"
        clients = f"{self.clients} client{'s' * (self.clients > 1)}"
        return f"{clients} of {self.rows} rows, batch {self.batch} {cut}, {'+'.join(self.targets)}, {learned}"

    @property
    def stem(self) -> str:
        """The setting as part of a file's name."""
        learned = "" if self.masked else "-all"
        base = Path(self.base.replace(":", "-")).name
        return f"{base}-{self.clients}x{self.rows}-b{self.batch}-{self.micro}-{''.join(self.targets)}{learned}"


class NotHere(Exception):
    """A setting or a way that this machine cannot measure, with the reason."""


def available(setting: Setting, *, cpu_shapes: bool = False) -> None:
    """Raise NotHere where this machine cannot measure the setting: large shapes need a GPU (cpu_shapes: not 135m)."""
    small = cpu_shapes and setting.base == "135m"
    if setting.base in SHAPES and not torch.cuda.is_available() and not small:
        raise NotHere("not measured here: no CUDA device")


def experiment(setting: Setting, folder: Path, **train: Any) -> Experiment:
    """Return one round of this setting as an experiment; train: further options of that section."""
    targets = [f"{name}_proj" for name in setting.targets]
    made = {
        "cache": str(folder / "cache"),
        "output": str(folder / "runs"),
        "model": {"base": _base_folder(setting, folder), "dtype": setting.dtype},
        "adapter": {"targets": targets},
        "data": _data(setting),
        "train": {"epochs": 1, "batch_rows": setting.batch, "micro_rows": setting.micro, "lr": 3e-4, **train},
    }
    if setting.base in SHAPES:
        made["model"]["tokenizer"] = str(BUILTIN)
    return build(made)


def _data(setting: Setting) -> dict[str, Any]:
    source, path = setting.source, setting.path
    if source is None:
        source = "corpus" if setting.base in SHAPES or setting.base.startswith("builtin:") else "dolly"
        path = str(shared("data/dolly/train.jsonl.gz")) if source == "dolly" else None
    return {
        "source": source,
        "path": path,
        "rows": setting.clients * setting.rows,
        "eval_share": 0.0,
        "max_tokens": MAX_TOKENS,
        "train_on_inputs": not setting.masked,
        "partition": {"by": "iid", "clients": setting.clients},
    }


def _base_folder(setting: Setting, folder: Path) -> str:
    if setting.base == "lab":
        return str(shared("models/lab-llama-1m"))
    if setting.base not in SHAPES:
        return setting.base
    where = folder / setting.base
    if not where.is_dir():
        from transformers import LlamaConfig

        LlamaConfig(**SHAPES[setting.base], max_position_embeddings=4096).save_pretrained(where)
    return str(where)


def random_base(setting: Setting, made: Experiment) -> Base:
    """Return a Llama of this shape with random weights, made on the experiment's device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    device = pick_device(made.device)
    dtype = pick_dtype(setting.dtype, device)
    config = LlamaConfig(**SHAPES[setting.base], max_position_embeddings=4096)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False).eval()
    return Base(model, load_tokenizer(made.model), setting.base, setting.base, device, dtype)


def random_rows(setting: Setting) -> FederatedData:
    """Return clients' rows of random tokens: lengths are log-normal, median 141, cut at 512; half of each is prompt."""
    rng = np.random.default_rng(0)
    count = setting.clients * setting.rows
    lengths = np.exp(rng.normal(4.95, 0.75, count)).clip(24, MAX_TOKENS).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    is_target = inside >= np.repeat(lengths // 2, lengths)
    ids = rng.integers(3, SHAPES[setting.base]["vocab_size"], offsets[-1]).astype(np.int32)
    prompts = (lengths // 2).astype(np.int32)
    tokens = TokenRows(ids, is_target, offsets, prompts, np.zeros(count, dtype=bool), not setting.masked)
    none = np.array([], dtype=np.int64)
    parts = np.arange(count).reshape(setting.clients, setting.rows)
    clients = {f"client-{i}": ClientRows(rows, none, none) for i, rows in enumerate(parts)}
    return FederatedData([], clients, tokens)


@dataclass(frozen=True, slots=True)
class Workload:
    """A setting, ready: everything that all ways of training have in common."""

    setting: Setting
    experiment: Experiment
    data: FederatedData
    load: Callable[[], Base]
    """Returns the base, fresh"""
    folder: Path

    @property
    def useful_tokens(self) -> int:
        """Tokens of all rows that are trained on, padding not counted."""
        return sum(int(self.data.tokens.lengths()[rows.train].sum()) for rows in self.data.clients.values())

    def outline(self) -> nn.Module:
        """Return the base without numbers."""
        return config_only(self.experiment.model, self.experiment.device).model

    def start(self) -> Adapter:
        """Return where every client starts."""
        adapter = self.experiment.adapter
        sites = find_targets(self.outline(), adapter.targets)
        return new_adapter(sites, adapter.rank, adapter.alpha, self.experiment.seed)

    def assignments(self) -> list[Assignment]:
        """Return everybody's assignment of the first round."""
        start = self.start()
        return [Assignment(client, 0, start, self.experiment.train.lr) for client in self.data.clients]

    def engine(self, **train: Any) -> tuple[AnyEngine, Base]:
        """Return an engine as a run would have it, and its base; train: options of that section to change."""
        changed = experiment(self.setting, self.folder, **train)
        base = self.load()
        site = Site(list(self.data.clients), lambda tokenizer, task: self.data, lambda *_, **__: base)
        return assemble(changed, site=site).engine, base

    def remove(self) -> None:
        """Remove its files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def workload(setting: Setting, folder: Path | None = None) -> Workload:
    """Return the setting's workload; folder: where its files go, else a temporary one that stays until the end."""
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="sheepfold-bench-"))
    made = experiment(setting, folder)
    if setting.base in SHAPES:
        return Workload(setting, made, random_rows(setting), lambda: random_base(setting, made), folder)
    data = load_data(made, load_tokenizer(made.model))
    return Workload(setting, made, data, lambda: load_base(made.model, made.device), folder)


def settings(base: str, group: str) -> list[Setting]:
    """Return the settings of a group: claim, cpu (around it, one client included), gpu, or quick."""
    claim = Setting(base)
    few = replace(claim, rows=16)
    shepherd = {"batch": 32, "micro": 8, "targets": ("q",)}
    if group == "gpu":
        clients = 8 if base == "7b" else 16
        open_ = Setting(base, clients, 64, masked=False)
        return [open_, replace(open_, clients=4 * clients), replace(open_, clients=4, **shepherd)]
    groups = {
        "claim": [claim],
        "quick": [few, replace(few, clients=1)],
        "cpu": [
            claim,
            *(replace(claim, clients=c, rows=r) for c, r in ((1, 64), (1, 16), (1, 8), (4, 16), (4, 8), (16, 8))),
            *(replace(few, clients=c, micro=4) for c in (1, 16)),
            *(replace(claim, clients=c, **shepherd) for c in (1, 4)),
            *(replace(few, clients=c, masked=False) for c in (1, 16)),
        ],
    }
    return groups[group]
