"""`export --to gguf`: base and adapter merged, as the one file that llama.cpp and what is built on it read.

--llama-cpp FOLDER (or $LLAMA_CPP)   its own converter, for every architecture that it knows
else                                 our own writer, for Llama and Mistral with byte-level BPE (gguf_writer.py)
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sheepfold import gguf_writer
from sheepfold.errors import CheckpointError, ConfigError, ModelError
from sheepfold.folders import fresh_folder

if TYPE_CHECKING:
    from sheepfold.config import ModelSettings
    from sheepfold.export import Leaving
    from sheepfold.models import Base

FILE = "model.gguf"
CONVERTER = "convert_hf_to_gguf.py"
KINDS: Mapping[torch.dtype, str] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
HOW = f"""```sh
llama-server -m {FILE}
```"""


def export_gguf(
    leaving: "Leaving",
    out: str | os.PathLike[str],
    dtype: torch.dtype,
    llama_cpp: Path | None,
    say: Callable[[str], None],
) -> None:
    """Write a new folder with model.gguf and its card; weights in `dtype`, norms in float32.

    llama_cpp: a checkout of llama.cpp, whose converter is then run with this Python. Raises ConfigError or ModelError,
    in one line, for what cannot be expressed or a converter that fails; nothing is left behind then.
    """
    if dtype not in KINDS:
        raise ConfigError("--dtype float64: a gguf holds float32, float16 or bfloat16; choose one of them")
    told = llama_cpp or (Path(os.environ["LLAMA_CPP"]) if os.environ.get("LLAMA_CPP") else None)
    with fresh_folder(out) as fresh:
        file = fresh / FILE
        script = None if told is None else _script(told)
        if script is None:
            gguf_writer.check_installed()
        base = leaving.base(say)
        if script is None:
            _own(leaving, base, file, dtype)
        else:
            _converted(leaving, base, file, dtype, script)
        writer = "sheepfold" if script is None else f"llama.cpp's {CONVERTER}"
        about = leaving.about(base) | {"weights": KINDS[dtype], "written by": writer}
        (fresh / "README.md").write_text(leaving.card.text("GGUF model", HOW, about), encoding="utf-8")


def _own(leaving: "Leaving", base: "Base", file: Path, dtype: torch.dtype) -> None:
    from sheepfold import peft_io
    from sheepfold.export import merged

    peft_io.check_fits(leaving.adapter, base.model)
    state = merged(base.model, leaving.adapter)
    gguf_writer.write(file, base.model.config, base.tokenizer, state, dtype, leaving.card.run)


def _script(llama_cpp: Path) -> Path:
    script = llama_cpp.expanduser().resolve() / CONVERTER
    if not script.is_file():
        raise ConfigError(f"--llama-cpp {llama_cpp}: no {CONVERTER} in it; name the root of a llama.cpp checkout")
    return script


def _converted(leaving: "Leaving", base: "Base", file: Path, dtype: torch.dtype, script: Path) -> None:
    """Merge into a temporary folder, and have llama.cpp's converter read that."""
    from sheepfold.export import export_merged

    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        model = Path(folder) / leaving.card.run
        export_merged(base, leaving.adapter, model, dtype, leaving.card)
        if (pieces := _sentencepiece(leaving.source.model)) is not None:
            shutil.copy(pieces, model / pieces.name)
        command = [sys.executable, str(script), str(model), "--outfile", str(file), "--outtype", KINDS[dtype]]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise ModelError(f"{leaving.source.model.base}: llama.cpp's converter failed: {_why(done.stderr)}")
    if not file.is_file():
        raise CheckpointError(f"{script}: ended well but wrote no file; is it llama.cpp's converter?")


def _sentencepiece(model: "ModelSettings") -> Path | None:
    """Return the base's tokenizer.model, where it has one: the converter reads its scores, transformers keeps none."""
    from huggingface_hub import try_to_load_from_cache

    from sheepfold.card import is_hub_id

    place, name = model.tokenizer or model.base, "tokenizer.model"
    found = try_to_load_from_cache(place, name, revision=model.revision) if is_hub_id(place) else Path(place, name)
    return Path(found) if isinstance(found, str | Path) and Path(found).is_file() else None


def _why(output: str) -> str:
    """Return the line of a converter's output that says what went wrong: the last one that is an error's."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1][:300]
