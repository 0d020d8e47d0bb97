"""Figures in words, and the verdict: what was learned, by whom, at what cost. Nothing that the run does not show."""

import time
from collections.abc import Sequence

from sheepfold.display import size
from sheepfold.joining import Closing
from sheepfold.report.compare import bytes_per_answer, metric_curve
from sheepfold.report.facts import RunFacts
from sheepfold.report.lines import is_share, title


def figure(value: float | None, measure: str = "loss") -> str:
    """Return a loss or a correlation with three digits, another measure as a share; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.1%}" if is_share(measure) else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Return seconds for people: 8.3 s, 4 min 05 s, 2 h 13 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def plural(count: int, noun: str) -> str:
    """Return '1 round', '2 rounds'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def verdict(run: RunFacts) -> list[str]:
    """Return the verdict's sentences."""
    if not run.rounds:
        return ["Nothing is known yet: the run has not written a line."]
    return [_learned(run), _joined(run), _cost(run)] if run.trained else [_learned(run)]


def _learned(run: RunFacts) -> str:
    base = run.settings["model"]["base"]
    if not run.trained:
        start = run.rounds[0].loss.get(run.key)
        known = f": its held-out loss is {figure(start)} nats per {run.target}" if start is not None else ""
        return f"{base} was evaluated before round 1{known}. No round is finished yet."
    whom = f"{len(run.participants):,} of {len(run.clients):,}" if run.clients else f"{len(run.participants):,}"
    opening = f"In {plural(run.done, 'round')} of {run.strategy}, {whom} clients trained {base} together"
    ends = [r.loss[run.key] for r in run.evaluated if run.key in r.loss]
    if len(ends) < 2:
        return f"{opening}. What that did to its held-out loss was not measured."
    way = "fell" if ends[-1] < ends[0] else "rose" if ends[-1] > ends[0] else "stayed"
    span = f"from {figure(ends[0])} to {figure(ends[-1])}" if way != "stayed" else f"at {figure(ends[0])}"
    text = f"{opening}: held-out loss {way} {span} nats per {run.target}"
    if run.best is not None and run.best.loss[run.key] < ends[-1]:
        text += f"; its lowest was {figure(run.best.loss[run.key])}, {_at(run.best.round)}"
    closing = [m for m in (run.closing.metrics if run.closing else []) if not any(m in r.metrics for r in run.rounds)]
    text += "".join(_over_rounds(run, m) for m in dict.fromkeys(m for r in run.rounds for m in r.metrics))
    return text + "".join(_measure(run.closing, m) for m in closing) + "." + _teacher(run)


def _over_rounds(run: RunFacts, measure: str) -> str:
    """Return '; accuracy went from 50.0% to 80.0%', from the first evaluation to the last."""
    values = list(metric_curve(run, measure).values())
    return f"; {title(measure)} went from {figure(values[0], measure)} to {figure(values[-1], measure)}"


def _teacher(run: RunFacts) -> str:
    """Return a sentence on the server's teacher; '' where there is none."""
    taught = [r.teacher for r in run.rounds if r.teacher]
    if not taught:
        return ""
    said = [
        f"{title(m)} went from {figure(taught[0][m], m)} to {figure(taught[-1][m], m)}"
        for m in taught[0]
        if m in taught[-1]
    ]
    return f" The server's teacher, {run.where_taught}: {', '.join(said)}."


def _at(round: int) -> str:
    return f"after round {round}" if round else "before round 1"


def _measure(closing: Closing | None, measure: str) -> str:
    shared = closing.scores.get(measure, {}).get("shared", {}) if closing else {}
    if closing is None or not {"base", "federated"} <= shared.keys():
        return ""
    went = f"{figure(shared['base'], measure)} to {figure(shared['federated'], measure)}"
    return f"; {title(measure)} on everybody's {closing.shared_rows:,} held-out rows went from {went}"


def _joined(run: RunFacts) -> str:
    unknown = "Whether joining beat training alone is not known"
    if run.phase in ("training", "waiting"):
        return f"{unknown}: that is compared at the end of a run."
    if run.phase == "comparing":
        return f"{unknown}: the closing comparison is not finished."
    if run.closing is None or "local" not in run.settings["baselines"]:
        return f"{unknown}: no client was trained alone (baselines: [local] would do that)."
    parts = [helped(run.closing, measure) for measure in [*run.closing.metrics, "loss"]]
    said = [part for part in parts if part]
    return f"Joining beat training alone on {' and '.join(said)}." if said else f"{unknown}: no client had both scores."


def helped(closing: Closing, measure: str) -> str:
    """Return '7 of 10 clients' own rows by exact match (2 tied)'; '' where nothing is compared."""
    if measure not in closing.scores:
        return ""
    better, ties, of = closing.helped(measure)
    tied = f" ({ties:,} tied)" if ties else ""
    return f"{better:,} of {of:,} clients' own rows by {title(measure)}{tied}" if of else ""


def _cost(run: RunFacts) -> str:
    each = bytes_per_answer(run)
    up, down = sum(r.uplink_bytes for r in run.trained), sum(r.downlink_bytes for r in run.trained)
    sent = f"A client sent {size(each)} a round on average; " if each else ""
    took = f"{sent}{size(up)} went up and {size(down)} down in all. Training took {duration(run.seconds('round'))}"
    took += f", {duration(server)} of it on the server" if (server := run.seconds("server")) else ""
    evaluation = run.seconds("evaluation")
    return took + (f", evaluation between rounds {duration(evaluation)}." if evaluation else ".")


def status(run: RunFacts, now: float | None = None) -> str:
    """Return where the run stands; now: seconds since 1970, where the page is live."""
    progress = f"round {run.done:,} of {run.planned:,}"
    if run.phase == "finished":
        return f"Finished: {plural(run.done, 'round')}."
    if run.phase == "stopped early":
        return f"Stopped early after {progress}, as stop.key {run.settings['stop']['key']} asks."
    if run.phase == "comparing":
        return f"All {plural(run.done, 'round')} are done; the closing comparison is running, or was interrupted."
    if run.phase == "judging":
        return f"All {plural(run.done, 'round')} are done; the benchmarks are running, failed, or were interrupted."
    if not run.rounds:
        return f"No round yet of {run.planned:,}: the journal has no line."
    if now is None or run.heard is None:
        return f"Not finished: {progress}."
    ago = max(0.0, now - run.heard)
    last = f"the last line of the journal is {duration(ago) if ago >= 100 else f'{ago:.0f} s'} old"
    if ago > run.quiet_after():
        return f"{progress.capitalize()}, no longer running as it seems: {last}."
    return f"{progress.capitalize()}, running: {last}."


def statuses(runs: Sequence[RunFacts], names: Sequence[str], now: float | None = None) -> list[str]:
    """Return a line on where a run stands; of several, one for each that has not ended, by these names."""
    if len(runs) == 1:
        return [status(runs[0], now)]
    going = [pair for pair in zip(names, runs, strict=True) if pair[1].phase not in ("finished", "stopped early")]
    return [f"{name}: {status(run, now)}" for name, run in going]


def tiles(run: RunFacts) -> list[tuple[str, str, str]]:
    """Return the key figures: (name, figure, what it is)."""
    found: list[tuple[str, str, str]] = []
    ends = [r.loss[run.key] for r in run.evaluated if run.key in r.loss]
    if len(ends) > 1:
        found.append(
            ("held-out loss", f"{figure(ends[0])} → {figure(ends[-1])}", f"nats per {run.target}, start → end")
        )
    closed = run.closing.metrics if run.closing else []
    for measure in dict.fromkeys(m for r in run.rounds for m in r.metrics if m not in closed):
        values = list(metric_curve(run, measure).values())
        went = f"{figure(values[0], measure)} → {figure(values[-1], measure)}"
        found.append((title(measure), went, f"start → end, {run.where}"))
    for measure in run.closing.metrics if run.closing else []:
        shared = run.closing.scores[measure].get("shared", {}) if run.closing else {}
        if {"base", "federated"} <= shared.keys():
            went = f"{figure(shared['base'], measure)} → {figure(shared['federated'], measure)}"
            found.append((title(measure), went, "base → federated, everybody's rows"))
    found += _joined_tiles(run.closing)
    if run.clients:
        found.append(("clients that took part", f"{len(run.participants):,} of {len(run.clients):,}", "at least once"))
    if (each := bytes_per_answer(run)) is not None:
        down = sum(r.downlink_bytes for r in run.trained)
        asked = sum(r.clients + len(r.absent) for r in run.trained)
        found.append(("sent per client and round", f"{size(each)} up", f"{size(down / asked)} down, on average"))
    if run.trained:
        found.append(("training time", duration(run.seconds("round")), plural(len(run.trained), "round")))
    return found


def _joined_tiles(closing: Closing | None) -> list[tuple[str, str, str]]:
    if closing is None:
        return []
    measure = closing.metrics[0] if closing.metrics else "loss"
    better, ties, of = closing.helped(measure)
    tied = f", {ties:,} tied" if ties else ""
    return [("joining beat alone", f"{better:,} of {of:,}", f"clients, by {title(measure)}{tied}")] if of else []


def stamp(seconds: float) -> str:
    """Return a moment as UTC text."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
