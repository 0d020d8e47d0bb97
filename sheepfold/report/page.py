"""The page: one HTML file that asks no other place for anything."""

from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

from sheepfold.display import size
from sheepfold.report import heat, html, outcome, sections, several, spent, words
from sheepfold.report.adapters import AdapterFacts
from sheepfold.report.compare import grouped
from sheepfold.report.facts import RunFacts
from sheepfold.report.html import paragraph, section, table

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
"""What the browser may do for this page: nothing outside it, whatever a client's name holds."""


def content(runs: Sequence[RunFacts], now: float | None = None) -> str:
    """Return the page of one run, or of several compared, without its frame; now: see words.status."""
    return one(runs[0], now) if len(runs) == 1 else several.content(runs, grouped(runs), now)


def name(runs: Sequence[RunFacts]) -> str:
    """Return the page's title."""
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"


def one(run: RunFacts, now: float | None = None) -> str:
    """Return one run's sections, the verdict first."""
    said = "".join(paragraph(sentence) for sentence in words.verdict(run))
    caution = paragraph(
        "One run with one seed: it cannot tell chance from effect. A report of the same experiment under several seeds "
        "has intervals.",
        "note",
    )
    head = (
        f'<h1 id="top">{escape(run.name)}</h1><p class="status">'
        f'{escape(words.status(run, now))}</p><div class="verdict">{said}</div>{html.tiles(words.tiles(run))}{caution}'
    )
    parts = [
        sections.learning(run),
        heat.holding(run),
        sections.ranks(run),
        outcome.joining(run),
        spent.cost(run),
        spent.faults(run),
        outcome.benchmarks([("", run.benchmarks)]),
        outcome.experiment(run),
    ]
    return html.framed(head, parts)


def of_adapter(facts: AdapterFacts) -> str:
    """Return the short page of an adapter folder: there is no journal, so nothing is known of its training."""
    files = facts.files
    head = (
        f'<h1 id="top">{escape(files.path.resolve().name)}</h1><div class="verdict">'
        f"{paragraph('An adapter folder: how it was trained, by whom and at what cost is not in it.')}</div>"
    )
    rows: list[tuple[str, html.Cell | html.Raw]] = [
        ("base, as the folder says", files.base or "not told"),
        ("kind", files.method),
        ("ranks", files.rank_text),
        ("adapted modules", str(sum(files.ranks.values())) if files.ranks else "not told by the file"),
        (
            "targets",
            ", ".join(sorted(files.targets)) if len(files.targets) <= 24 else f"{len(files.targets):,} modules",
        ),
        ("numbers", files.numbers if files.numbers is not None else "not told by the file"),
        ("weights file", f"{files.weights.name}, {size(files.file_bytes)}"),
        ("SHA-256 of it", html.Raw(outcome.code(files.sha256()))),
        ("this page's versions", outcome.page_versions()),
    ]
    if facts.base:
        fits = ", which the adapter fits" if files.method == "LORA" else ""
        rows.insert(0, (f"base, as it was named here{fits}", facts.base))
    about = section("adapter", "What the folder tells", table("The adapter", ["what", "value"], rows, words=[1]))
    return html.framed(head, [about, outcome.benchmarks([("", facts.benchmarks)])])


@cache
def _file(file: str) -> str:
    return (HERE / file).read_text(encoding="utf-8")


def whole(title: str, inside: str, *, live: str = "") -> str:
    """Return the file: frame, style, plotly once, content; live: the version shown, where it is served."""
    from plotly.offline import get_plotlyjs

    mark = f' data-version="{escape(live)}"' if live else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} · sheepfold report</title>\n<style>\n{_file('page.css')}</style>\n</head>\n"
        f'<body{mark}>\n<a class="skip" href="#main">Skip to the report</a>\n<main id="main">{inside}</main>\n'
        '<p class="skip" role="status" id="heard"></p>\n'
        "<noscript><p>The charts need JavaScript; every chart's figures are in the table below it.</p></noscript>\n"
        f"<footer><p>Written by sheepfold {escape(outcome.page_versions().split(',')[0].split()[1])}.</p></footer>\n"
        f"<script>{get_plotlyjs()}</script>\n<script>\n{_file('page.js')}</script>\n</body>\n</html>\n"
    )
