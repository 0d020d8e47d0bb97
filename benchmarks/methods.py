"""Every method on Natural Instructions: 1,553 clients of one task each, the lab base, three seeds, one table.

    python benchmarks/methods.py                        every method with three seeds
    python benchmarks/methods.py --quick                one seed, fewer methods, rounds and rows
    python benchmarks/methods.py --only flexlora,fedex  these methods alone; --seeds 5: more seeds
    python benchmarks/methods.py --table                the table of what is there, nothing else
    python benchmarks/methods.py --flat                 memory and overhead over 20 rounds
    python benchmarks/methods.py --only fedit --probe train.lr=3e-3,1e-2     which value to take

A piece is one method with one seed. When it is done it adds a line to <out>/methods-pieces.jsonl, and a piece that is
there with the same settings is not run again (--again: it is), so a study that was stopped or killed goes on where it
was. A seed draws cohorts, rows and judged clients the same for every method, so methods are compared seed by seed.
Probes have a seed of their own and look at the eval rows; the table is of the test rows. Data and base are looked for
in $SHEEPFOLD_SHARED, else in ../shared beside the repository.
"""

import argparse
import contextlib
import datetime
import gc
import hashlib
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.method_list import BASE, FULL, METHODS, QUICK, QUICK_METHODS, Options, Size, settings  # noqa: E402
from benchmarks.method_table import table  # noqa: E402
from benchmarks.shared import nested, shared  # noqa: E402
from sheepfold import assembly, joining, marks  # noqa: E402
from sheepfold.adapter import Adapter  # noqa: E402
from sheepfold.assembly import Parts, assemble  # noqa: E402
from sheepfold.config import Experiment, build  # noqa: E402
from sheepfold.errors import SheepfoldError  # noqa: E402
from sheepfold.local.steps import round_lr  # noqa: E402
from sheepfold.metrics import merge  # noqa: E402
from sheepfold.rng import stream  # noqa: E402
from sheepfold.rounds import RoundReport, rounds  # noqa: E402
from sheepfold.state import ServerState  # noqa: E402

FLAT, FLAT_ROUNDS = ("fedavg", "scaffold", "flexlora"), 20
PROBE_SEED = 100


def lab() -> Options:
    """Return where data and base are; stop with one line where they are not."""
    found = {"model.base": "models/lab-llama-1m", "data.source": "data/natural_instructions_1613"}
    return {key: str(shared(place)) for key, place in found.items()}


def machine() -> str:
    """Return what this runs on."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def experiment(options: Options) -> Experiment:
    """Return the experiment of dotted keys."""
    return build(nested(options))


# One piece


def piece(name: str, seed: int, size: Size, where: Options, split: str = "test") -> dict[str, Any]:
    """Train one method with one seed, judge it on rows of this split, and return its line."""
    began = time.perf_counter()
    parts = assemble(experiment({**settings(name, seed, size), **where}))
    try:
        state, trained = parts.start(), []
        for state, report in train(parts, 0 if name == BASE else size.rounds):  # noqa: B007
            trained.append(round_facts(report))
        scores = judge(parts, state, size, split)
    finally:
        parts.engine.close()
    line = {"method": name, "seed": seed, "settings": fingerprint(name, size), "scores": scores, "rounds": trained}
    return line | {"seconds": time.perf_counter() - began, "load": os.getloadavg()[0]}


def train(parts: Parts, until: int) -> Iterator[tuple[ServerState, RoundReport]]:
    """Hand out the state and the report of every round."""
    lr = partial(round_lr, parts.experiment.train, rounds=parts.experiment.federation.rounds)
    work: dict[str, Any] = {"sampler": parts.sampler, "strategy": parts.strategy, "engine": parts.engine}
    for state, report in rounds(parts.start(), until, lr=lr, **work):
        parts.engine.store.prune(report.cohort, [state.round])
        yield state, report


def round_facts(report: RoundReport) -> dict[str, float]:
    """Return a round's bytes a client, its seconds, and the share of them outside forward, backward and step."""
    inside = sum(s for m in report.clients.values() for stage, s in m.seconds.items() if stage != "data")
    return {
        "down": report.downlink_bytes / len(report.cohort),
        "up": report.uplink_bytes / max(1, len(report.clients)),
        "absent": len(report.absences),
        "seconds": report.seconds,
        "outside": 1 - inside / report.seconds,
    }


def judged(parts: Parts, size: Size) -> dict[str, list[str]]:
    """Return the clients to judge, the same for every method; 'new' are those that the base was not trained on."""
    drawn = {client for round in range(size.rounds) for client in parts.sampler.sample(round)}
    groups: dict[str, list[str]] = {}
    for when in ("sampled", "never"):
        clients = [client for client in parts.data.clients if (client in drawn) == (when == "sampled")]
        order = stream(parts.experiment.seed, "judged", when).permutation(len(clients))
        for client in (clients[i] for i in order[: size.judged]):
            groups.setdefault(f"{when} {'new' if client[-1] in '13579' else 'known'}", []).append(client)
    return groups


def judge(parts: Parts, state: ServerState, size: Size, split: str) -> dict[str, float]:
    """Return loss (nats per target token) and ROUGE-L (mean over rows) of sampled and of never-sampled clients.

    Sampled clients are judged with their own adapter where the method gives them one, all others with the global one.
    """
    own, whole = parts.experiment.personal.wanted or parts.keeps, state.whole()
    scores: dict[str, float] = {}
    for measure, most in (("loss", None), ("rouge_l", size.answers)):
        if most == 0:  # a probe asks for the loss alone
            continue
        work: list[tuple[str, Callable[[], Adapter], np.ndarray]] = []
        for group, clients in judged(parts, size).items():
            rows = {client: parts.data.label_rows(client, split)[:most] for client in clients}
            if own and group.startswith("sampled"):
                work += [
                    (group, partial(joining.going_home, parts, state, None, client), rows[client]) for client in clients
                ]
            else:
                work.append((group, lambda: whole, np.concatenate(list(rows.values()))))
        asked = [(i, rows) for i, (_, _, rows) in enumerate(work)]
        means = marks.score(parts, [adapter for _, adapter, _ in work], asked, measure)
        for when in ("sampled", "never", "sampled new", "never new"):
            score = merge(mean for (group, _, _), mean in zip(work, means, strict=True) if group.startswith(when))
            scores |= {f"{measure} {when}": score.value} if score.count else {}
    return scores


@contextlib.contextmanager
def data_read_once() -> Iterator[None]:
    """Let all pieces share one reading of the data, which is the same for all of them."""
    read, kept = assembly.load_data, []

    def once(made: Experiment, tokenizer: Any) -> Any:
        if not kept:
            kept.append(read(made, tokenizer))
        return kept[0]

    with patch.object(assembly, "load_data", once):
        yield


# Many pieces


def fingerprint(name: str, size: Size) -> str:
    """Return a hash over all that a method's pieces depend on but their seed."""
    text = json.dumps([name == BASE, settings(name, 0, size), asdict(size)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def finished(file: Path, size: Size) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the pieces of this size that are there, of every method with its present settings."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for text in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):  # a line that a killed process left half-written
            line = json.loads(text)
            if line["method"] in METHODS and line["settings"] == fingerprint(line["method"], size):
                found.setdefault(line["method"], {})[line["seed"]] = line
    return {name: found[name] for name in METHODS if name in found}


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Add a piece's line, on disk before this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
    with file.open("a") as out:
        out.write("\n" * half + json.dumps(line) + "\n")
        out.flush()
        os.fsync(out.fileno())


def study(names: Sequence[str], seeds: int, size: Size, where: Options, file: Path, again: bool = False) -> list[str]:
    """Run the pieces that are not there, seed by seed, and return what went wrong."""
    wrong: list[str] = []
    there = {} if again else finished(file, size)
    todo = [(name, seed) for seed in range(seeds) for name in names if seed not in there.get(name, {})]
    for i, (name, seed) in enumerate(todo):
        try:
            line = piece(name, seed, size, where)
        except SheepfoldError as error:
            wrong.append(f"{name}, seed {seed}: {error}")
            print(f"{i + 1}/{len(todo)} {wrong[-1]}", flush=True)
            continue
        append(file, line)
        print(f"{i + 1}/{len(todo)} {name}, seed {seed}: {_line(line)}", flush=True)
    return wrong


def probe(names: Sequence[str], what: str, size: Size, where: Options) -> None:
    """Print the eval rows' loss of each method under each value of one option."""
    key, _, values = what.partition("=")
    for name in names:
        for value in values.split(","):
            line = piece(name, PROBE_SEED, replace(size, answers=0), {**where, key: json.loads(value)}, "eval")
            print(f"{name}, {key} {value}: {_line(line)}", flush=True)


def _line(line: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{key} {value:.4f}" for key, value in line["scores"].items() if "new" not in key)
    return f"{scores}; {line['seconds']:.0f} s"


# Memory and overhead


def flat(name: str) -> tuple[list[float], list[float]]:
    """Return, for each of 20 rounds over all clients, MiB of memory at its end and the share outside the passes."""
    parts = assemble(experiment({**settings(name, 0, replace(FULL, rounds=FLAT_ROUNDS)), **lab()}))
    memory, outside = [], []
    for _, report in train(parts, FLAT_ROUNDS):
        outside.append(round_facts(report)["outside"])
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    return memory, outside


def flat_table(names: Sequence[str]) -> str:
    """Return what 20 rounds do to memory, each method in a process of its own."""
    lines = [
        "| method | MiB after round 2 | after round 20 | growth | outside forward, backward, step: median (most) |"
    ]
    lines.append("|---|---:|---:|---:|---:|")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for name, (memory, outside) in zip(names, processes.map(flat, names), strict=True):
            share = f"{statistics.median(outside):.1%} ({max(outside):.1%})"
            growth = memory[-1] / memory[1] - 1
            lines.append(f"| {name} | {memory[1]:.0f} | {memory[-1]:.0f} | {growth:+.1%} | {share} |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Do what is asked for, print what it came to and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), help="methods, by their names in the table")
    parser.add_argument("--seeds", type=int, help="3, or 1 with --quick; at most 10")
    parser.add_argument("--quick", action="store_true", help="about ten minutes")
    parser.add_argument("--again", action="store_true", help="also run pieces that are there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--flat", action="store_true", help="measure memory and overhead instead")
    parser.add_argument("--probe", help="an option and values for it, such as train.lr=3e-3,1e-2")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    names = args.only or (FLAT if args.flat else QUICK_METHODS if args.quick else tuple(METHODS))
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    today = datetime.date.today().isoformat()
    stem = args.out / f"{today}-methods{'-quick' if args.quick else ''}{'-flat' if args.flat else ''}"
    if args.flat:
        text = f"# {FLAT_ROUNDS} rounds of {FULL.clients} of 1,553 clients, {today}\n\n{machine()}.\n\n"
        stem.with_suffix(".md").write_text(text + flat_table(names))
    elif args.probe:
        with data_read_once():
            probe(names, args.probe, size, lab())
    else:
        file, wrong = args.out / "methods-pieces.jsonl", []
        if not args.table:
            with data_read_once():
                wrong = study(names, args.seeds or (1 if args.quick else 3), size, lab(), file, args.again)
        if not (pieces := finished(file, size)):
            raise SystemExit(f"{file}: holds no piece of this size; {'; '.join(wrong) or 'run without --table'}")
        text = f"# Methods on Natural Instructions with lab-llama-1m, {today}\n\n{machine()}. {table(pieces, size)}"
        print("\n" + text)
        if not args.table:
            stem.with_suffix(".md").write_text(text)
            facts = {"machine": machine(), "size": asdict(size), "settings": {n: METHODS[n].options for n in pieces}}
            stem.with_suffix(".json").write_text(json.dumps({**facts, "pieces": pieces}, indent=1) + "\n")
        if wrong:
            raise SystemExit(f"{len(wrong)} pieces failed: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
