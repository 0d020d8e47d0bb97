"""What came of it: the sections about joining, benchmarks, and what was asked for."""

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata

from sheepfold.joining import Closing
from sheepfold.report import html, words
from sheepfold.report.benchmarks import Benchmark
from sheepfold.report.dumbbells import WHO, dumbbells
from sheepfold.report.facts import RunFacts
from sheepfold.report.html import Raw, paragraph, section, table
from sheepfold.report.lines import is_share, title

MOST_DRAWN = 40
"""Clients that the chart of joining draws; the table has all."""


def joining(run: RunFacts) -> str:
    """Return the closing comparison, client by client."""
    name, heading = "joining", "Was joining worth it?"
    closing = run.closing
    if closing is None:
        why = {
            "waiting": "This is compared at the end of a run.",
            "training": "This is compared at the end of a run.",
            "comparing": "The closing comparison is not finished.",
        }.get(run.phase, "Not known: the experiment asked for no baseline (baselines: [local]) and no metric.")
        stale = " An earlier end of this run left a closing table, which these rounds have overtaken."
        return section(name, heading, paragraph(why + stale * run.stale_closing))
    parts = [_missing(run, closing)]
    for i, measure in enumerate(m for m in [*closing.metrics, "loss"] if m in closing.scores):
        parts += [f"<h3>{html.text(title(measure).capitalize())}</h3>", _measure(run, closing, measure, i)]
    return section(name, heading, *parts)


def _missing(run: RunFacts, closing: Closing) -> str:
    asked = run.settings["baselines"]
    missing = [who for who in ("local", "centralised") if who not in asked]
    says = {
        "local": "No client was trained alone, so this cannot say whether joining was worth it (baselines: [local]).",
        "centralised": "What all rows in one place would reach was not measured (baselines: [centralised]).",
    }
    judged = _judged(run) if closing.joined == "personal" else ""
    return paragraph(judged + " ".join(says[who] for who in missing), "note") if missing or judged else ""


def _judged(run: RunFacts) -> str:
    """Return what stands as a client's personal adapter: of mixed ranks it may be the shared one, cut for it."""
    wanted = any(run.settings["personal"].values())
    folder = any(name.startswith("personal") for name in run.adapters)
    if wanted or folder or not run.settings["adapter"]["ranks"]:
        return "Joining is judged by the personal adapter, which a client takes home. "
    return (
        "Joining is judged by the shared adapter cut to the client's own rank, called personal here; no file of its "
        "own was kept. "
    )


def _own_rows(run: RunFacts, closing: Closing) -> str:
    """Return on how many rows a client's own score rests; '' where the run did not write that down."""
    settings = run.settings["evaluation"]
    held = [run.clients[c].get(settings["split"], 0) for c in closing.clients if c in run.clients]
    counts = [min(n, settings["rows_per_client"] or n) for n in held if n]
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    span = words.plural(low, "held-out row") if low == high else f"{low:,} to {high:,} held-out rows, by client"
    return f" A client's own score rests on {span}."


def _measure(run: RunFacts, closing: Closing, measure: str, number: int) -> str:
    scores, it = closing.scores[measure], closing.joined
    who = [w for w in WHO if any(w in scores.get(c, {}) for c in closing.clients)]
    if not who:
        return _of_everybody(closing, measure)
    sign = -1 if measure == "loss" else 1
    gains = {c: sign * (scores[c][it] - scores[c]["local"]) for c in closing.clients if _both(scores, c, it)}
    head = ["rows of", *(WHO[w][2] for w in who), *(["gain over alone"] if gains else [])]

    def row(client: str) -> list[html.Cell | Raw]:
        own = [words.figure(scores.get(client, {}).get(w), measure) for w in who]
        return [client, *own, *([_signed(gains.get(client), measure)] if gains else [])]

    shared, alone = scores.get("shared", {}), closing.alone_on_shared(measure)
    everybody = [f"everybody ({closing.shared_rows:,} rows)"]
    for w in who:
        value = (min if measure == "loss" else max)(alone) if w == "local" and alone else shared.get(w)
        everybody.append(words.figure(value, measure) + " (best client)" * (w == "local" and bool(alone)))
    caption = f"{title(measure).capitalize()} on each client's own held-out rows, and on everybody's"
    foot = [[*everybody, *([""] if gains else [])]] if shared else []
    data = table(caption, head, map(row, closing.clients), foot=foot)
    drawn, which = _drawn(closing, gains)
    said = words.helped(closing, measure)
    which += " Left is better." if measure == "loss" else " Right is better."
    which += " Marks that would cover each other lie one below the other." + _own_rows(run, closing)
    says = f"Joining beat training alone on {said}. {which}" if said else which
    return html.chart(f"joining-{number}", dumbbells(drawn, scores, measure, it, run.target), says, data)


def _of_everybody(closing: Closing, measure: str) -> str:
    """Return the scores where no client has held-out rows of its own: there is nothing to draw client by client."""
    shared = closing.scores[measure].get("shared", {})
    rows = [[label, words.figure(shared[w], measure)] for w, (_, _, label) in WHO.items() if w in shared]
    rows += [
        [f"{c}, alone", words.figure(shared[f"local:{c}"], measure)] for c in closing.clients if f"local:{c}" in shared
    ]
    caption = f"{title(measure).capitalize()} on everybody's {closing.shared_rows:,} rows; no client has its own"
    return table(caption, ["who", title(measure)], rows)


def _both(scores: Mapping[str, Mapping[str, float]], client: str, it: str) -> bool:
    return {"local", it} <= scores.get(client, {}).keys()


def _drawn(closing: Closing, gains: dict[str, float]) -> tuple[list[str], str]:
    """Return the clients to draw and what they are: all, or of many those that gained most and least."""
    clients = list(closing.clients)
    if len(clients) <= MOST_DRAWN:
        return clients, "A row is a client; the grey bar joins alone and joined." if gains else "A row is a client."
    half = MOST_DRAWN // 2
    if not gains:
        return clients[:MOST_DRAWN], f"The first {MOST_DRAWN} of {len(clients):,} clients; the table has all."
    order = sorted(gains, key=lambda client: -gains[client])
    which = f"Drawn of {len(clients):,} clients: the {half} that gained most and the {half} that gained least."
    return [*order[:half], *order[-half:]], which + " The table has all."


def _signed(value: float | None, measure: str) -> str:
    """Return a gain, more is better; the word keeps it readable without colour."""
    if value is None:
        return "–"
    return f"{100 * value:+.1f} points" if is_share(measure) else f"{value:+.3f}"


def benchmarks(results: Sequence[tuple[str, Sequence[Benchmark]]]) -> str:
    """Return the benchmark results of one run, or of several with their names; nothing where there are none."""
    found = [(name, b) for name, read in results for b in read]
    problems = [paragraph(f"{b.file}: {b.problem}.", "note") for _, b in found if b.problem]
    whole = [(name, b) for name, b in found if not b.problem and not b.inside]
    parts = [(name, b) for name, b in found if b.inside]
    several = len(results) > 1
    made = _scores("Results in eval/", whole, several=several) if whole else ""
    if parts:
        inside = _scores("Results by subject", parts, several=several)
        made += html.details("benchmark-parts", f"The {words.plural(len(parts), 'figure')} of their parts", inside)
    return section("benchmarks", "Benchmarks", made, *problems) if found else ""


def _scores(caption: str, found: Sequence[tuple[str, Benchmark]], *, several: bool) -> str:
    head = ["task", "scored", "measure", "value", "standard error", "rows", "file", *(["run"] if several else [])]
    rows: list[list[html.Cell | Raw]] = []
    for name, b in found:
        value, error = (None if v is None else f"{v:.4f}" for v in (b.value, b.error))
        rows.append([b.task, b.subject or "–", b.measure, value, error, b.rows, b.file, *([name] if several else [])])
    return table(caption, head, rows, words=[1, 2, 6, 7])


def experiment(run: RunFacts) -> str:
    """Return the experiment file, hashes and versions."""
    versions = (run.data or {}).get("versions") or {}
    known = ", ".join(f"{library} {version}" for library, version in versions.items())
    data = run.data or {}
    rows: list[tuple[str, html.Cell | Raw]] = [
        ("folder", run.path.resolve().name),
        ("base", run.settings["model"]["base"]),
        ("seed", str(run.settings["seed"])),
        ("adapter hash", Raw(code(run.hash)) if run.hash else "no round yet"),
        ("data fingerprint", Raw(code(data["fingerprint"])) if "fingerprint" in data else "not written down"),
        ("base's fingerprint", Raw(code(data["base"])) if "base" in data else "not written down"),
        ("the run's versions", known or "not written down: the run is older"),
        ("this page's versions", page_versions()),
        ("journal last written", words.stamp(run.heard) if run.heard else "not yet"),
    ]
    facts = table("What this run is", ["what", "value"], rows, words=[1])
    file = html.details(
        "experiment-file", "experiment.yaml, every option resolved",
        html.box("experiment.yaml", f"<pre>{html.text(run.text)}</pre>"),
    )  # fmt: skip
    return section("experiment", "The experiment", facts, file)


def code(words: str) -> str:
    """Return words as code, escaped."""
    return f"<code>{html.text(words)}</code>"


def page_versions() -> str:
    """Return what wrote this page."""
    written_by = [f"{library} {metadata.version(library)}" for library in ("sheepfold", "plotly")]
    return ", ".join([*written_by, f"Python {platform.python_version()}"])
