"""What a run cost, and what went wrong: the sections about seconds, bytes, skipped rows and steps, absences."""

from collections import Counter

from sheepfold.display import size
from sheepfold.report import figures, html, words
from sheepfold.report.facts import RunFacts
from sheepfold.report.html import paragraph, section, table

STAGES = ("data", "forward", "backward", "step", "server")


def cost(run: RunFacts) -> str:
    """Return seconds and bytes, by stage and round."""
    trained = run.trained
    if not trained:
        return section("cost", "Time and traffic", paragraph("No round is finished yet."))
    at = [r.round for r in trained]
    names = {"forward": "forward", "backward": "backward", "step": "optimizer step", "data": "data"}
    if any("server" in r.seconds for r in trained):
        names["server"] = "server's training"
    parts: dict[str, list[float]] = {name: [r.seconds.get(s, 0.0) for r in trained] for s, name in names.items()}
    rest = [max(0.0, r.seconds.get("round", 0.0) - sum(r.seconds.get(s, 0.0) for s in STAGES)) for r in trained]
    parts |= {"fold and the rest": rest, "evaluation": [r.seconds.get("evaluation", 0.0) for r in trained]}
    rows = [[str(n), *(f"{values[i]:.2f}" for values in parts.values())] for i, n in enumerate(at)]
    total = [["all", *(f"{sum(values):.2f}" for values in parts.values())]]
    data = table("Seconds by round and stage", ["round", *parts], rows, foot=total)
    charts = [html.chart("seconds", figures.stacked(at, parts, "seconds"), _seconds_says(run, parts), data)]
    sent = {
        "up (clients to server)": [r.uplink_bytes for r in trained],
        "down (server to clients)": [r.downlink_bytes for r in trained],
    }
    lines = [[str(r.round), str(r.clients), size(r.uplink_bytes), size(r.downlink_bytes)] for r in trained]
    up, down = (sum(values) for values in sent.values())
    data = table("Bytes by round", ["round", "updates", "up", "down"], lines, foot=[["all", "", size(up), size(down)]])
    mega = {name: [value / 1e6 for value in values] for name, values in sent.items()}
    says = f"{size(up)} went up and {size(down)} down in {words.plural(len(trained), 'round')}."
    charts.append(html.chart("bytes", figures.stacked(at, mega, "MB"), says, data))
    return section("cost", "Time and traffic", *charts)


def _seconds_says(run: RunFacts, parts: dict[str, list[float]]) -> str:
    total = run.seconds("round") or 1.0
    told = ("forward", "backward", "optimizer step", "server's training")
    shares = {name: sum(parts[name]) / total for name in told if name in parts}
    said = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    before = run.rounds[0].seconds.get("evaluation", 0.0) if not run.rounds[0].round else 0.0
    start = f", and {words.duration(before)} for the evaluation before round 1, which is not drawn" if before else ""
    return (
        f"Training took {words.duration(run.seconds('round'))} ({said} of it), "
        f"evaluation {words.duration(run.seconds('evaluation') - before)} more{start}."
    )


def faults(run: RunFacts) -> str:
    """Return what was skipped, who was absent, and why."""
    dropped = {reason: rows for reason, rows in ((run.data or {}).get("dropped") or {}).items() if rows}
    notes = (run.data or {}).get("notes") or []
    parts = []
    if run.data is None:
        parts.append(paragraph("Rows: the run has not written down its data."))
    elif dropped:
        rows = [[reason, count] for reason, count in dropped.items()]
        parts.append(table("Rows that nobody trains or is evaluated on", ["reason", "rows"], rows))
    else:
        parts.append(paragraph(f"Rows: none of {run.data['records']:,} was left out."))
    parts += [paragraph(f"Note of the data: {note}") for note in notes]
    parts.append(_events(run, "skipped"))
    parts.append(_events(run, "absent"))
    return section("faults", "Skipped rows and steps, absences", *parts)


def _events(run: RunFacts, kind: str) -> str:
    """Return one line a round and reason: skipped steps, or clients that sent no update."""
    lines: list[list[str | int]] = []
    for r in run.trained:
        counted: Counter[str] = Counter()
        who: dict[str, list[str]] = {}
        found = r.absent.items() if kind == "absent" else [(c, why) for c, (_, why) in r.skipped.items()]
        for client, why in found:
            counted[why] += 1 if kind == "absent" else r.skipped[client][0]
            who.setdefault(why, []).append(client)
        lines += [[str(r.round), n, words.listed(who[why]), why or "no reason was noted"] for why, n in counted.items()]
    total, steps = sum(int(line[1]) for line in lines), sum(r.steps for r in run.trained)
    if kind == "skipped":
        if not lines:
            return paragraph(f"Steps: all {steps:,} optimizer steps of the clients that answered were taken.")
        caption = f"{words.plural(total, 'optimizer step')} of {steps:,} not taken: loss or gradient was not finite"
        return table(caption, ["round", "steps", "clients", "why"], lines, words=[2, 3])
    if not lines:
        return paragraph("Absences: every sampled client sent an update in every round.")
    caption = f"{words.plural(total, 'time')} a sampled client sent no update"
    return table(caption, ["round", "clients", "who", "why"], lines, words=[2, 3])
