"""Local training of one round in several ways, on the same rows: results compared first, then useful tokens a second.

    python benchmarks/train.py                             builtin:tiny and its corpus, 16 clients of 64 rows
    python benchmarks/train.py --base lab                  the small Llama and Dolly of $SHEEPFOLD_SHARED or ../shared
    python benchmarks/train.py --base lab --settings cpu   the matrix around it: fewer clients, other batches, ...
    python benchmarks/train.py --base 7b --settings gpu    a Llama shape with random weights and rows: 135m, 1b or 7b
    python benchmarks/train.py --clients 1,4,16 --rows 16  one setting for each of several numbers

The ways are in ways.py (`--ways` chooses), the bases in workloads.py. Each way has a process of its own; on a CPU the
ways take turns, A B C A B C ..., so that what else the machine does hits all alike. Ratios within one run are the
result; seconds depend on the machine. What a machine cannot measure says so, and is never estimated.
Writes benchmarks/results/<date>-train-<base>-<settings>.{md,json}.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import machine, train_table  # noqa: E402
from benchmarks.train_table import Result  # noqa: E402
from benchmarks.ways import WAYS, gap  # noqa: E402
from benchmarks.worker import Worker, read  # noqa: E402
from benchmarks.workloads import NotHere, Setting, available, settings, workload  # noqa: E402

TOLERANCE = {"float32": 0.01, "float64": 1e-6, "bfloat16": 0.5, "float16": 0.5}
"""The most that two ways' updates may differ by, as a share of what training changed, for a base of this dtype"""
USUAL = ("trainer", "sft", "loop", "alone", "cohort")
ON_GPU = ("trainer", "autocast", "sft", "loop", "alone", "cohort", "compiled")


def measure(
    setting: Setting, ways: Sequence[str], repeat: int, *, threads: int = 0, turns: bool = True, small: bool = False
) -> Result:
    """Return what each way does with a setting, the results compared; small: whether a CPU may have the 135m shape.

    turns: whether the ways take turns; else one after the other, and only one of them is in memory.
    Stops the program where a way trains something else than the first.
    """
    try:
        available(setting, cpu_shapes=small)
    except NotHere as why:
        return Result(setting, not_here=str(why))
    workers = [Worker(way, setting, threads) for way in ways]
    with tempfile.TemporaryDirectory(prefix="sheepfold-bench-") as folder:
        work = workload(setting, Path(folder))
        result = Result(setting, {w.way: w for w in workers}, work.useful_tokens)
        result.numbers = machine.matmul_numbers(work.outline())
        start = work.start().tensors()
        try:
            for batch in [workers] if turns else [[w] for w in workers]:
                _race(batch, Path(folder) / "adapters", repeat)
        finally:
            for worker in workers:
                worker.end()
        _compare(result, Path(folder) / "adapters", start)
    return result


def _race(workers: Sequence[Worker], folder: Path, repeat: int) -> None:
    """Let these ways train once to warm up, their adapters saved, and then take turns."""
    for worker in workers:
        worker.begin()
        worker.train(folder / worker.way)
    for _ in range(repeat):
        for worker in workers:
            worker.train()
    for worker in workers:
        worker.end()


def _compare(result: Result, folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Write down how far each way's updates are from the first one's; stop where that is too far."""
    first = None
    for way, worker in result.ways.items():
        if not (folder / way).is_dir() or worker.ready is None:
            continue
        done = read(folder / way)
        first = first or (way, done)
        difference = result.difference[way] = gap(first[1], done, start)
        if not difference < TOLERANCE[worker.ready.dtype]:
            raise SystemExit(f"{way} trains something else: its updates differ from {first[0]}'s by {difference:.1%}")


def chosen(args: argparse.Namespace) -> list[Setting]:
    """Return the settings that the command line names."""
    if args.settings:
        return settings(args.base, args.settings)
    own = Setting(
        args.base, rows=args.rows, batch=args.batch, micro=args.micro, targets=tuple(args.targets.split(",")),
        masked=not args.all_tokens, dtype=args.dtype, source=args.source, path=args.path,
    )  # fmt: skip
    return [replace(own, clients=int(n)) for n in args.clients.split(",")]


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin:tiny", help="builtin:tiny, lab, 135m, 1b, 7b, or a folder")
    parser.add_argument(
        "--settings", choices=("claim", "quick", "cpu", "gpu"), help="a group, instead of the next seven"
    )
    parser.add_argument("--clients", default="16", help="one number, or several with commas: a setting for each")
    parser.add_argument("--rows", type=int, default=64, help="rows of each client")
    parser.add_argument("--batch", type=int, default=4, help="rows of a client's step")
    parser.add_argument("--micro", type=int, default=2, help="rows of a forward pass of one client")
    parser.add_argument("--targets", default="q,k,v,o", help="adapted projections")
    parser.add_argument("--all-tokens", action="store_true", help="prompts are learned too")
    parser.add_argument("--dtype", default="auto", help="the base's: float32, bfloat16, float16")
    parser.add_argument("--source", help="data.source of a base that is no shape; default: corpus, or Dolly")
    parser.add_argument("--path", help="data.path of that source")
    parser.add_argument(
        "--ways", help=f"of {', '.join(WAYS)}; default: {','.join(USUAL)}; with CUDA also autocast and compiled"
    )
    parser.add_argument("--repeat", type=int, default=5, help="the median of this many")
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0: as many as it takes by itself")
    parser.add_argument("--cpu-shapes", action="store_true", help="let a CPU try the 135m shape")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    return parser.parse_args(words)


def main() -> None:
    """Measure, print and write down."""
    args = parsed()
    cuda = torch.cuda.is_available()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    results = []
    wanted = args.ways.split(",") if args.ways else ON_GPU if cuda else USUAL
    if odd := set(wanted) - WAYS.keys():
        raise SystemExit(f"--ways {sorted(odd)[0]}: no such way; there are {', '.join(WAYS)}")
    for setting in chosen(args):
        print(f"{setting.base}: {setting.name}", flush=True)
        ways = [way for way in wanted if way != "alone" or setting.clients > 1]
        options = {"threads": args.threads, "turns": not cuda, "small": args.cpu_shapes}
        results.append(measure(setting, ways, args.repeat, **options))
        print("\n".join(train_table.lines(results[-1], None)), flush=True)
    rate = train_table.Rate.of(results)
    text, facts = train_table.page(results, args.repeat, rate)
    group = args.settings or results[0].setting.stem.removeprefix(Path(args.base.replace(":", "-")).name + "-")
    machine.write(f"train-{Path(args.base.replace(':', '-')).name}-{group}", text, facts, args.out)


if __name__ == "__main__":
    main()
