"""The machine that a benchmark runs on: what it is, how fast it multiplies, and what a process held of its memory."""

import datetime
import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"
WIDTHS = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""Square matrices whose products are timed for the machine's rate"""


def describe() -> str:
    """Return the machine in one line: processor, cores, memory, torch and its threads, GPU or that there is none."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = torch.get_num_threads()
    parts = [_processor(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB", f"torch {torch.__version__}"]
    return ", ".join([*parts, f"{threads} thread{'s' * (threads > 1)}", gpu])


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load() -> str:
    """Return the load average of the last minute and of the last fifteen, with what others ran."""
    one, _, fifteen = os.getloadavg()
    return f"load average {one:.1f} over a minute, {fifteen:.1f} over fifteen"


def matmul_rate(device: torch.device, dtype: torch.dtype, repeat: int = 8) -> float:
    """Return the most FLOP a second that products of square matrices of this dtype reached on the device."""
    best = 0.0
    for width in WIDTHS.get(device.type, WIDTHS["cpu"]):
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        for _ in range(repeat):
            wait(device)
            began = time.perf_counter()
            torch.mm(a, b)
            wait(device)
            best = max(best, 2 * width**3 / (time.perf_counter() - began))
    return best


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_numbers(model: nn.Module) -> int:
    """Return N: all parameters but those of embedding lookups; an output layer counts, tied to a lookup or not.

    A token's way through a frozen base and back takes 4 N FLOP: two for each number forwards, two for its gradient.
    """
    parts = (m for m in model.modules() if not isinstance(m, nn.Embedding))
    return sum(p.numel() for part in parts for p in part.parameters(recurse=False))


def today() -> str:
    """Return the date for names of results."""
    return datetime.date.today().isoformat()


def write(stem: str, text: str, facts: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write <date>-<stem>.md and .json, print the text, and return the former's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{today()}-{stem}.md"
    path.write_text(text)
    path.with_suffix(".json").write_text(json.dumps({"machine": describe(), **facts}, indent=1, default=str) + "\n")
    print("\n" + text, flush=True)
    return path


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, all columns but the first to the right."""
    lines = [head, [*["---"], *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
