"""What data costs a run: making tokens, starting it, starting a round, and cutting steps into batches.

    python benchmarks/data.py                1,600 clients of 16 rows, 20 of them a round
    python benchmarks/data.py --quick        400 clients of 8 rows, fewer repetitions
    python benchmarks/data.py --lab          the same on Dolly's rows, of 10 clients ($SHEEPFOLD_SHARED or ../shared)

Others' ways, in code of our own: `each round` reads, formats and tokenizes the rows of each sampled client anew, row by
row, as Shepherd, FlexLoRA and FlowerTune do; `scan` keeps tokens, but looks through all rows for a client's. Rows are
written by the benchmark, and clients are the rows' own (a natural partition). Seconds are medians.
Writes benchmarks/results/<date>-data.{md,json}.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread for all ways
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import machine, synthetic  # noqa: E402
from benchmarks.shared import shared  # noqa: E402
from sheepfold.assembly import Parts, assemble, load_data  # noqa: E402
from sheepfold.config import Experiment, build  # noqa: E402
from sheepfold.data.rows import FederatedData  # noqa: E402
from sheepfold.data.templates import find  # noqa: E402
from sheepfold.data.turns import record_turns  # noqa: E402
from sheepfold.engines.batches import Row, batches  # noqa: E402
from sheepfold.engines.prefetch import ahead  # noqa: E402
from sheepfold.local.steps import step_rows  # noqa: E402
from sheepfold.models import load_tokenizer  # noqa: E402


def experiment(folder: Path, source: Path, cohort: int, partition: dict[str, Any]) -> Experiment:
    """Return a run over these rows on the built-in base, its tokens cached in the folder."""
    return build(
        {
            "cache": str(folder / "cache"),
            "output": str(folder / "runs"),
            "data": {"source": str(source), "partition": partition, "eval_share": 0.0, "max_tokens": 256},
            "train": {"batch_rows": 4, "epochs": 1},
            "federation": {"clients_per_round": cohort},
        }
    )


def median(act: Callable[[], Any], repeat: int) -> float:
    """Return the median seconds of an act."""
    taken = []
    for _ in range(repeat):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def tokens_each_round(data: FederatedData, made: Experiment, tokenizer: Any, cohort: Sequence[str]) -> None:
    """Format and tokenize the sampled clients' rows, one row at a time."""
    template = find(made.data, tokenizer)
    for client in cohort:
        for number in data.clients[client].train:
            for prompt, answer in record_turns(template, [data.records[number]], int(number))[0]:
                ids = tokenizer(prompt + answer, truncation=True, max_length=made.data.max_tokens)["input_ids"]
                before = len(tokenizer(prompt)["input_ids"])  # the mask: a second time, as Shepherd does
                _ = [-100] * before + ids[before:]


def by_scan(data: FederatedData, source: Sequence[dict[str, str]], cohort: Sequence[str]) -> list[list[int]]:
    """Return the sampled clients' row numbers by looking at every row for each of them."""
    return [[n for n, row in enumerate(source) if row["client"] == client] for client in cohort]


def first_batch(parts: Parts, round: int) -> Any:
    """Return the first batch of a round: cohort, assignments, clients, their first steps' rows, padded."""
    cohort = parts.sampler.sample(round)
    state = parts.start()
    work = [parts.strategy.assign(state, client, 1e-3) for client in cohort]
    return next(iter(step_batches(parts, [parts.engine.local(a) for a in work], 0)))


def step_batches(parts: Parts, clients: Sequence[Any], step: int) -> Any:
    """Return the batches of one step of these clients, as the cohort engine cuts them."""
    engine, rows = parts.engine, []
    for k, c in enumerate(clients):
        numbers = step_rows(engine.seed, c.assignment.client, c.rows, 4, step)
        rows += [Row(int(n), k, place) for place, n in enumerate(numbers)]
    limits = {"max_rows": 4 * len(clients), "max_tokens": engine.plan.micro_tokens}
    return batches(parts.data.tokens, rows, **limits, collate=engine.task.collate)


def collated(parts: Parts, depth: int, busy: float) -> float:
    """Return the tokens a second of cutting a round's steps into batches; busy: seconds of matmul beside each.

    The matmul's own seconds, measured alone, are taken off: with batches made ahead the rest may fall to nothing.
    """
    cohort = parts.sampler.sample(0)
    state = parts.start()
    clients = [parts.engine.local(parts.strategy.assign(state, client, 1e-3)) for client in cohort]
    steps = min(c.steps for c in clients)
    a = torch.randn(256, 256)

    def work(count: int) -> None:
        for _ in range(count):
            a @ a

    one = median(lambda: work(100), 5) / 100
    count, useful, made = int(busy / one), 0, 0
    began = time.perf_counter()
    for batch in ahead((b for step in range(steps) for b in step_batches(parts, clients, step)), depth):
        work(count)
        useful, made = useful + batch.useful_tokens, made + 1
    return useful / max(1e-9, time.perf_counter() - began - made * count * one)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return all figures, in seconds."""
    if args.lab:
        source, partition, clients, cohort = shared("data/dolly/train.jsonl.gz"), {"by": "iid", "clients": 10}, 10, 10
    else:
        source = synthetic.write(folder / "rows.jsonl", args.clients, args.rows)
        partition, clients, cohort = {"by": "natural"}, args.clients, args.cohort
    made = experiment(folder, source, cohort, partition)
    tokenizer = load_tokenizer(made.model)
    found: dict[str, Any] = {"clients": clients, "cohort": cohort}
    found["tokens, first start"] = median(lambda: load_data(made, tokenizer), 1)
    found["tokens, later start"] = median(lambda: load_data(made, tokenizer), args.repeat)
    parts = assemble(made)
    data = parts.data
    found |= {"rows": len(data.records), "tokens": int(data.tokens.offsets[-1])}
    sampled = parts.sampler.sample(0)
    found["sampled rows"] = sum(len(data.clients[c].train) for c in sampled)
    found["each round"] = median(lambda: tokens_each_round(data, made, tokenizer, sampled), args.repeat)
    if not args.lab:
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        found["scan"] = median(lambda: by_scan(data, rows, sampled), args.repeat)
    found["ours"] = median(lambda: first_batch(parts, 0), 5 * args.repeat)
    found["collate"] = 1 / max(collated(parts, 0, 0.0) for _ in range(args.repeat))
    alone = [collated(parts, 0, 2e-3) for _ in range(args.repeat)]
    thread = [collated(parts, 4, 2e-3) for _ in range(args.repeat)]
    found["collate beside work"], found["collate ahead"] = (1 / statistics.median(v) for v in (alone, thread))
    parts.engine.close()
    return found


def page(found: dict[str, Any]) -> str:
    """Return the page."""
    ms = {key: f"{found[key] * 1e3:,.1f}" for key in found if isinstance(found[key], float)}
    each = found["sampled rows"]
    rows = [
        [f"all {found['rows']:,} rows tokenized at the first start of a run", ms["tokens, first start"], ""],
        ["all rows at a later start: read, parted, tokens from the cache", ms["tokens, later start"], ""],
        ["a round's first batch, ours", ms["ours"], "1.0"],
    ]
    if "scan" in found:
        rows.append(["its rows by scanning all, for each client", ms["scan"], f"{found['scan'] / found['ours']:,.0f}"])
    again = found["each round"]
    rows.append([f"its {each:,} rows tokenized again, one by one", ms["each round"], f"{again / found['ours']:,.0f}"])
    rates = [1 / found[key] for key in ("collate", "collate beside work", "collate ahead")]
    head = f"# Data: {found['clients']:,} clients, {found['cohort']} a round, {machine.today()}"
    said = (
        f"Cutting steps into batches: {rates[0]:,.0f} tokens/s with nothing beside it. Beside matrix products of 2 ms "
        f"a batch: {rates[1]:,.0f} tokens/s in line and {rates[2]:,.0f} by a thread that makes four ahead (the "
        "products' own seconds taken off)."
    )
    lines = machine.table(["", "ms", "times ours"], rows)
    return "\n".join([head, "", f"{machine.describe()}; {machine.load()}.", "", *lines, "", said]) + "\n"


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1600)
    parser.add_argument("--rows", type=int, default=16, help="of each client")
    parser.add_argument("--cohort", type=int, default=20, help="clients of a round")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--lab", action="store_true", help="Dolly's rows instead")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    args = parser.parse_args(words)
    if args.quick:
        args.clients, args.rows, args.repeat = 400, 8, 3
    return args


def main() -> None:
    """Measure, print and write down."""
    args = parsed()
    with tempfile.TemporaryDirectory(prefix="sheepfold-bench-") as folder:
        found = measure(args, Path(folder))
    machine.write("data" + "-lab" * args.lab + "-quick" * args.quick, page(found), {"seconds": found}, args.out)


if __name__ == "__main__":
    main()
