"""Several runs on one page: runs that differ in nothing but their seed are one group, with means and intervals."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepfold.errors import ConfigError
from sheepfold.report.facts import RunFacts
from sheepfold.report.intervals import Interval, difference, interval
from sheepfold.report.lines import is_share, title

ONE_GROUP = frozenset({"seed", "name", "output", "cache", "device", "keep_rounds"})
"""Options that may differ inside a group: they are no part of what is compared."""
SHOWN = frozenset({"output", "cache", "keep_rounds", "name", "seed"})
"""Options that the table of differences leaves out."""


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one experiment under different seeds."""

    label: str
    runs: Sequence[RunFacts]

    def curve(self, of: "Callable[[RunFacts], Mapping[int, float]]") -> dict[int, Interval]:
        """Return round -> the mean over the runs that have that round."""
        curves = [of(run) for run in self.runs]
        rounds = sorted(set().union(*curves))
        return {r: interval([c[r] for c in curves if r in c]) for r in rounds}

    def closing(self, of: "Callable[[RunFacts], float | None]") -> dict[int, float]:
        """Return a closing figure by seed, of the runs that have it."""
        found = {int(run.settings["seed"]): of(run) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that runs are compared by."""

    name: str
    kind: str
    """loss, share, bytes, seconds or number"""
    better: int
    """1: more is better, -1: less is, 0: neither"""
    of: Callable[[RunFacts], float | None]


def grouped(runs: Sequence[RunFacts]) -> list[Group]:
    """Return the groups in the order of their first runs; raises ConfigError where a run is there twice."""
    together: dict[str, list[RunFacts]] = {}
    for run in runs:
        rest = {key: value for key, value in run.settings.items() if key not in ONE_GROUP}
        together.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    for members in together.values():
        seeds = [run.settings["seed"] for run in members]
        if len(set(seeds)) < len(seeds):
            twice = next(seed for seed in seeds if seeds.count(seed) > 1)
            names = " and ".join(str(run.path) for run in members if run.settings["seed"] == twice)
            raise ConfigError(f"{names}: the same experiment with the same seed, {twice}; name one of them")
    groups = list(together.values())
    labels = _labels([members[0] for members in groups])
    return [Group(label, members) for label, members in zip(labels, groups, strict=True)]


def _labels(firsts: Sequence[RunFacts]) -> list[str]:
    """Return what tells groups apart in few words: the strategy, else the option that differs, else the run's name."""
    found = differing(firsts)
    choices = [[run.strategy for run in firsts]]
    options = [[f"{key.rpartition('.')[2]} {said(option(run, key))}" for run in firsts] for key in found[:2]]
    choices += [*options, *(_with(choices[0], told) for told in options)]
    for labels in [*choices, [run.name for run in firsts]]:
        if len(set(labels)) == len(firsts) and max(map(len, labels)) <= 40:
            return labels
    return [f"{run.name} ({i})" for i, run in enumerate(firsts, 1)]


def _with(strategies: Sequence[str], told: Sequence[str]) -> list[str]:
    """Return the strategies, with an option's value where several experiments have the same."""
    pairs = zip(strategies, told, strict=True)
    return [f"{name} with {value}" if strategies.count(name) > 1 else name for name, value in pairs]


def differing(runs: Sequence[RunFacts]) -> list[str]:
    """Return the options, dotted, in which the runs' experiment files differ."""
    flat = [_flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for options in flat for key in options)
    return [k for k in keys if k not in SHOWN and len({json.dumps(o.get(k), sort_keys=True) for o in flat}) > 1]


def option(run: RunFacts, key: str) -> Any:
    """Return the value of a dotted option; None where the run has no such option."""
    return _flat(run.settings).get(key)


def said(value: Any) -> str:
    """Return an option's value in words."""
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(values: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{at}{key}.")
        else:
            found[f"{at}{key}"] = value if value != {} else None
    return found


def folders(runs: Sequence[RunFacts]) -> list[str]:
    """Return what tells runs apart that may share a name: the ends of their folders' paths, as long as it takes."""
    parts = [run.path.resolve().parts for run in runs]
    longest = max(map(len, parts))
    choices = ([str(Path(*path[-length:])) for path in parts] for length in range(1, longest + 1))
    whole = [str(run.path) for run in runs]  # one folder named twice
    return next((names for names in choices if len(set(names)) == len(runs)), whole)


def loss_curve(run: RunFacts) -> dict[int, float]:
    """Return round -> held-out loss."""
    return {r.round: r.loss[run.key] for r in run.evaluated if run.key in r.loss}


def metric_curve(run: RunFacts, metric: str) -> dict[int, float]:
    """Return round -> a further measure."""
    return {r.round: r.metrics[metric] for r in run.rounds if metric in r.metrics}


def teacher_curve(run: RunFacts, metric: str) -> dict[int, float]:
    """Return round -> the loss ('loss') or a further measure of the server's teacher."""
    return {r.round: r.teacher[metric] for r in run.rounds if metric in r.teacher}


def figures(runs: Sequence[RunFacts]) -> list[Figure]:
    """Return the closing figures that at least one of the runs has, in the order of the page."""
    metrics = dict.fromkeys(m for run in runs if run.closing for m in run.closing.metrics)
    measured = dict.fromkeys(m for run in runs for r in run.rounds for m in r.metrics)
    taught = dict.fromkeys(m for run in runs for r in run.rounds for m in r.teacher)
    asked = [
        Figure("held-out loss at the start", "loss", 0, lambda run: _end(run, 0)),
        Figure("held-out loss at the end", "loss", -1, lambda run: _end(run, -1)),
        *(_measured(metric) for metric in measured),
        *(_taught(metric) for metric in taught),
        *(_shared(metric, who) for metric in metrics for who in ("base", "federated", "centralised")),
        *(_helped(measure) for measure in [*metrics, "loss"]),
        Figure("sent up per client and round", "bytes", -1, bytes_per_answer),
        Figure("sent up in all", "bytes", -1, lambda run: float(sum(r.uplink_bytes for r in run.trained)) or None),
        Figure("sent down in all", "bytes", -1, lambda run: float(sum(r.downlink_bytes for r in run.trained)) or None),
        Figure("seconds of training", "seconds", -1, lambda run: run.seconds("round") or None),
        Figure("seconds of these on the server", "seconds", 0, lambda run: run.seconds("server") or None),
        Figure("seconds of evaluation", "seconds", 0, lambda run: run.seconds("evaluation") or None),
    ]
    return [figure for figure in asked if any(figure.of(run) is not None for run in runs)]


def bytes_per_answer(run: RunFacts) -> float | None:
    """Return what one client sent up in one round, on average; None before the first update."""
    answers = sum(r.clients for r in run.trained)
    return sum(r.uplink_bytes for r in run.trained) / answers if answers else None


def _end(run: RunFacts, at: int) -> float | None:
    values = list(loss_curve(run).values())
    return values[at] if values else None


def _measured(metric: str) -> Figure:
    def of(run: RunFacts) -> float | None:
        return next(reversed(metric_curve(run, metric).values()), None)

    return Figure(f"{title(metric)} at the end", _kind(metric), -1 if "loss" in metric else 1, of)


def _taught(metric: str) -> Figure:
    def of(run: RunFacts) -> float | None:
        return next(reversed(teacher_curve(run, metric).values()), None)

    return Figure(f"the teacher's {title(metric)} at the end", _kind(metric), 0, of)


def _kind(metric: str) -> str:
    return "share" if is_share(metric) else "number"


def _shared(metric: str, who: str) -> Figure:
    def of(run: RunFacts) -> float | None:
        return run.closing.scores.get(metric, {}).get("shared", {}).get(who) if run.closing else None

    named = f"{title(metric)}, {who}, on everybody's rows"
    return Figure(named, _kind(metric), int(who == "federated"), of)


def _helped(measure: str) -> Figure:
    def of(run: RunFacts) -> float | None:
        better, _, compared = run.closing.helped(measure) if run.closing else (0, 0, 0)
        return better / compared if compared else None

    return Figure(f"clients better off than alone, by {title(measure)}", "share", 1, of)


def against(first: Group, other: Group, figure: Figure) -> Interval | None:
    """Return other - first in a closing figure; None where one of them does not have it."""
    ours, theirs = other.closing(figure.of), first.closing(figure.of)
    return difference(ours, theirs) if ours and theirs else None
