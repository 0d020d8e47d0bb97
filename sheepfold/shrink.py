"""A student of some of a model's layers, as a folder: `sheepfold models shrink`.

    configuration ── outline cut on the meta device (all that can be refused) ──▶ weights ── cut ──▶ folder

The student begins as DistilBERT did, with layers of its teacher and what is around them (arXiv:1910.01108, section 3);
nothing is trained. It is of the class that the configuration names, in the number format of the file.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sheepfold.deltas import Reader, Weights
from sheepfold.errors import ModelError
from sheepfold.folders import fresh_folder
from sheepfold.layers import keep_layers, layer_list
from sheepfold.loading import one_line, quiet
from sheepfold.models import find_base
from sheepfold.offsite.cut import cut_in
from sheepfold.tasks.causal_lm import refuse_missing
from sheepfold.tokenizers import read_tokenizer


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What was made."""

    folder: Path
    layers: tuple[int, ...]
    """The base's blocks that were kept, numbered from 0"""
    of: int
    """The base's number of blocks"""
    before: int
    """The base's parameters"""
    after: int
    """The student's parameters"""


def shrink(
    base: str,
    folder: str | os.PathLike[str],
    layers: Sequence[int],
    *,
    name: str | None = None,
    revision: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Shrunk:
    """Write a model of these blocks of the base: safetensors, configuration, tokenizer and a README.md.

    name: the path of the list of blocks, where it cannot be found; say: takes notes, such as on tensors left out.
    Tensors of the file that the class has no place for stay in it (BERT's pooler, where the configuration names
    BertForMaskedLM). Raises ConfigError for layers that are not there, ModelError for bases that cannot be loaded or
    cut, CheckpointError for a folder that is there and not empty.
    """
    where = find_base(base)
    cls, config = _named(where, base, revision)
    with quiet(), one_line(base), torch.device("meta"):
        outline = cls(config)
    if cut_in(outline) is not None:
        raise ModelError(f"model.base {base!r}: is an emulator, whose layers its owner chose; shrink the full model")
    path, before = layer_list(outline, name), _parameters(outline)
    total = len(outline.get_submodule(path))
    keep_layers(outline, layers, path)
    made = Shrunk(Path(folder), tuple(layers), total, before, _parameters(outline))
    with fresh_folder(folder) as fresh:
        tokenizer = read_tokenizer(where, base, revision, config, needs_eos=False)
        model, unused = _weights(cls, where, base, revision)
        more = _around(where, base, revision, path, unused)
        if left := sorted(unused - more.keys()):
            say(f"{len(left)} tensors that {cls.__name__} does not have are left out, such as {left[0]}")
        keep_layers(model, layers, path)
        with quiet():
            model.save_pretrained(fresh, state_dict={**model.state_dict(), **more})
            tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(_readme(made, base, revision, cls.__name__), encoding="utf-8")
    return made


def _named(where: str, base: str, revision: str | None) -> tuple[Any, Any]:
    """Return the class that the configuration names, and the configuration."""
    import transformers

    with quiet(), one_line(base):
        config = transformers.AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model.base {base!r}: its weights are quantised; take layers of the weights as they were before"
        )
    names = config.architectures or []
    found = [getattr(transformers, name, None) for name in names]
    if len(found) != 1 or not (isinstance(found[0], type) and issubclass(found[0], transformers.PreTrainedModel)):
        raise ModelError(
            f"model.base {base!r}: architectures of its config.json is {names}; expected the name of one class of "
            "transformers, such as [BertModel]"
        )
    return found[0], config


def _weights(cls: Any, where: str, base: str, revision: str | None) -> tuple[Any, set[str]]:
    """Return the whole model in the file's number format, and the names in the file that it has no place for."""
    with quiet(), one_line(base):
        model, report = cls.from_pretrained(
            where, revision=revision, dtype="auto", trust_remote_code=False, weights_only=True, output_loading_info=True
        )
    refuse_missing(sorted(report["missing_keys"]), base)
    return model, set(report["unexpected_keys"])


def _around(where: str, base: str, revision: str | None, path: str, names: set[str]) -> Mapping[str, Tensor]:
    """Return the tensors of these names that belong to no block, as they are in the file."""
    from transformers.utils import cached_file

    block = re.compile(rf"(^|\.){re.escape(path.rpartition('.')[2])}\.\d+\.")
    around = sorted(name for name in names if not block.search(name))
    if not around:
        return {}
    with quiet(), one_line(base):
        weights = Weights.of(Path(str(cached_file(where, "config.json", revision=revision))).parent)
    read = Reader(weights)
    return {name: read[name].clone() for name in around if name in weights.files}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _readme(made: Shrunk, base: str, revision: str | None, cls: str) -> str:
    name = Path(base).expanduser().resolve().name if Path(base).expanduser().is_dir() else base
    at = f" (revision {revision})" if revision else ""
    kept = ", ".join(map(str, made.layers))
    return f"""\
# {made.folder.name}

Layers {kept} of the {made.of} of `{name}`{at}, counted from 0, with everything around them as it was: \
{made.after:,} of its {made.before:,} parameters. Nothing has been trained since. DistilBERT's student began this way, \
with every other layer of its teacher ([arXiv:1910.01108](https://arxiv.org/abs/1910.01108)).

```python
from transformers import AutoTokenizer, {cls}

model = {cls}.from_pretrained("{made.folder.name}")
tokenizer = AutoTokenizer.from_pretrained("{made.folder.name}")
```

The terms of `{name}` hold for it.
"""
