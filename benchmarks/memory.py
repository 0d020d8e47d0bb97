"""Peak memory of whole runs, each in a process of its own: over rounds, over clients, over the cohort; and as foreseen.

    python benchmarks/memory.py                    builtin:tiny, and the lab base where it is (see shared.py)
    python benchmarks/memory.py --base FOLDER      one base of yours
    python benchmarks/memory.py --quick            builtin:tiny, cohorts of 4 and 16

The peak is the process's own (VmHWM on Linux), as the run's journal has it: libraries, base, adapters, activations and
the server's copies. `planned` is what `sheepfold plan` says without weights, `predicted` what the run itself says when
its base is loaded. Writes benchmarks/results/<date>-memory.{md,json}, with -quick or the base's name where asked.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from benchmarks.shared import nested, shared  # noqa: E402

MIB = 2**20
USUAL = {"adapter.rank": 32, "adapter.targets": "all-linear", "train.steps": 3, "train.batch_rows": 4}
HEAD = ["base", "clients", "cohort", "rounds", "peak", "in round 1", "predicted", "ratio", "planned", "ratio"]
LEGEND = (
    "MiB of resident memory, a process a row; LoRA of rank 32 on all linear layers, 3 steps of 4 rows. `peak`: of the "
    "last round; `predicted`: by the run when its base was loaded; `planned`: by `sheepfold plan`, without weights."
)


def cases(quick: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (clients, cohort, rounds): more rounds, more clients, larger cohorts."""
    yield from [(16, 4, 2), (16, 4, 12), (16, 16, 2)]
    if not quick:
        yield from [(10, 10, 2), (1600, 10, 2), (64, 64, 2)]


def experiment(base: str, clients: int, cohort: int, rounds: int) -> Any:
    """Return a run of one case; every client has four rows to train on, whatever their number."""
    from sheepfold.config import build

    folder = tempfile.mkdtemp()
    options = {
        "name": "memory", "output": folder, "cache": f"{folder}/cache", "model.base": base, "baselines": [],
        "evaluation.metrics": [], "evaluation.every": 0, "data.rows": 5 * clients, "data.eval_share": 0.2,
        "data.partition.by": "iid", "data.partition.clients": clients, "federation.rounds": rounds,
        "federation.clients_per_round": cohort,
    }  # fmt: skip
    return build(nested(options | USUAL))


def measure(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a case's run had in use, and what was foreseen; for a process of its own."""
    from sheepfold import simulation
    from sheepfold.journal import RunFolder

    outcome = simulation.run(experiment(**case))
    return {"rounds": [line["memory"] for line in RunFolder(outcome.folder).lines()]}


def foresee(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `sheepfold plan` says of a case; for a process of its own."""
    from sheepfold.forecast import forecast

    return forecast(experiment(**case)).as_dict()


def apart(what: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `measure` or `foresee` says in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--do", what, json.dumps(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(case: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one case; return its figures in bytes."""
    rounds, planned = apart("measure", case)["rounds"], apart("foresee", case)["peak_bytes"]
    first, last = rounds[1], rounds[-1]
    return {**case, "first": first["peak"], "peak": last["peak"], "predicted": last["predicted"], "planned": planned}


def cells(f: Mapping[str, Any]) -> list[str]:
    """Return a row of the table, in MiB."""
    peak, first, *foreseen = (f"{f[name] / MIB:.0f}" for name in ("peak", "first", "predicted", "planned"))
    ratios = [f"{f[name] / f['peak']:.2f}" for name in ("predicted", "planned")]
    told = [Path(f["base"]).name, f["clients"], f["cohort"], f["rounds"]]
    return [*map(str, told), peak, first, foreseen[0], ratios[0], foreseen[1], ratios[1]]


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a hub id or folder, instead of builtin:tiny and the lab base")
    parser.add_argument("--quick", action="store_true", help="builtin:tiny, cohorts of 4 and 16")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    parser.add_argument("--do", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def stem(args: argparse.Namespace) -> str:
    """Return the table's name: which bases, unless the usual ones, and whether in quick form."""
    base = [Path(args.base.replace(":", "-")).name] if args.base else []
    return "-".join(["memory", *base, *["quick"] * args.quick])


def main() -> None:
    """Measure, print and write down."""
    args = parsed()
    if args.do:
        what, case = args.do
        print(json.dumps({"measure": measure, "foresee": foresee}[what](json.loads(case))))
        return
    bases = [args.base] if args.base else ["builtin:tiny"]
    if not (args.base or args.quick):
        bases.append(str(shared("models/lab-llama-1m")))
    found = []
    for base in bases:
        for clients, cohort, rounds in cases(args.quick):
            found.append(row({"base": base, "clients": clients, "cohort": cohort, "rounds": rounds}))
            print(*cells(found[-1]), flush=True)
    lines = [f"# Peak memory of runs, {machine.today()}", "", f"{machine.describe()}; {machine.load()}.", "", LEGEND]
    text = "\n".join([*lines, "", *machine.table(HEAD, [cells(f) for f in found]), ""])
    machine.write(stem(args), text, {"rows": found}, args.out)


if __name__ == "__main__":
    main()
