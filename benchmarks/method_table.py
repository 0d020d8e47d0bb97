"""The table of benchmarks/methods.py: means over seeds, differences seed by seed, what they are worth, and costs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.method_list import BASE, METHODS, Size, in_words

Piece = Mapping[str, Any]
"""What one method came to with one seed."""
Pieces = Mapping[str, Mapping[int, Piece]]
"""Method -> seed -> piece."""

MEASURES = ("loss sampled", "loss never", "rouge_l sampled", "rouge_l never")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Seeds -> how many standard errors a 95 % interval reaches to either side: Student's t of seeds - 1 degrees."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and how far its 95 % interval reaches to either side; nan for the reach of one value."""
    n = len(values)
    return statistics.fmean(values), STUDENT[n] * statistics.stdev(values) / n**0.5 if n > 1 else math.nan


def difference(pieces: Pieces, name: str, other: str, measure: str) -> tuple[float, float]:
    """Return how far a method is from another one, with its interval, from the differences of each seed."""
    seeds = sorted(pieces[name].keys() & pieces[other].keys())
    return interval([_score(pieces, name, s, measure) - _score(pieces, other, s, measure) for s in seeds])


def table(pieces: Pieces, size: Size) -> str:
    """Return the study as markdown."""
    return "\n".join([*_conditions(pieces, size), *_scores(pieces), *_differences(pieces), *_costs(pieces)]) + "\n"


def _score(pieces: Pieces, name: str, seed: int, measure: str) -> float:
    return float(pieces[name][seed]["scores"][measure])


def _cells(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def _header(first: Sequence[str], figures: Sequence[str]) -> list[str]:
    return [_cells([*first, *figures]), "|" + "---|" * len(first) + "---:|" * len(figures)]


def _shown(mean: float, reach: float, sign: str = "") -> str:
    """Return a mean with its interval; with a sign it is a difference, in bold where larger than the noise."""
    text = f"{mean:{sign}.3f}" + (f" ± {reach:.3f}" if not math.isnan(reach) else "")
    return f"**{text}**" if sign and abs(mean) > reach else text


def _conditions(pieces: Pieces, size: Size) -> list[str]:
    loads = [piece["load"] for own in pieces.values() for piece in own.values()]
    new = [f"{name} {_mean(pieces[name], 'loss never new'):.3f}" for name in (BASE, "fedit") if name in pieces]
    text = f"""
{size.rounds} rounds of {size.clients} of 1,553 clients, {size.steps} steps of {size.batch_rows} rows each, of at most
{size.max_tokens} tokens (cut on the left). All linear layers, rank 8 and alpha 16 unless said otherwise; normal and
heavy_tail are over attention/MLP 2/2, 8/8, 8/48 and 48/48, and homo is 2/2. The learning rate is behind the optimizer.

Judged after the last round, on the test rows of at most {size.judged} sampled and {size.judged} never-sampled clients:
loss in nats per target token, and ROUGE-L of {size.answers} greedy answers a client, {size.new_tokens} tokens at most.
Sampled clients of fedsa and ditto are judged with their own adapters, everybody else with the global one, which for
fedsa is the base. Mean and 95 % interval over seeds (Student's t). A seed has its own clients, which makes the
intervals of scores wide; differences are taken seed by seed. Learning rates were probed with another seed, on the eval
rows, for fedavg, fedit, flora, flexlora, ffa_lora, rolora, fed_sb, slora, fedadam and full; the others took
those of their relatives, and nothing else was tuned. Loss of those never-sampled clients that are new to the base:
{", ".join(new)}.

Load average while it ran: {statistics.fmean(loads):.1f}. Seconds are wall-clock.
"""
    return [*text.splitlines()[1:], ""]


def _mean(own: Mapping[int, Piece], measure: str) -> float:
    return statistics.fmean(piece["scores"].get(measure, math.nan) for piece in own.values())


def _scores(pieces: Pieces) -> list[str]:
    lines = _header(["method", "settings"], ["seeds", *MEASURES])
    for name, own in pieces.items():
        cells = [_shown(*interval([_score(pieces, name, seed, measure) for seed in own])) for measure in MEASURES]
        lines.append(_cells([name, in_words(name), str(len(own)), *cells]))
    return lines


def _differences(pieces: Pieces) -> list[str]:
    """Return every method's difference to fedit and to the method beside it, and which are larger than the noise."""
    lines = ["", "Differences seed by seed; in bold where the 95 % interval leaves out 0.", ""]
    lines += _header(["method", "minus"], MEASURES)
    told: dict[str, list[str]] = {f"{m}, {which}": [] for m in MEASURES for which in ("better", "worse")}
    compared = 0
    for name in pieces:
        for other in dict.fromkeys(("fedit", METHODS[name].beside)):
            if other == name or not pieces[name].keys() & pieces.get(other, {}).keys():
                continue
            gaps = [difference(pieces, name, other, measure) for measure in MEASURES]
            lines.append(_cells([name, other, *(_shown(*gap, sign="+") for gap in gaps)]))
            compared += sum(not math.isnan(reach) for _, reach in gaps)
            for measure, (mean, reach) in zip(MEASURES, gaps, strict=True):
                if other == "fedit" and abs(mean) > reach:
                    better = (mean < 0) == measure.startswith("loss")
                    told[f"{measure}, {'better' if better else 'worse'}"].append(name)
    if not compared:
        return [*lines, "", "One seed has no interval, so none of these can be told from noise.", ""]
    lines += ["", "Larger than the noise, beside fedit (all others cannot be told from it):", ""]
    lines += [f"- {what}: {', '.join(names) or 'none'}" for what, names in told.items()]
    return [*lines, "", f"Of {compared} differences, about {compared / 20:.0f} would be bold if none were real.", ""]


def _costs(pieces: Pieces) -> list[str]:
    """Return a client's bytes in the first and last round, seconds, and their share outside the passes."""
    lines = ["Costs: kB of a client in the first and the last round; medians of rounds and of pieces.", ""]
    lines += _header(["method"], ["kB up", "kB down", "s a round", "outside forward, backward, step", "s a piece"])
    for name, own in pieces.items():
        rounds = [piece["rounds"] for piece in own.values() if piece["rounds"]]
        cells = ["", "", "", ""]
        if rounds:
            cells = [
                " → ".join(f"{statistics.fmean(each[i][way] for each in rounds) / 1000:,.0f}" for i in (0, -1))
                for way in ("up", "down")
            ]
            cells.append(f"{statistics.median(r['seconds'] for each in rounds for r in each):.2f}")
            cells.append(f"{statistics.median(r['outside'] for each in rounds for r in each):.1%}")
        lines.append(_cells([name, *cells, f"{statistics.median(piece['seconds'] for piece in own.values()):.0f}"]))
    return lines
