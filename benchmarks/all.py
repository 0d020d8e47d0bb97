"""What `make bench` runs: every benchmark that fits this machine, in its quick form, within ten minutes in all.

    python benchmarks/all.py                 everything
    python benchmarks/all.py --only data     parts by name; --minutes 5: less time

Each part is a command of its own, printed before it runs, and writes its tables into benchmarks/results/; the summary,
<date>-bench.md, says what ran, how long it took, and what this machine cannot measure. When the time is up, the part
that is running is stopped, and those that are left are named.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import machine  # noqa: E402
from benchmarks.shared import shared  # noqa: E402

LEAST_S = 10
"""Seconds with which a part is still begun"""


@dataclass(frozen=True, slots=True)
class Part:
    """One benchmark."""

    name: str
    what: str
    command: tuple[str, ...] = ()
    not_here: str = ""
    """Why this machine cannot run it"""


def parts(out: Path) -> list[Part]:
    """Return the parts, those that matter most first."""
    no_gpu = "" if torch.cuda.is_available() else "not measured here: no CUDA device"
    no_lab = ""
    try:
        shared("models/lab-llama-1m")
        shared("data/dolly/train.jsonl.gz")
    except SystemExit as why:
        no_lab = str(why)
    to = ("--out", str(out))
    quick = ("--settings", "quick", "--repeat", "3", *to)
    shape = ("--all-tokens", "--rows", "16", "--repeat", "2", *to)
    return [
        Part("train", "local training, builtin:tiny", ("train.py", *quick)),
        Part("data", "tokens, starting a round, cutting steps", ("data.py", "--quick", *to)),
        Part("round", "a round beside training", ("round.py", "--quick", *to)),
        Part("lab", "local training, the lab base on Dolly", ("train.py", "--base", "lab", *quick), no_lab),
        Part("fold", "folding mixed ranks, against a dense SVD", ("fold.py", "few", "--quick", *to)),
        Part("memory", "peak memory, and as foreseen", ("memory.py", "--quick", *to)),
        Part("135m", "local training, a shape of 135 million", ("train.py", "--base", "135m", *shape), no_gpu),
        Part("1b", "local training, a shape of 1.1 billion", ("train.py", "--base", "1b", *shape), no_gpu),
        Part("7b", "local training, a shape of 6.7 billion",
             ("train.py", "--base", "7b", "--clients", "8", *shape), no_gpu),
    ]  # fmt: skip


def run(todo: Sequence[Part], seconds: float) -> Iterator[tuple[Part, str, float]]:
    """Run the parts one after the other and yield each with how it ended and the seconds it took."""
    until = time.monotonic() + seconds
    for part in todo:
        if part.not_here:
            yield part, part.not_here, 0.0
            continue
        left = until - time.monotonic()
        if left < LEAST_S:
            yield part, "no time was left", 0.0
            continue
        print(f"\n$ python benchmarks/{' '.join(part.command)}", flush=True)
        began = time.monotonic()
        yield part, _end(part, left), time.monotonic() - began


def _end(part: Part, left: float) -> str:
    """Run a part and return how it ended: done, or why not."""
    command = [sys.executable, str(ROOT / "benchmarks" / part.command[0]), *part.command[1:]]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)  # its workers end with it
    try:
        code = process.wait(timeout=left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "stopped: the time was up"
    except BaseException:  # whoever stops this program stops that one
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return "done" if code == 0 else f"failed ({code})"


def main() -> None:
    """Run what fits and write the summary; exit with 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of parts, with commas")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    known = parts(args.out)
    names = args.only.split(",") if args.only else [part.name for part in known]
    if odd := set(names) - {part.name for part in known}:
        raise SystemExit(f"--only {sorted(odd)[0]}: no such part; there are {', '.join(part.name for part in known)}")
    began, before = time.monotonic(), machine.load()
    ended = list(run([part for part in known if part.name in names], args.minutes * 60))
    rows = [
        [part.what, f"`python benchmarks/{' '.join(c for c in part.command if c not in ('--out', str(args.out)))}`",
         how, f"{took:.0f}" if took else ""]
        for part, how, took in ended
    ]  # fmt: skip
    lines = [f"# make bench, {machine.today()}", "", f"{machine.describe()}; {before} when it began.", ""]
    lines += [*machine.table(["part", "command", "", "s"], rows), "", f"{time.monotonic() - began:.0f} s in all."]
    facts = {"parts": {part.name: {"ended": how, "seconds": took} for part, how, took in ended}}
    machine.write("bench", "\n".join(lines) + "\n", facts, args.out)
    if any(how.startswith("failed") for _, how, _ in ended):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
