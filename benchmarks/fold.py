"""Folding clients of mixed ranks, two ways, on the same factors: errors compared first, then seconds and memory.

    svd     the dense weighted sum of the products, and torch.linalg.svd of it (FlexLoRA's section 3.2): float32
    ours    sheepfold.products.ProductSum and its best_rank: factors while they are smaller, then a search; float32

Both form the sum of one weight matrix and the best pair of the largest client's rank, whose beginnings are the best
pairs of all others: for the seven projections of one layer of a Llama-like model.

    python benchmarks/fold.py few              16 clients of ranks 8, 16, 32, 64: factors smaller than the matrix
    python benchmarks/fold.py types            80 clients of FlexLoRA's four types, ranks 8 to 200: factors larger
    python benchmarks/fold.py wide             the same on a 4096-wide model; one matrix of each shape, times its count
    python benchmarks/fold.py types --flat     products without a decaying spectrum, the hard case
    python benchmarks/fold.py few --quick      one matrix of two shapes, no memory

Ratios within one run are the result; seconds depend on the machine. Writes benchmarks/results/<date>-fold-<case>-*.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import machine
from sheepfold.adapter import LoraPair
from sheepfold.products import ProductSum

Clients = Callable[[], Iterator[tuple[LoraPair, float]]]
Fold = Callable[[Iterable[tuple[LoraPair, float]], int], tuple[LoraPair, float]]


@dataclass(frozen=True, slots=True)
class Case:
    """Who is folded, and into what."""

    clients: int
    width: int
    mlp: int
    attention: tuple[int, ...]  # ranks of the clients' types, in turn
    feedforward: tuple[int, ...]


KINDS = ("wall", "cpu")
LEGEND = """Seconds: the sum + the best pair of the largest rank, in turns; 'CPU' is the ratio of processor seconds.
'Apart' and 'off': how the pairs' products differ from each other and from float64's best; 'excess': how far our
Frobenius error lies above the least possible. All three relative, the largest over all clients' ranks.
"""
HEAD = [
    "| matrix | shape | ranks | svd s | ours s | times | CPU | apart | ours off | svd off | excess |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
]
MEMORY = """
Peak resident memory above what the process had before (VmHWM; a process for each way, clients made one at a time), MiB:
"""
CASES = {
    "few": Case(16, 2048, 5632, (8, 16, 32, 64), (8, 16, 32, 64)),
    "types": Case(80, 2048, 5632, (8, 200, 30, 30), (8, 200, 200, 30)),
    "wide": Case(80, 4096, 11008, (8, 200, 30, 30), (8, 200, 200, 30)),
}


@dataclass(frozen=True, slots=True)
class Seconds:
    """What one way took: medians of the repetitions."""

    wall: float
    sum: float  # of wall, what forming the sum took
    cpu: float  # of all threads, which says more than wall where others use the machine


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured on one matrix."""

    name: str
    shape: str
    count: int  # matrices of this shape that it stands for
    total_rank: int
    svd: Seconds
    ours: Seconds
    apart: float  # the pairs' products, ours from svd's; this and the next four: relative, largest over the ranks
    ours_off: float  # from the product of the best pair in float64
    svd_off: float
    excess: float  # of our Frobenius error over the least possible
    svd_excess: float
    left_over: float  # the least possible error at the largest rank, relative to the matrix


def matrices(case: Case, one_of_each: bool) -> list[tuple[str, int, int, int]]:
    """Return (name, d_out, d_in, count) of a layer's seven projections, or of one for each shape."""
    w, m = case.width, case.mlp
    if one_of_each:
        return [("q, k, v, o", w, w, 4), ("gate, up", m, w, 2), ("down", w, m, 1)]
    return [*((n, w, w, 1) for n in "qkvo"), ("gate", m, w, 1), ("up", m, w, 1), ("down", w, m, 1)]


def clients(case: Case, d_out: int, d_in: int, seed: int, flat: bool) -> Clients:
    """Return the clients' pairs, made anew at every call: normal factors, alpha = 2 r, weights of 50 to 500 rows.

    Singular values of a client's product fall to exp(-6) over its rank, or hardly (`flat`).
    """
    types = case.attention if d_out == d_in else case.feedforward

    def make() -> Iterator[tuple[LoraPair, float]]:
        numbers = torch.Generator().manual_seed(seed)
        for k in range(case.clients):
            r = types[k % len(types)]
            strength = torch.ones(r) if flat else torch.exp(-6 * torch.arange(r) / r)
            A = torch.randn(r, d_in, generator=numbers) / d_in**0.5
            B = torch.randn(d_out, r, generator=numbers) / d_out**0.5 * strength
            yield LoraPair(A, B, 2.0), 50.0 + (k * 37) % 451

    return make


def svd(pairs: Iterable[tuple[LoraPair, float]], rank: int) -> tuple[LoraPair, float]:
    """Return the best pair by a dense SVD, and the moment at which the sum was ready."""
    total, weights = None, 0.0
    for pair, weight in pairs:
        total = torch.zeros(pair.B.shape[0], pair.A.shape[1]) if total is None else total
        total.addmm_(pair.B, pair.A, alpha=weight * pair.scale)
        weights += weight
    assert total is not None
    total /= weights
    ready = time.perf_counter()
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    return LoraPair(Vh[:rank].clone(), U[:, :rank] * S[:rank], 1.0), ready


def ours(pairs: Iterable[tuple[LoraPair, float]], rank: int) -> tuple[LoraPair, float]:
    """Return the best pair by ProductSum, and the moment at which the sum was ready."""
    total = ProductSum()
    for pair, weight in pairs:
        total.add(pair, weight)
    ready = time.perf_counter()
    return total.best_rank(rank), ready


def timed(way: Fold, pairs: list[tuple[LoraPair, float]], rank: int) -> tuple[LoraPair, Seconds]:
    """Return the pair, and what it took."""
    began, began_cpu = time.perf_counter(), time.process_time()
    pair, ready = way(pairs, rank)
    return pair, Seconds(time.perf_counter() - began, ready - began, time.process_time() - began_cpu)


def median(taken: list[Seconds]) -> Seconds:
    """Return the median of every kind."""
    kinds = zip(*(astuple(one) for one in taken), strict=True)
    return Seconds(*(statistics.median(kind) for kind in kinds))


def measure(name: str, d_out: int, d_in: int, count: int, make: Clients, repeat: int) -> Row:
    """Time both ways on one matrix, in turns, and compare what they return with each other and with float64."""
    pairs = list(make())
    ranks = sorted({pair.rank for pair, _ in pairs})
    took: dict[str, list[Seconds]] = {"svd": [], "ours": []}
    for _ in range(repeat):
        mine, seconds = timed(ours, pairs, ranks[-1])
        took["ours"].append(seconds)
        theirs, seconds = timed(svd, pairs, ranks[-1])
        took["svd"].append(seconds)
    exact = mean(pairs)
    wide = d_out < d_in
    energies, V = torch.linalg.eigh(exact @ exact.T if wide else exact.T @ exact)
    worst = torch.zeros(5, dtype=torch.float64)
    for r in ranks:
        least = energies[:-r].clamp(min=0).sum().sqrt()
        best = V[:, -r:] @ (V[:, -r:].T @ exact) if wide else (exact @ V[:, -r:]) @ V[:, -r:].T
        one, two = (p.B[:, :r].double() @ p.A[:r].double() for p in (mine, theirs))
        off = torch.stack([(one - two).norm(), (one - best).norm(), (two - best).norm()]) / best.norm()
        excess = torch.stack([(one - exact).norm(), (two - exact).norm()]) / least - 1
        worst = worst.maximum(torch.cat([off, excess]))
    total_rank, left_over = sum(pair.rank for pair, _ in pairs), float(least / exact.norm())
    apart, ours_off, svd_off, our_excess, svd_excess = worst.tolist()
    return Row(
        name, f"{d_out} x {d_in}", count, total_rank, median(took["svd"]), median(took["ours"]),
        apart, ours_off, svd_off, our_excess, svd_excess, left_over,
    )  # fmt: skip


def mean(pairs: list[tuple[LoraPair, float]]) -> Tensor:
    """Return the weighted mean of the products in float64."""
    weights = sum(weight for _, weight in pairs)
    A = torch.cat([pair.A for pair, _ in pairs]).double()
    return torch.cat([pair.B.double() * (weight / weights * pair.scale) for pair, weight in pairs], dim=1) @ A


def peak_mib() -> float:
    """Return the largest resident memory of this process so far (VmHWM)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory(case: Case, way: str, d_out: int, d_in: int, flat: bool) -> None:
    """Print how far folding raises this process's peak, clients coming one at a time; for a process of its own."""
    make, folds = clients(case, d_out, d_in, 0, flat), {"svd": svd, "ours": ours}
    rank = max(case.attention if d_out == d_in else case.feedforward)
    folds[way](list(clients(CASES["few"], 256, 256, 0, flat)()), 8)  # so that libraries are loaded
    before = peak_mib()
    folds[way](make(), rank)
    print(peak_mib() - before)


def peaks(args: argparse.Namespace, d_out: int, d_in: int) -> dict[str, float]:
    """Return the MiB that each way needs at its peak, each in a process of its own."""
    found = {}
    for way in ("svd", "ours"):
        command = [sys.executable, __file__, args.case, "--memory", way, str(d_out), str(d_in)]
        answer = subprocess.run(command + ["--flat"] * args.flat, check=True, capture_output=True, text=True)
        found[way] = float(answer.stdout)
    return found


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--flat", action="store_true", help="products without a decaying spectrum")
    parser.add_argument("--repeat", type=int, default=3, help="the median of this many")
    parser.add_argument("--quick", action="store_true", help="q and gate alone, no memory")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    parser.add_argument("--memory", nargs=3, metavar=("WAY", "D_OUT", "D_IN"), help="print one way's peak in MiB")
    args = parser.parse_args()
    case = CASES[args.case]
    if args.memory:
        way, d_out, d_in = args.memory
        memory(case, way, int(d_out), int(d_in), args.flat)
        return
    todo = matrices(case, one_of_each=args.case == "wide" or args.quick)
    todo = todo[:2] if args.quick else todo
    warm_up = list(clients(case, 512, 512, 0, args.flat)())
    ours(warm_up, 200), svd(warm_up, 200)
    rows, resident = [], {}
    for seed, (name, d_out, d_in, count) in enumerate(todo):
        row = measure(name, d_out, d_in, count, clients(case, d_out, d_in, seed, args.flat), args.repeat)
        print(f"{name}: svd {row.svd.wall:.2f} s, ours {row.ours.wall:.2f} s", flush=True)
        rows.append(row)
    for d_out, d_in in dict.fromkeys((d_out, d_in) for _, d_out, d_in, _ in todo if not args.quick):
        resident[f"{d_out} x {d_in}"] = peaks(args, d_out, d_in)
    write(args, case, rows, resident)


def write(args: argparse.Namespace, case: Case, rows: list[Row], resident: dict[str, dict[str, float]]) -> None:
    """Print the table and write it down, dated, with the machine."""
    spectrum = "flat" if args.flat else "decaying"
    lines = [f"# Folding {case.clients} clients of mixed ranks, {machine.today()}", ""]
    lines += [
        f"Width {case.width}, {spectrum} products; {machine.describe()}; {machine.load()}; float32; "
        f"median of {args.repeat}.",
        LEGEND,
        *HEAD,
    ]
    for r in rows:
        parts = [f"{took.sum:.2f} + {took.wall - took.sum:.2f}" for took in (r.svd, r.ours)]
        ratios = [f"{r.svd.wall / r.ours.wall:.1f}", f"{r.svd.cpu / r.ours.cpu:.1f}"]
        errors = [f"{error:.1e}" for error in (r.apart, r.ours_off, r.svd_off, r.excess)]
        lines.append(f"| {' | '.join([r.name, r.shape, str(r.total_rank), *parts, *ratios, *errors])} |")
    total = {w: {k: sum(r.count * getattr(getattr(r, w), k) for r in rows) for k in KINDS} for w in ("svd", "ours")}
    times = {kind: total["svd"][kind] / total["ours"][kind] for kind in KINDS}
    cells = [f"{total['svd']['wall']:.2f}", f"{total['ours']['wall']:.2f}", f"**{times['wall']:.1f}**"]
    lines.append(f"| all {sum(r.count for r in rows)} | | | {' | '.join(cells)} | {times['cpu']:.1f} | | | | |")
    if any(r.count > 1 for r in rows):
        lines += ["", "One matrix of each shape is timed; the total counts it as often as its name has matrices."]
    if resident:
        lines += [MEMORY, "| shape | svd | ours |", "|---|---:|---:|"]
        lines += [f"| {shape} | {ways['svd']:.0f} | {ways['ours']:.0f} |" for shape, ways in resident.items()]
    facts = {
        "load": os.getloadavg(),
        "arguments": vars(args),
        "case": asdict(case),
        "total_s": total,
        "times": times,
        "rows": [asdict(row) for row in rows],
        "peak_mib": resident,
    }
    machine.write(f"fold-{args.case}-{spectrum}" + "-quick" * args.quick, "\n".join(lines) + "\n", facts, args.out)


if __name__ == "__main__":
    main()
