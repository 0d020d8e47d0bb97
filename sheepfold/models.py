"""Bases: a frozen model of a task and its tokenizer, from the hub, a folder, or the one that ships.

    settings ── find ── config ── checks ── weights (frozen, silent, on the device) + tokenizer ──▶ Base

Everything that can be wrong with a base is found here and said in one line. Code from a repository is never
run: `trust_remote_code` stays off, and `.bin` weights are unpickled with `weights_only=True`, which
transformers 5 does by default and we ask for by name.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sheepfold.config import ModelSettings
from sheepfold.devices import group
from sheepfold.errors import ConfigError, ModelError
from sheepfold.loading import first_line, one_line, quiet
from sheepfold.quantised import Quantisation, settle
from sheepfold.tasks.base import Task
from sheepfold.tasks.causal_lm import CAUSAL_LM
from sheepfold.tokenizers import read_tokenizer

BUILTIN = Path(__file__).parent / "assets" / "tiny"


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen model that every client shares, with its tokenizer."""

    model: nn.Module
    """In eval mode, no parameter requires a gradient, no dropout of its own."""
    tokenizer: Any
    """Has a pad token and, where answers must end, an EOS; pad may be EOS, since masks come from lengths, never from
    the pad id."""
    name: str
    """What the experiment file calls it."""
    fingerprint: str
    """Changes when the configuration or the weights do, not with device or dtype."""
    device: torch.device
    dtype: torch.dtype
    dropout: Mapping[str, float] = field(default_factory=dict)
    """The dropout rates of the configuration as published; the model itself runs without."""
    bits: int | None = None
    """8 or 4 where the linear layers are quantised."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the tokenizer's EOS and those of the generation config."""
        return stop_ids(self.model, self.tokenizer)


@dataclass(frozen=True, slots=True)
class Outline:
    """A base without weights: what `plan` needs."""

    model: nn.Module
    """On the meta device: shapes and names, no numbers."""
    name: str
    parameters: int
    dtype: torch.dtype
    """The dtype that the weights would have on the device asked for."""
    max_positions: int | None
    """Longest sequence that the model takes; None where positions are unlimited."""
    quantised: Quantisation | None = None
    """How its weights are quantised; `model` is as it was before."""

    @property
    def bytes(self) -> int:
        """What the weights take in memory."""
        whole = self.parameters * self.dtype.itemsize
        return whole - (self.quantised.saved_bytes(self.model, self.dtype) if self.quantised else 0)


def load_base(
    settings: ModelSettings,
    device: str = "auto",
    tokenizer: Any = None,
    bits: int | None = None,
    task: Task = CAUSAL_LM,
) -> Base:
    """Return the base that the settings name, frozen and silent, on the device; `tokenizer`: one already loaded.

    task says which class of transformers loads it, and what becomes of tensors that its weights lack. bits: 8 or 4
    quantise the linear layers (see quantised.py), 0 leaves them as they are; None: as settings.bits says.
    Raises ModelError (one line: what, where, what next) for whatever cannot be loaded whole, ConfigError for bits that
    cannot be.
    """
    where, place = find_base(settings.base), pick_device(device)
    config, dtype = _config(where, settings, task), pick_dtype(settings.dtype, place)
    tokenizer = tokenizer or _tokenizer(where, settings, config, task)
    fingerprint = _fingerprint(where, config)  # of the base as published: a task may write its labels into `config`
    more = task.loading(config, settings.base)
    how = None
    if bits or (bits is None and settings.bits):
        how = _quantisation(_bare(config, settings, task), settings, bits, task, dtype)
    more |= how.options(place, dtype) if how else {}
    model = _weights(where, settings, dtype, more, task)
    _check_vocabulary(tokenizer, model, settings.base)
    published = silence_dropout(model)
    model.requires_grad_(False).eval()
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)  # where events and kernels are that are given no device
    if how is None:
        model.to(place)
    else:
        settle(model)  # it was put there as it was read
    return Base(model, tokenizer, settings.base, fingerprint, place, dtype, published, how.bits if how else None)


def config_only(settings: ModelSettings, device: str = "auto", task: Task = CAUSAL_LM) -> Outline:
    """Return the base's shapes from its configuration alone: no weights are read or allocated.

    Raises what `load_base` raises for a configuration, and for quantising what cannot be.
    """
    config = _config(find_base(settings.base), settings, task)
    task.loading(config, settings.base)
    model = _bare(config, settings, task)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = pick_dtype(settings.dtype, pick_device(device))
    how = _quantisation(model, settings, None, task, dtype)
    positions = max_positions(config)
    return Outline(model, settings.base, parameters, dtype, positions and positions - _first_position(model), how)


def _bare(config: Any, settings: ModelSettings, task: Task) -> Any:
    """Return the model of a configuration on the meta device, without weights."""
    with quiet(), one_line(settings.base), torch.device("meta"):
        return _auto(task).from_config(copy.deepcopy(config), **_attention(settings))


def _quantisation(
    model: Any, settings: ModelSettings, bits: int | None, task: Task, dtype: torch.dtype
) -> Quantisation | None:
    """Return how a model without weights will be quantised, if it will be; bits: the command line's own."""
    asked = ("model.bits", settings.bits) if bits is None else ("--bits", bits)
    how = Quantisation.of(model, asked[1], task.whole(model), asked[0])
    if how is not None:
        how.check(model, dtype, settings.base)
    return how


def fingerprint(settings: ModelSettings, task: Task = CAUSAL_LM) -> str:
    """Return the fingerprint that `load_base` would give a base; no weights are loaded."""
    where = find_base(settings.base)
    return _fingerprint(where, _config(where, settings, task))


def load_tokenizer(settings: ModelSettings, task: Task = CAUSAL_LM) -> Any:
    """Return the base's tokenizer alone, as `load_base` would: for preparing data without a model."""
    where = find_base(settings.base)
    return _tokenizer(where, settings, _config(where, settings, task), task)


def silence_dropout(model: nn.Module) -> dict[str, float]:
    """Set every dropout of the model to zero and return the configuration's former rates by name.

    `adapter.dropout` is the only dropout of a run: draws inside the base (GPT-2 has 0.1) could not be given
    an address, so engines, batch plans and resumed runs would not agree. Modules, plain float attributes and
    configuration entries are all set, since families read their rates from any of the three (Falcon's layers
    read the configuration).
    """
    published: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in [n for n, v in vars(module).items() if "drop" in n and isinstance(v, float)]:
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        for name, rate in list(vars(config).items()) if config is not None else []:
            if "drop" in name and isinstance(rate, float) and rate:
                published.setdefault(name, rate)
                setattr(config, name, 0.0)
    return published


def stop_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end an answer, sorted: the tokenizer's EOS and the generation config's."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(told) if isinstance(told, (list, tuple)) else {told}
    return tuple(sorted(i for i in ids | {tokenizer.eos_token_id} if i is not None))


def max_positions(config: Any) -> int | None:
    """Return the longest sequence that a model of this configuration takes, in tokens; None: not limited."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


def _first_position(model: nn.Module) -> int:
    """Return the number of a row's first position: RoBERTa counts from behind its padding id."""
    found = (m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding))
    return next((m.padding_idx + 1 for m in found if m.padding_idx is not None), 0)


def pick_device(name: str) -> torch.device:
    """Return the device; auto: cuda, then mps, then cpu. Of several processes on a machine each gets a GPU of its own.

    Raises ConfigError for one that is not there.
    """
    if group.several() and name.startswith(("auto", "cuda")) and torch.cuda.is_available():
        return _own_gpu(name)
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.empty(0, device=(device := torch.device(name)))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r}: {first_line(error)}; expected auto, cpu, cuda, cuda:1 or mps") from None
    return device


def _own_gpu(name: str) -> torch.device:
    """Return the GPU with this process's number on its machine, and compute there unless told otherwise."""
    number, there = group.local_rank(), torch.cuda.device_count()
    if name not in ("auto", "cuda"):
        raise ConfigError(f"device {name!r}: {group.local_world()} processes would share it; set auto, or cpu")
    if number >= there:
        raise ConfigError(
            f"device {name!r}: this machine has {group.local_world()} processes and {there} GPUs; start as many "
            "(torchrun --nproc-per-node), or set cpu"
        )
    torch.cuda.set_device(number)  # where libraries put what they are given no device for
    return torch.device("cuda", number)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the weights' dtype; auto: float32 on a CPU, bfloat16 where the device has it, else float16."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16


def find_base(base: str) -> str:
    """Return the folder or hub id that a base's name means; raise ModelError for a folder that is not one."""
    if base.startswith("builtin:"):
        if base != "builtin:tiny":
            raise ModelError(f"model.base {base!r}: not built in; the one that ships is builtin:tiny")
        if not BUILTIN.is_dir():
            raise ModelError(f"model.base {base!r}: {BUILTIN} is missing; reinstall sheepfold")
        return str(BUILTIN)
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.base {base!r}: the folder has no config.json; expected a transformers model folder"
            )
        return str(folder)
    if folder.exists():
        raise ModelError(f"model.base {base!r}: is a file; give the folder that holds config.json and the weights")
    # A hub id is `name` or `owner/name`; anything else can only be meant as a path.
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) or base.startswith("."):
        raise ModelError(f"model.base {base!r}: no such folder; give a folder, a hub id (owner/name) or builtin:tiny")
    return base


def _tokenizer(where: str, settings: ModelSettings, config: Any, task: Task) -> Any:
    own = settings.tokenizer and os.path.expanduser(settings.tokenizer)
    revision = None if own else settings.revision
    return read_tokenizer(own or where, settings.base, revision, config, needs_eos=task.needs_eos)


def _auto(task: Task) -> Any:
    import transformers

    return getattr(transformers, task.auto_class)


def _config(where: str, settings: ModelSettings, task: Task) -> Any:
    from transformers import AutoConfig

    with quiet(), one_line(settings.base):
        config = AutoConfig.from_pretrained(where, revision=settings.revision, trust_remote_code=False)
    task.check_config(config, settings.base)
    return config


def _weights(where: str, settings: ModelSettings, dtype: torch.dtype, more: Mapping[str, Any], task: Task) -> Any:
    """Return the model with all its weights; what they lack is the task's to see to, or to refuse."""
    options = {"revision": settings.revision, "dtype": dtype, **_attention(settings), **more}
    with quiet(), one_line(settings.base), torch.random.fork_rng(devices=[]):  # a new head is drawn before we draw it
        model, report = _auto(task).from_pretrained(
            where, trust_remote_code=False, weights_only=True, output_loading_info=True, **options
        )
    task.complete(model, report, settings.base)
    return model


def _attention(settings: ModelSettings) -> dict[str, str]:
    # Without the argument transformers takes sdpa, and eager for families that refuse it (Gemma 2, Bloom).
    return {} if settings.attention == "auto" else {"attn_implementation": settings.attention}


def _check_vocabulary(tokenizer: Any, model: Any, base: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    # Gemma 3's text models list <image_soft_token>, one past the last row; text never holds it.
    text = sorted((i, t) for t, i in beyond.items() if not re.search("image|audio|video", t))
    if text:
        raise ModelError(
            f"model.base {base!r}: the tokenizer has ids up to {text[-1][0]} ({text[-1][1]!r}), the model "
            f"{rows} embedding rows; set model.tokenizer to the tokenizer that this base was trained with"
        )


def _fingerprint(where: str, config: Any) -> str:
    """Return a hash of the configuration and of what tells the weights apart.

    A hub base is told by its commit; a folder by its weight files' names, sizes and sixteen 64 KiB samples of
    each.
    """
    settings = copy.deepcopy(config).to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        settings.pop(key, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(str(getattr(config, "_commit_hash", None)).encode())
    for file in sorted(Path(where).glob("*")) if Path(where).is_dir() else []:
        if file.suffix in (".safetensors", ".bin") and file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size};".encode())
            with file.open("rb") as data:
                for sample in range(16):
                    data.seek(sample * max(size - 65_536, 0) // 15)
                    digest.update(data.read(65_536))
    return digest.hexdigest()[:32]
