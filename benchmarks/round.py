"""What a round costs beside training, and that it does not grow with the federation: runs of 10 and of 1,600 clients.

    python benchmarks/round.py               10 and 1,600 clients, 10 of them a round, 20 rounds
    python benchmarks/round.py --quick       10 and 400 clients, 6 rounds
    python benchmarks/round.py --cohort 100  more clients a round
    python benchmarks/round.py --strategy scaffold   clients and server that remember something

Whole runs (`sheepfold.simulation.run`) on the built-in base with rows written by the benchmark, each in a process of
its own, as the command line would have them; a clock is put around the parts of a round. The journal's line says what
the round's seconds were and what of them was forward, backward and step; what is outside that line (journal, state,
pruning) is added. Memory is what the process holds at each round's end.
Writes benchmarks/results/<date>-round*.{md,json}.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import machine, synthetic  # noqa: E402
from benchmarks.ways import STAGES  # noqa: E402
from sheepfold import memory, simulation  # noqa: E402
from sheepfold import state as states  # noqa: E402
from sheepfold.config import build  # noqa: E402
from sheepfold.engines.cohort import CohortEngine  # noqa: E402
from sheepfold.journal import RunFolder  # noqa: E402
from sheepfold.local.store import ClientStore  # noqa: E402
from sheepfold.sampler import UniformSampler  # noqa: E402
from sheepfold.wire.desk import Desk  # noqa: E402

PARTS = {
    "sample": "drawing the cohort",
    "assign": "assignments",
    "local": "clients made ready: rows, what they kept",
    "admit": "updates counted in bytes and checked",
    "fold": "the fold",
    "line": "the journal's line",
    "append": "the journal, on disk",
    "save": "the state, on disk",
    "prune": "what clients kept and nobody needs",
}
"""Part of a round -> what it is"""


class Clock:
    """Seconds by part, of the round that is going on; a part inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[list[float]] = []

    def around(self, part: str, act: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with the clock around it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.of(part):
                return act(*args, **kwargs)

        return timed

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what happens inside as this part's."""
        self._inside.append([0.0])
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            inner = self._inside.pop()[0]
            self.seconds[part] += took - inner
            if self._inside:
                self._inside[-1][0] += took

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Put the clock around the parts of a round."""
    assemble = simulation.assemble
    places = [
        (UniformSampler, "sample", "sample"), (CohortEngine, "local", "local"),
        (CohortEngine, "train_pass", "training"), (Desk, "admit", "admit"), (simulation, "round_line", "line"),
        (RunFolder, "append", "append"), (states, "save", "save"), (ClientStore, "prune", "prune"),
    ]  # fmt: skip

    def assembled(*args: Any, **kwargs: Any) -> Any:
        parts = assemble(*args, **kwargs)
        made = parts.strategy
        timed = replace(made, assign=clock.around("assign", made.assign), fold=clock.around("fold", made.fold))
        return replace(parts, strategy=timed)

    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, clock.around(part, getattr(owner, name))))
        stack.enter_context(patch.object(simulation, "assemble", assembled))
        yield


def run(clients: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a federation of so many clients and return, for every round, its seconds by part and what was held."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    clock, found = Clock(), list[dict[str, Any]]()
    last = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sheepfold-bench-") as folder:
        made = experiment(Path(folder), clients, args)

        def listen(event: str, facts: Mapping[str, Any]) -> None:
            nonlocal last
            if event == "round":
                now = time.perf_counter()
                told = {"whole": now - last, "parts": clock.take(), "seconds": dict(facts["seconds"])}
                [latest] = Path(folder).glob("runs/*/state/latest.safetensors")
                told |= {"held_mib": memory.in_use(torch.device("cpu")) / 2**20, "state_bytes": latest.stat().st_size}
                found.append(told)
                last = time.perf_counter()

        with watched(clock):
            simulation.run(made, listener=listen)
    return found


def experiment(folder: Path, clients: int, args: argparse.Namespace) -> Any:
    """Return the run: the rows' own clients, a step of four rows each, nothing evaluated on the way."""
    source = synthetic.write(folder / "rows.jsonl", clients, 16)
    return build(
        {
            "name": "round", "output": str(folder / "runs"), "cache": str(folder / "cache"), "device": "cpu",
            "adapter": {"rank": args.rank},
            "data": {"source": str(source), "partition": {"by": "natural"}, "eval_share": 0.1, "max_tokens": 128},
            "train": {"steps": args.steps, "batch_rows": 4},
            "federation": {"rounds": args.rounds, "clients_per_round": args.cohort, "strategy": args.strategy},
            "evaluation": {"every": 0},
        }
    )  # fmt: skip


def apart(clients: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return `run`'s answer from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, clients, args).result()


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return medians over the rounds that only train: the start, the first and the last, which evaluates, left out."""
    rounds = found[2:-1]
    names = {part for r in rounds for part in r["parts"]} - {"training"}
    med = {p: statistics.median(r["parts"].get(p, 0.0) for r in rounds) for p in names}
    whole = statistics.median(r["whole"] for r in rounds)
    useful = [sum(r["seconds"].get(s, 0.0) for s in STAGES[1:]) for r in rounds]
    med["whole"] = whole
    med["share of the round"] = statistics.median(
        u / r["seconds"]["round"] for u, r in zip(useful, rounds, strict=True)
    )
    med["share of all"] = statistics.median(u / r["whole"] for u, r in zip(useful, rounds, strict=True))
    med["beside training"] = statistics.median(r["whole"] - r["parts"].get("training", 0.0) for r in rounds)
    med |= {"held first": found[2]["held_mib"], "held last": found[-2]["held_mib"]}
    med["state_bytes"] = found[-2]["state_bytes"]
    return med


def page(found: Mapping[int, dict[str, float]], args: argparse.Namespace) -> str:
    """Return the page."""
    head = [f"{clients:,} clients" for clients in found]
    rows = [[f"{what}, ms", *(f"{f.get(part, 0.0) * 1e3:.1f}" for f in found.values())] for part, what in PARTS.items()]
    more: dict[str, Callable[[dict[str, float]], str]] = {
        "**all beside training, ms**": lambda f: f"**{f['beside training'] * 1e3:.1f}**",
        "a whole round, its state saved, ms": lambda f: f"{f['whole'] * 1e3:.1f}",
        "forward, backward and step: of the journal's round": lambda f: f"{f['share of the round']:.1%}",
        "the same, of all seconds": lambda f: f"{f['share of all']:.1%}",
        "state on disk, kB": lambda f: f"{f['state_bytes'] / 1e3:,.0f}",
        "process holds after round 2, MiB": lambda f: f"{f['held first']:.0f}",
        f"after round {args.rounds - 1}": lambda f: (
            f"{f['held last']:.0f} ({f['held last'] / f['held first'] - 1:+.1%})"
        ),
    }
    rows += [[what, *(say(f) for f in found.values())] for what, say in more.items()]
    said = (
        f"{args.cohort} clients a round, {args.strategy}, rank {args.rank}, {args.steps} steps of 4 short rows each, "
        f"builtin:tiny; medians over {args.rounds - 2} rounds. {machine.describe()}; {machine.load()}."
    )
    return (
        "\n".join([f"# A round beside training, {machine.today()}", "", said, "", *machine.table(["", *head], rows)])
        + "\n"
    )


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="10,1600", help="sizes of the federation, with commas")
    parser.add_argument("--cohort", type=int, default=10, help="clients of a round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2, help="of each client in a round")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--strategy", default="fedavg")
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0: as many as it takes by itself")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    args = parser.parse_args(words)
    if args.quick:
        args.clients, args.rounds = "10,400", 6
    return args


def main() -> None:
    """Measure, print and write down."""
    args = parsed()
    all_rounds = {int(n): apart(int(n), args) for n in args.clients.split(",")}
    found = {clients: summary(rounds) for clients, rounds in all_rounds.items()}
    marks = [
        m for m, is_ in ((args.strategy, args.strategy != "fedavg"), (f"c{args.cohort}", args.cohort != 10)) if is_
    ]
    stem = "-".join(["round", *marks, *(["quick"] if args.quick else [])])
    facts = {"arguments": json.loads(json.dumps(vars(args), default=str)), "found": found, "rounds": all_rounds}
    machine.write(stem, page(found, args), facts, args.out)


if __name__ == "__main__":
    main()
