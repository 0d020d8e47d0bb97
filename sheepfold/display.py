"""What a run looks like in a terminal: a live table of rounds, and the closing table. Or JSON lines, or nothing."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sheepfold.journal import plain
from sheepfold.terminal import console, table

if TYPE_CHECKING:
    from sheepfold.joining import Closing

HEADINGS = ("clients", "train loss", "held-out loss", "worst tenth", "never sampled", "sent up", "seconds")
MEASURED = ("accuracy", "matthews", "f1")
"""What rounds may also measure; each has a column behind the held-out loss, where it does."""
MOST_CLIENTS = 20
"""Clients that the closing table lists one by one; beyond, it shows the summary alone."""


class Terminal:
    """Shows a run as it goes; use as a context manager and pass it as the listener."""

    def __init__(self, screen: Console | None = None) -> None:
        self.console = screen or console()
        self.lines: list[Mapping[str, Any]] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed} client steps"),
            TimeElapsedColumn(),
        )
        self._task = self._progress.add_task("starting", total=None)
        self._live = Live(console=self.console, refresh_per_second=4, transient=False)

    def __enter__(self) -> "Terminal":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._settle()

    def _settle(self) -> None:
        """Leave the table of rounds as it stands, and go on below it."""
        if self._live.is_started:
            self._progress.stop()
            self._live.update(self.rounds() if self.lines else Text(""))
            self._live.stop()

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        handler = getattr(self, f"_on_{event}", None)
        if handler:
            handler(facts)

    def _on_stage(self, facts: Mapping[str, Any]) -> None:
        self._progress.reset(self._task, description=facts["text"])
        self._show()

    def _on_start(self, facts: Mapping[str, Any]) -> None:
        f = facts
        self.console.print(
            f"[bold]{f['strategy']}[/] on {escape(f['base'])} ({f['device']}, {f['dtype']}): {f['clients']:,} clients, "
            f"{f['cohort']:,} a round, {f['rounds']} rounds; {f['train_rows']:,} training rows, "
            f"{f['adapter_numbers']:,} numbers in the adapter, {together(f['plan'].clients_per_pass)}"
        )
        if facts["ranks"]:
            kinds = ", ".join(f"{count:,} of rank {name}" for name, count in facts["ranks"])
            self.console.print(f"clients differ: {kinds}")
        for note in facts["notes"]:
            self.console.print(f"[yellow]note[/] {escape(note)}")
        self._progress.reset(self._task, description="evaluating the base")
        self._show()

    def _on_round(self, line: Mapping[str, Any]) -> None:
        self.lines.append(line)
        if not self.console.is_terminal:  # a log: one line a round, as it happens
            extra = self._measured()
            cells = zip(_headings(extra), _row(line, extra)[1:], strict=True)
            self.console.print(f"round {line['round']}: " + ", ".join(f"{n} {c}" for n, c in cells if c))
        self._progress.reset(self._task, description=f"round {line['round'] + 1}")
        self._show()

    def _on_progress(self, facts: Mapping[str, Any]) -> None:
        self._progress.advance(self._task, facts["steps"])

    def _on_closing(self, facts: Mapping[str, Any]) -> None:
        self._settle()
        closing = facts["closing"]
        for measure in [*closing.metrics, "loss"]:
            self.console.print()
            self.console.print(closing_table(closing, measure))
            self.console.print(verdict(closing, measure))

    def _on_benchmarks(self, facts: Mapping[str, Any]) -> None:
        self._settle()
        self.console.print()
        for task, told in facts["figures"].items():
            figures = ", ".join(f"{name} {_figure(value, 'loss')}" for name, value in told["values"].items())
            self.console.print(escape(f"{task}, {told['metric']}: {figures}"))
        for note in facts["notes"]:
            self.console.print(f"[yellow]note[/] {escape(note)}")

    def _on_benchmarks_failed(self, facts: Mapping[str, Any]) -> None:
        self._settle()
        self.console.print()
        words = f"benchmarks failed: {facts['why']}; the run is whole without them, ask again: {facts['again']}"
        self.console.print(f"[yellow]note[/] {escape(words)}")

    def _on_end(self, facts: Mapping[str, Any]) -> None:
        self._settle()
        self.console.print()
        for name, why in facts.get("failed_trackers", {}).items():
            again = f"sheepfold track {facts['folder']} --to {name}"
            self.console.print(f"[yellow]note[/] tracker {name} failed: {escape(why)}; send the rest: {escape(again)}")
        self.console.print(f"adapter, journal and states are in [bold]{escape(facts['folder'])}[/]")

    def _show(self) -> None:
        self._live.update(Group(self.rounds(), self._progress) if self.lines else self._progress)

    def rounds(self) -> Table:
        """Return the table of the rounds so far; the last thirty of many."""
        extra = self._measured()
        view = table("rounds", "round", *_headings(extra))
        for line in self.lines[-30:]:
            view.add_row(*_row(line, extra))
        return view

    def _measured(self) -> list[str]:
        return [name for name in MEASURED if any(name in line.get("held_out", {}) for line in self.lines)]


def _headings(measured: Sequence[str]) -> list[str]:
    at = HEADINGS.index("worst tenth")
    return [*HEADINGS[:at], *measured, *HEADINGS[at:]]


def _row(line: Mapping[str, Any], measured: Sequence[str]) -> list[str]:
    loss = line.get("held_out", {}).get("loss", {})
    rose = " [yellow]rose[/]" if line.get("rose") else ""
    train = _figure(line.get("train_loss"), "loss")
    absent = f" ({len(line['absent'])} absent)" if line.get("absent") else ""
    skipped = sum(c["skipped_steps"] for c in line.get("clients", {}).values())
    clients = f"{len(line.get('clients', {}))}{absent}" if line["round"] else ""
    return [
        str(line["round"] or "start"),
        clients + (f", [yellow]{skipped} steps skipped[/]" if skipped else ""),
        train,
        _figure(loss.get("weighted", loss.get("global")), "loss") + rose,
        *(_figure(_overall(line, name), name) for name in measured),
        _figure(loss.get("worst_decile"), "loss"),
        _figure(loss.get("never_sampled"), "loss"),
        size(line["uplink_bytes"]) if "uplink_bytes" in line else "",
        f"{line['seconds'].get('round', line['seconds'].get('evaluation', 0.0)):.1f}",
    ]


def _overall(line: Mapping[str, Any], measure: str) -> float | None:
    """Return a measure over all clients' held-out rows, or over the global test set where they have none."""
    summary = line.get("held_out", {}).get(measure, {})
    found: float | None = summary.get("weighted", summary.get("global"))
    return found


def size(count: float) -> str:
    """Return a number of bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def together(clients: int) -> str:
    """Return how many clients share a pass, in words."""
    return "1 client at a time" if clients == 1 else f"{clients} clients together"


def shortened(name: str, most: int = 32) -> str:
    """Return a name that leaves room for the figures beside it."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def closing_table(closing: "Closing", measure: str) -> Table:
    """Return the closing table of one measure: every client's own rows, and everybody's."""
    scores = closing.scores[measure]
    shared = scores.get("shared", {})
    who = [
        w for w in ("base", "local", "federated", "personal", "centralised") if any(w in row for row in scores.values())
    ]
    title = f"was joining worth it? {measure.replace('_', ' ')}"
    view = table(title, "rows of", *who, "alone, on everybody's")
    for client in closing.clients[:MOST_CLIENTS]:
        own = [_figure(scores.get(client, {}).get(w), measure) for w in who]
        view.add_row(escape(shortened(client)), *own, _figure(shared.get(f"local:{client}"), measure))
    if len(closing.clients) > MOST_CLIENTS:
        view.add_row(f"… {len(closing.clients) - MOST_CLIENTS} more in closing.json")
    view.add_section()
    rows = [scores[c] for c in closing.clients if c in scores]
    means = [_figure(_mean([row[w] for row in rows if w in row]), measure) for w in who]
    view.add_row("mean of clients", *means, _figure(_mean(closing.alone_on_shared(measure)), measure))
    everybody = [_figure(shared.get(w), measure) for w in who]
    view.add_row("everybody", *everybody)
    return view


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _figure(value: float | None, measure: str) -> str:
    if value is None:
        return ""
    if measure == "matthews":
        return f"{value:.3f}"
    return f"{value:.4f}" if measure == "loss" else f"{value:.1%}"


def verdict(closing: "Closing", measure: str) -> str:
    """Return what the closing table says, in one or two sentences."""
    shared = closing.scores[measure].get("shared", {})
    better, ties, of = closing.helped(measure)
    tied = f", and tied on {ties}" if ties else ""
    alone = closing.alone_on_shared(measure)
    named = {"base": shared.get("base")}
    named |= {"best client alone": (min if measure == "loss" else max)(alone)} if alone else {}
    named |= {name: shared[name] for name in ("federated", "centralised") if name in shared}
    figures = ", ".join(f"{name} {_figure(value, measure)}" for name, value in named.items() if value is not None)
    text = f"On everybody's {closing.shared_rows} held-out rows: {figures}."
    return text + (f" Joining beat training alone on {better} of {of} clients' own rows{tied}." if of else "")


def json_lines(event: str, facts: Mapping[str, Any]) -> None:
    """Write rounds, the closing table, benchmarks and the end to standard output, one JSON object a line."""
    if event == "closing":
        facts = facts["closing"].as_dict()
    if event in ("round", "closing", "benchmarks", "benchmarks_failed", "end"):
        sys.stdout.write(json.dumps(plain({"event": event, **facts})) + "\n")
        sys.stdout.flush()
