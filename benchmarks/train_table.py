"""What train.py measured, as tables: one for each setting, and one over all settings."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import machine
from benchmarks.machine import table
from benchmarks.ways import STAGES
from benchmarks.worker import Worker
from benchmarks.workloads import Setting

HEAD = ["way", "useful tokens/s", "least to most", "× trainer", "× loop", "forward, backward, step", "seconds by stage",
        "peak MiB", "above the base", "of the roofline", "first pass s", "updates differ by"]  # fmt: skip
LEGEND = """Useful tokens: those of all rows, padding not counted, over the median pass's seconds. A pass begins with
assignments and ends with updates, so starting a trainer or an optimizer is in it; loading the base is not. First pass:
the one that warms up, compiling included. Stages are the journal's: data, forward, backward, step, and what is left of
a pass; the share is of the whole pass. Peak: resident memory of a way's own process on a CPU, allocated memory on a
GPU; 'above the base' is without what the process held when the base was loaded. Updates differ: the norm of the
difference from the first way's, as a share of what training changed."""


@dataclass(slots=True)
class Result:
    """What one setting came to."""

    setting: Setting
    ways: Mapping[str, Worker] = field(default_factory=dict)
    useful: int = 0
    """Tokens of a pass"""
    numbers: int = 0
    """N of the roofline: see machine.matmul_numbers"""
    difference: dict[str, float] = field(default_factory=dict)
    not_here: str = ""
    """Why nothing was measured"""

    def speeds(self, way: str) -> list[float]:
        """Return the useful tokens a second of each pass but the first; none where the way has no figures."""
        return [self.useful / lap.seconds for lap in self.ways[way].laps[1:]] if way in self.ways else []

    def speed(self, way: str) -> float | None:
        """Return the median of these."""
        return statistics.median(self.speeds(way)) if self.speeds(way) else None

    def ratio(self, way: str, to: str) -> float | None:
        """Return how many times faster a way is than another: the median over turns that both had."""
        pairs = list(zip(self.speeds(way), self.speeds(to), strict=False))
        return statistics.median(a / b for a, b in pairs) if pairs else None

    def facts(self) -> dict[str, Any]:
        """Return everything, for the JSON file."""
        ways = {}
        for way, worker in self.ways.items():
            ways[way] = {
                "tokens_per_second": self.speed(way),
                "difference": self.difference.get(way),
                "failed": worker.failed,
                "ready": worker.ready and asdict(worker.ready),
                "laps": [asdict(lap) for lap in worker.laps],
            }
        return {"setting": asdict(self.setting), "not_here": self.not_here, "useful_tokens": self.useful,
                "matmul_numbers": self.numbers, "ways": ways}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rate:
    """What this machine's matrix products reach, in the base's dtype."""

    flops: float
    what: str

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Rate | None":
        """Measure it for the results' device and dtype; None where nothing was measured."""
        ready = next((w.ready for r in results for w in r.ways.values() if w.ready), None)
        if ready is None:
            return None
        device, dtype = torch.device(ready.device), getattr(torch, ready.dtype)
        return cls(machine.matmul_rate(device, dtype), f"{ready.dtype} on {device.type}")


def page(results: Sequence[Result], repeat: int, rate: Rate | None) -> tuple[str, dict[str, Any]]:
    """Return the whole page, and its facts."""
    base = results[0].setting.base
    out = [f"# Local training of one round on {base}, {machine.today()}", ""]
    out += [f"{machine.describe()}; {machine.load()}; median of {repeat} passes, the ways in turns.", "", LEGEND, ""]
    if rate is not None:
        n = next(r.numbers for r in results if r.numbers)
        out += [f"Roofline: {rate.flops / 1e9:,.0f} GFLOP/s ({rate.what}, the best square product), 4 N FLOP a useful "
                f"token, N = {n:,}: all parameters but embedding lookups, the output layer included. That is "
                f"{rate.flops / 4 / n:,.0f} tokens/s.", ""]  # fmt: skip
    if len(results) > 1:
        out += [*overview(results), ""]
    for result in results:
        out += [f"## {result.setting.name}", "", *lines(result, rate), ""]
    rates = {} if rate is None else {"flops": rate.flops, "what": rate.what}
    return "\n".join(out), {"rate": rates, "repeat": repeat, "results": [r.facts() for r in results]}


def lines(result: Result, rate: Rate | None) -> list[str]:
    """Return a setting's table."""
    if result.not_here:
        return [f"{result.not_here}."]
    rows = [_row(result, way, rate) for way in result.ways]
    return [f"{result.useful:,} useful tokens a pass.", "", *table(HEAD, rows)]


def _row(result: Result, way: str, rate: Rate | None) -> list[str]:
    worker, speeds = result.ways[way], result.speeds(way)
    if not speeds:
        return [way, worker.failed, *[""] * (len(HEAD) - 2)]
    speed, laps = statistics.median(speeds), worker.laps[1:]
    shares = [lap.share for lap in laps if lap.share is not None]
    peak = max(lap.peak_mib for lap in worker.laps)
    assert worker.ready is not None
    return [
        way,
        f"{speed:,.0f}",
        f"{min(speeds):,.0f} to {max(speeds):,.0f}",
        _times(result.ratio(way, "trainer")),
        _times(result.ratio(way, "loop")),
        f"{statistics.median(shares):.0%}" if shares else "",
        _stages(worker) if shares else "",
        f"{peak:,.0f}",
        f"{peak - worker.ready.base_mib:,.0f}",
        "" if rate is None else f"{speed * 4 * result.numbers / rate.flops:.1%}",
        f"{worker.laps[0].seconds:.2f}",
        f"{result.difference[way]:.1e}",
    ]


def _stages(worker: Worker) -> str:
    """Return the seconds by stage of the median pass, and what is left of it."""
    lap = sorted(worker.laps[1:], key=lambda lap: lap.seconds)[(len(worker.laps) - 1) // 2]
    left = lap.seconds - sum(lap.stages.get(stage, 0.0) for stage in STAGES)
    parts = [f"{stage} {lap.stages.get(stage, 0.0):.2f}" for stage in STAGES]
    return ", ".join([*parts, f"rest {left:.2f}"])


def overview(results: Sequence[Result]) -> list[str]:
    """Return the table over all settings: ours beside the others, and the least ratio of any."""
    ways = list(dict.fromkeys(way for r in results for way in r.ways))
    head = ["setting", *(f"{way}, tokens/s" for way in ways), "cohort × trainer", "cohort × loop"]
    rows, least = [], {"trainer": [], "loop": []}  # type: tuple[list[list[str]], dict[str, list[float]]]
    for result in results:
        ratios = {other: result.ratio("cohort", other) for other in least}
        for other, ratio in ratios.items():
            least[other] += [] if ratio is None else [ratio]
        speeds = [_speed(result, way) for way in ways]
        rows.append([result.setting.name, *speeds, *(_times(r) or result.not_here for r in ratios.values())])
    ends = [f"**{min(found):.2f}**" if found else "" for found in least.values()]
    return table(head, [*rows, ["least", *[""] * len(ways), *ends]])


def _speed(result: Result, way: str) -> str:
    if result.not_here:
        return result.not_here
    speed = result.speed(way)
    worker = result.ways.get(way)
    return (worker.failed if worker else "") if speed is None else f"{speed:,.0f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
