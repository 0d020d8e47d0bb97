"""Every adapter of a run side by side: one PEFT folder each, for servers and scripts that switch between them.

out/  federated/  best/  client-ward_7/ ...  (PEFT folders)   adapters.json  (index)   README.md  (how to load)
"""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sheepfold.adapter import Adapter, LoraPair, pad
from sheepfold.answering.source import BASE, Source
from sheepfold.export import Leaving, cards_for, export_one, take
from sheepfold.folders import fresh_folder
from sheepfold.models import config_only

INDEX = "adapters.json"
SHOWN = 8
"""Adapters that the README's command lists."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank; an adapter's own rank may be anything up to it."""


def export_adapters(source: Source, out: str | os.PathLike[str]) -> Path:
    """Write every adapter of a source as a PEFT folder of its own, with an index and a README; return the folder."""
    model = config_only(source.model, "cpu", source.task).model
    names = [name for name in source.names if name != BASE]
    folders = folder_names(names)
    cards = cards_for(source, names)
    with fresh_folder(out) as fresh:
        index = []
        for name, folder in zip(names, folders, strict=True):
            leaving = take(source, name, cards[name])
            even = evened(leaving.adapter)
            export_one(replace(leaving, adapter=even), fresh / folder, model)
            index.append(_entry(leaving, even, folder))
        (fresh / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        about = {"adapters": str(len(index)), "index": INDEX}
        text = cards[source.default].text("adapters", _how(source.model.base, index), about)
        (fresh / "README.md").write_text(text, encoding="utf-8")
    return Path(out)


def _entry(leaving: Leaving, even: Adapter, folder: str) -> dict[str, Any]:
    """name: as sheepfold calls it; hash: of the adapter as the run has it, whatever `evened` did to its factors."""
    rank = max(even.ranks.values())
    return {"name": leaving.name, "path": folder, "rank": rank, "hash": leaving.adapter.hash()}


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a folder for each adapter, no two alike even to a file system that ignores case.

    Letters, digits, - and _ alone: PEFT makes module names of them, which hold no dots, and vLLM splits at =.
    """
    found: list[str] = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name.replace(":", "-", 1))[:80]
        taken, number = {other.lower() for other in found}, 2
        folder = stem
        while folder.lower() in taken:
            folder, number = f"{stem}-{number}", number + 1
        found.append(folder)
    return found


def evened(adapter: Adapter) -> Adapter:
    """Return the same update with one rank and one scale for all its modules.

    vLLM reads `r` and `lora_alpha` and no patterns by module, so mixed ones would be scaled wrongly there, in silence.
    Ranks grow by zeros, which is exact; a scale that differs goes into B, which rounds once.
    """
    if not adapter.pairs:
        return adapter
    rank = max(adapter.ranks.values())
    scale = next(pair.scale for pair in adapter.pairs.values() if pair.rank == rank)

    def even(pair: LoraPair) -> LoraPair:
        wide = pad(pair, rank) if pair.rank < rank else pair.plain()
        if wide.scale == scale:
            return wide
        return LoraPair(wide.A, (wide.B.double() * (wide.scale / scale)).to(wide.B.dtype), scale)

    return replace(adapter, pairs={path: even(pair) for path, pair in adapter.pairs.items()})


def _how(base: str, index: Sequence[dict[str, Any]]) -> str:
    """Return the README's part on loading: vLLM's command and PEFT's Python."""
    return f"{_table(index)}\n\n{_vllm(base, index)}\n\nPlain PEFT:\n\n```python\n{peft_code(base, index)}\n```"


def _table(index: Iterable[dict[str, Any]]) -> str:
    rows = [f"| `{entry['path']}` | {entry['rank']} | `{entry['hash'][:16]}` |" for entry in index]
    return "\n".join(["| folder and name | rank | hash |", "| --- | --- | --- |", *rows])


def _vllm(base: str, index: Sequence[dict[str, Any]]) -> str:
    most = max(entry["rank"] for entry in index)
    room = min((r for r in VLLM_RANKS if r >= most), default=math.inf)
    if room == math.inf:
        return f"vLLM takes ranks up to {VLLM_RANKS[-1]}; the largest here is {most}. Merge it, or use PEFT."
    builtin = '"$(python -c "from sheepfold.models import BUILTIN; print(BUILTIN)")"'
    named = builtin if base == "builtin:tiny" else shlex.quote(base)
    modules = " \\\n".join(f"  {entry['path']}=./{entry['path']}" for entry in index[:SHOWN])
    more = f" The other {len(index) - SHOWN} are named in the same way." if len(index) > SHOWN else ""
    ranks = ", ".join(map(str, VLLM_RANKS))
    return (
        f"vLLM, from this folder; its `--max-lora-rank` is one of {ranks}, and the largest rank here is {most}:\n\n"
        f"```sh\nvllm serve {named} --enable-lora --max-lora-rank {room} --lora-modules \\\n{modules}\n```\n\n"
        f"A request names the adapter as its `model`.{more}"
    )


def peft_code(base: str, index: Sequence[dict[str, Any]]) -> str:
    """Return Python that loads every adapter into one base and chooses one."""
    builtin = base == "builtin:tiny"
    first, last = index[0]["path"], index[-1]["path"]
    return "\n".join(
        [
            "import json",
            "",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            *(["", "from sheepfold.models import BUILTIN"] if builtin else []),
            "",
            f'base = AutoModelForCausalLM.from_pretrained({"BUILTIN" if builtin else repr(base)}, dtype="float32")',
            f'model = PeftModel.from_pretrained(base, "{first}", adapter_name="{first}")',
            f'for entry in json.load(open("{INDEX}"))[1:]:',
            '    model.load_adapter(entry["path"], adapter_name=entry["path"])',
            f'model.set_adapter("{last}")',
        ]
    )
