"""What was learned, with which ranks: the sections about rounds and adapters."""

from sheepfold.display import size
from sheepfold.report import figures, html, words
from sheepfold.report.adapters import AdapterFiles, spread
from sheepfold.report.facts import RunFacts
from sheepfold.report.html import Raw, paragraph, section, table
from sheepfold.report.lines import title

MOST_ADAPTERS = 40
"""Personal adapters that are listed one by one."""


def learning(run: RunFacts) -> str:
    """Return loss and further measures per round."""
    if not run.rounds:
        return section("rounds", "Loss per round", paragraph("No round has been evaluated yet."))
    every = ("weighted", "plain", "best_decile", "worst_decile", "never_sampled", "global")
    keys = [k for k in every if any(k in r.loss for r in run.rounds)]
    metrics = list(dict.fromkeys(m for r in run.rounds for m in r.metrics))
    taught = [m for m in ("loss", *metrics) if any(m in r.teacher for r in run.rounds)]
    best = run.best.round if run.best else None
    rows = [
        [
            str(r.round) if r.round else "start",
            words.figure(r.train_loss),
            *(words.figure(r.loss.get(k)) for k in keys),
            *(words.figure(r.metrics.get(m), m) for m in metrics),
            *(words.figure(r.teacher.get(m), m) for m in taught),
            ", ".join(["lowest"] * (r.round == best) + ["rose"] * r.rose),
        ]
        for r in run.rounds
    ]
    head = ["round", "training", *(k.replace("_", " ") for k in keys), *map(title, metrics)]
    head += [*("teacher's " + (m if m == "loss" else title(m)) for m in taught), "note"]
    data = table(f"Loss by round, nats per {run.target}; held-out but for training", head, rows, words=[len(head) - 1])
    charts = [html.chart("loss", figures.loss(run), _loss_says(run), data)]
    for i, metric in enumerate(metrics):
        whose = [title(metric), *(["teacher's"] if metric in taught else [])]
        rows = [
            [str(r.round) if r.round else "start", *(words.figure(of.get(metric), metric) for of in both)]
            for r in run.rounds
            if metric in r.metrics and (both := [r.metrics, r.teacher][: len(whose)])
        ]
        theirs = f"; dashed, the server's teacher {run.where_taught}" if metric in taught else ""
        says = f"{title(metric).capitalize()} {run.where}, after each evaluated round{theirs}."
        data = table(says, ["round", *whose], rows)
        charts.append(html.chart(f"metric-{i}", figures.measures(run, metric), says, data))
    if run.closing and run.closing.metrics and not metrics:
        charts.append(paragraph("Answers were generated and scored at the end only: see joining, below.", "note"))
    return section("rounds", "Loss and metrics per round" if metrics else "Loss per round", *charts)


def _loss_says(run: RunFacts) -> str:
    points = [(r.round, r.loss[run.key]) for r in run.evaluated if run.key in r.loss]
    if not points:
        return "Training loss per round; held-out loss was not measured."
    says = f"Held-out loss, from {points[0][1]:.3f} at the start to {points[-1][1]:.3f} after round {points[-1][0]}"
    rose = [str(r.round) for r in run.evaluated if r.rose]
    if run.best and run.best.round:
        says += f"; lowest, {run.best.loss[run.key]:.3f}, after round {run.best.round}"
    says += f"; it rose in {words.plural(len(rose), 'round')} ({words.listed(rose, 8)})." if rose else "."
    spread = any("worst_decile" in r.loss for r in run.evaluated)
    return says + (" The band is from the best to the worst tenth of the clients." if spread else "")


def ranks(run: RunFacts) -> str:
    """Return the ranks, where they differ, and the adapters' sizes."""
    parts = [_rank_table(run)]
    shared = {name: a for name, a in run.adapters.items() if not name.startswith("personal")}
    own = {name: a for name, a in run.adapters.items() if name.startswith("personal")}
    listed = [*shared.items(), *list(own.items())[:MOST_ADAPTERS]]
    if listed:
        head = ["adapter", "base", "ranks", "numbers", "file"]
        caption = "Adapters in the run's folder"
        parts.append(table(caption, head, [_adapter_row(n, a) for n, a in listed], words=[1, 2]))
    if len(own) > MOST_ADAPTERS:
        whole = size(sum(a.file_bytes for a in own.values()))
        parts.append(paragraph(f"The first {MOST_ADAPTERS} of {len(own):,} personal adapters, {whole} in all.", "note"))
    if not listed:
        parts.append(paragraph("The adapters are written at the end of the run."))
    return section("ranks", "Ranks and adapters", *parts)


def _adapter_row(name: str, adapter: AdapterFiles) -> list[html.Cell | Raw]:
    return [name, adapter.base or "–", adapter.rank_text, adapter.numbers, size(adapter.file_bytes)]


def _rank_table(run: RunFacts) -> str:
    held = (run.data or {}).get("ranks")
    asked = run.settings["adapter"]
    if asked["method"] != "lora":
        return paragraph(f"The clients train by {asked['method']}, which has no LoRA ranks.")
    if not held:
        if asked["ranks"] is None:
            started = "Ranks are those of the adapter the run started from."
            return paragraph(started if asked["start"] else f"Every client has rank {asked['rank']}.")
        return paragraph("Clients or modules differ in rank; which client has which, this run did not write down.")
    kinds: dict[str, list[str]] = {}
    for client, modules in held.items():
        kinds.setdefault(spread({int(rank): count for rank, count in modules.items()}), []).append(client)
    order = sorted(kinds.items(), key=lambda kind: int(kind[0].split()[0]))
    rows: list[list[html.Cell | Raw]] = []
    rows += [[kind, len(who), f"{len(who) / len(held):.0%}", words.listed(who, 6)] for kind, who in order]
    return table("Clients by the ranks they began with", ["rank", "clients", "share", "who"], rows, words=[3])
