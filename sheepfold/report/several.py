"""The page of several runs: groups over seeds, their curves, closing figures, and differences with intervals."""

from collections.abc import Sequence
from functools import partial
from html import escape

from sheepfold.display import size
from sheepfold.report import figures, html, outcome, words
from sheepfold.report.compare import (
    Figure,
    Group,
    against,
    differing,
    folders,
    loss_curve,
    metric_curve,
    option,
    said,
    teacher_curve,
)
from sheepfold.report.compare import figures as closing_figures
from sheepfold.report.facts import RunFacts
from sheepfold.report.html import paragraph, section, table
from sheepfold.report.intervals import Interval, interval
from sheepfold.report.lines import is_share, title


def content(runs: Sequence[RunFacts], groups: Sequence[Group], now: float | None = None) -> str:
    """Return the sections of several runs, the verdict first."""
    names = folders(runs)
    going = "".join(f'<p class="status">{escape(state)}</p>' for state in words.statuses(runs, names, now))
    head = (
        f'<h1 id="top">{len(runs)} runs compared</h1>{going}'
        f'<div class="verdict">{"".join(map(paragraph, verdict(runs, groups)))}</div>'
    )
    parts = [
        _curves(runs, groups),
        _closing(runs, groups),
        _settings(runs, groups),
        _faults(runs, names),
        outcome.benchmarks([(name, run.benchmarks) for name, run in zip(names, runs, strict=True)]),
        _experiments(runs, names),
    ]
    return html.framed(head, parts)


def verdict(runs: Sequence[RunFacts], groups: Sequence[Group]) -> list[str]:
    """Return what differs and what can be said of it: a difference counts where its interval leaves zero out."""
    found = closing_figures(runs)
    kinds = "experiments that differ in their options" if len(groups) > 1 else "experiment under several seeds"
    sentences = [f"{words.plural(len(runs), 'run')} of {len(groups)} {kinds}: {', '.join(map(_named, groups))}."]
    last = [f for f in found if f.better and f.name.endswith(" at the end")]
    joined = [f for f in found if f.better == 1 and ", federated," in f.name]
    main = last + [f for f in joined if f"{f.name.partition(',')[0]} at the end" not in {end.name for end in last}]
    for figure in main:
        means = {g.label: figure_mean(g, figure) for g in groups}
        ends = ", ".join(f"{label} {_said(mean, figure)}" for label, mean in means.items() if mean is not None)
        gaps = [said for g in groups[1:] if (said := _compared(groups[0], g, figure))]
        sentences.append(f"{figure.name.capitalize()}: {'; '.join([ends, *gaps])}.")
    prints = {(run.data or {}).get("fingerprint") for run in runs}
    if len(prints) > 1:
        sentences.append("Their data, partitions or tokens differ, so differences are not the methods' alone.")
    return sentences


def _named(group: Group) -> str:
    return f"{group.label} ({words.plural(len(group.runs), 'seed')})"


def figure_mean(group: Group, figure: Figure) -> Interval | None:
    """Return a group's closing figure over its seeds."""
    values = group.closing(figure.of)
    return interval(list(values.values())) if values else None


def _compared(first: Group, other: Group, figure: Figure) -> str:
    gap = against(first, other, figure)
    if gap is None:
        return ""
    if gap.reach is None:
        return f"whether {other.label} differs from {first.label} beyond chance is not known: give two seeds of each"
    if not gap.excludes_zero:
        return f"the difference between {other.label} and {first.label} is not told from chance"
    better = "better" if gap.mean * figure.better > 0 else "worse"
    return f"{other.label} is {better} than {first.label}, by {_amount(abs(gap.mean), figure)}{_reach(gap, figure)}"


def _amount(value: float, figure: Figure) -> str:
    if figure.kind == "bytes":
        text = size(abs(value))
    elif figure.kind == "seconds":
        text = f"{abs(value):.1f} s"
    else:
        text = f"{100 * abs(value):.1f} points" if figure.kind == "share" else f"{abs(value):.3f}"
    return f"−{text}" if value < 0 and any(c in "123456789" for c in text) else text


def _reach(mean: Interval, figure: Figure) -> str:
    """Return ' ± ...'; nothing where there is no interval, or all values are equal."""
    return f" ± {_amount(mean.reach, figure)}" if mean.reach else ""


def _said(mean: Interval | None, figure: Figure) -> str:
    if mean is None:
        return "–"
    value = f"{mean.mean:.1%}" if figure.kind == "share" else _amount(mean.mean, figure)
    return value + _reach(mean, figure)


def _curves(runs: Sequence[RunFacts], groups: Sequence[Group]) -> str:
    """Return held-out loss, and every further measure, of all groups over rounds; dashed, those of their teachers."""
    where = {run.where for run in runs if run.evaluated}
    on = where.pop() if len(where) == 1 else "where measured"
    elsewhere = " or ".join(sorted({run.where_taught for run in runs if any(r.teacher for r in run.rounds)} - {on}))
    unit = {run.target for run in runs}
    nats = f"held-out loss, nats per {unit.pop() if len(unit) == 1 else 'target'}"
    parts = []
    for i, measure in enumerate(["loss", *dict.fromkeys(m for run in runs for r in run.rounds for m in r.metrics)]):
        of = loss_curve if measure == "loss" else partial(metric_curve, metric=measure)
        curves = {g.label: g.curve(of) for g in groups}
        taught = {g.label: g.curve(partial(teacher_curve, metric=measure)) for g in groups}
        taught = {label: points for label, points in taught.items() if points}
        if not any(curves.values()):
            continue
        named = "held-out loss" if measure == "loss" else title(measure)
        dashed = f"; with open marks, the teacher that the server trains {elsewhere}".rstrip() if taught else ""
        says = f"{named.capitalize()} by round, {on}{dashed}{_band(groups)}."
        drawn = figures.curves(curves, nats if measure == "loss" else named, measure, taught)
        columns = curves | {f"{label}: teacher": points for label, points in taught.items()}
        data = _data(says, columns, measure)
        parts.append(html.chart("loss" if measure == "loss" else f"metric-{i - 1}", drawn, says, data))
    return section("curves", "Round by round", *(parts or [paragraph("No round was evaluated.")]))


def _band(groups: Sequence[Group]) -> str:
    if not any(len(g.runs) > 1 for g in groups):
        return ""
    return (
        "; where a method ran under several seeds, the line is their mean and the band its 95 % interval (Student's t)"
    )


def _data(says: str, curves: dict[str, dict[int, Interval]], measure: str) -> str:
    rounds = sorted(set().union(*curves.values()))
    kind = Figure(measure, "share" if is_share(measure) else "number", 0, lambda run: None)
    rows = [[str(r) if r else "start", *(_said(c.get(r), kind) for c in curves.values())] for r in rounds]
    return table(says, ["round", *curves], rows)


def _closing(runs: Sequence[RunFacts], groups: Sequence[Group]) -> str:
    """Return closing figures side by side, and the other groups' differences from the first."""
    found = closing_figures(runs)
    rows = [[f.name, *(_said(figure_mean(g, f), f) for g in groups)] for f in found]
    caption = "Closing figures; ± is a 95 % interval over seeds"
    parts = [table(caption, ["figure", *(_named(g) for g in groups)], rows)]
    first, *others = groups
    if others:
        gaps = [[f.name, *(_gap(first, other, f) for other in others)] for f in found]
        parts.append(
            table(f"Differences from {first.label}, with 95 % intervals", ["figure", *(g.label for g in others)], gaps)
        )
        parts.append(
            paragraph(
                "Same seeds on both sides: the interval is that of the differences within seeds; otherwise Welch's. "
                "With many figures, about one in twenty leaves zero out by chance. Seconds also depend on what else "
                "the machine did.",
                "note",
            )
        )
    return section("closing", "Side by side", *parts)


def _gap(first: Group, other: Group, figure: Figure) -> str:
    gap = against(first, other, figure)
    if gap is None:
        return "–"
    text = f"{'+' * (gap.mean > 0)}{_amount(gap.mean, figure)}{_reach(gap, figure)}"
    if gap.reach is None or not figure.better or not (gap.mean or gap.reach):
        return text
    return f"{text} ({'differs' if gap.excludes_zero else 'not told from chance'})"


def _settings(runs: Sequence[RunFacts], groups: Sequence[Group]) -> str:
    """Return the options in which the groups' experiment files differ."""
    keys = differing([g.runs[0] for g in groups])
    rows = [[key, *(said(option(g.runs[0], key)) for g in groups)] for key in keys]
    seeds = [["seed", *(", ".join(str(run.settings["seed"]) for run in g.runs) for g in groups)]]
    head = ["option", *(g.label for g in groups)]
    made = table("Options that differ, and the seeds", head, [*rows, *seeds], words=range(1, len(head)))
    return section("settings", "What differs in the experiment files", made)


def _faults(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    rows: list[list[html.Cell | html.Raw]] = []
    for name, run in zip(names, runs, strict=True):
        skipped = sum(n for r in run.trained for n, _ in r.skipped.values())
        dropped = sum(((run.data or {}).get("dropped") or {}).values())
        rows.append([name, words.status(run), dropped, skipped, sum(len(r.absent) for r in run.trained)])
    head = ["folder", "state", "rows left out", "steps skipped", "times absent"]
    return section("faults", "Skipped rows and steps, absences", table("By run", head, rows, words=[1]))


def _experiments(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    rows: list[list[html.Cell | html.Raw]] = []
    for name, run in zip(names, runs, strict=True):
        rows.append([name, run.name, str(run.settings["seed"]), html.Raw(outcome.code(run.hash or "–"))])
    parts = [table("Adapters' hashes", ["folder", "run", "seed", "adapter hash"], rows, words=[1, 3])]
    for i, (name, run) in enumerate(zip(names, runs, strict=True)):
        inside = html.box(f"experiment.yaml of {name}", f"<pre>{html.text(run.text)}</pre>")
        parts.append(html.details(f"experiment-file-{i}", f"{name}/experiment.yaml", inside))
    parts.append(paragraph(f"This page's versions: {outcome.page_versions()}.", "note"))
    return section("experiments", "The experiments", *parts)
