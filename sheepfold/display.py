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
    from sheepfold.state import BatchPlan

ALWAYS = ("clients", "train loss", "held-out loss", "sent up", "seconds")
MEASURED = ("accuracy", "matthews", "f1")
HEADINGS = (*ALWAYS[:3], "full model", *MEASURED, "teacher", "worst tenth", "never sampled", *ALWAYS[3:])
"""Columns of the table of rounds; those that are not there always are there where a round has such a figure."""
MOST_CLIENTS = 20
"""Clients that the closing table lists one by one; beyond, it shows the summary alone."""


class Terminal:
    """Shows a run as it goes; use as a context manager and pass it as the listener."""

    def __init__(self, screen: Console | None = None) -> None:
        self.console = screen or console()
        self.cells: list[dict[str, str]] = []
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
            self._live.update(self.rounds() if self.cells else Text(""))
            self._live.stop()

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        handler = getattr(self, f"_on_{event}", None)
        if handler:
            handler(facts)

    def _on_stage(self, facts: Mapping[str, Any]) -> None:
        self._progress.reset(self._task, description=escape(facts["text"]))
        self._show()

    def _on_start(self, facts: Mapping[str, Any]) -> None:
        f = facts
        apart = f["train_rows"] is None
        self.console.print(
            f"[bold]{f['strategy']}[/] on {escape(f['base'])} ({f['device']}, {f['dtype']}): {f['clients']:,} clients, "
            f"{f['cohort']:,} a round, {f['rounds']} rounds; {_rows(f['train_rows'])}, "
            f"{f['adapter_numbers']:,} numbers in the adapter, "
            f"{'each on its own machine' if apart else together(f['plan'])}"
            f"{', in ' + str(f['processes']) + ' processes' if f.get('processes', 1) > 1 else ''}"
        )
        if facts["ranks"]:
            kinds = ", ".join(f"{count:,} of rank {name}" for name, count in facts["ranks"])
            self.console.print(f"clients differ: {kinds}")
        for note in facts["notes"]:
            self.console.print(f"[yellow]note[/] {escape(note)}")
        self._progress.reset(self._task, description="evaluating the base")
        self._show()

    def _on_round(self, line: Mapping[str, Any]) -> None:
        self.cells.append(cells := _cells(line))
        if not self.console.is_terminal:  # a log: one line a round, as it happens
            said = ", ".join(f"{name} {cells[name]}" for name in HEADINGS if cells[name])
            self.console.print(f"round {line['round']}: {said}")
        self._progress.reset(self._task, description=f"round {line['round'] + 1}")
        self._show()

    def _on_waiting(self, facts: Mapping[str, Any]) -> None:
        left = facts["outstanding"]
        names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        text = f"{facts['kind']}: {facts['answered']} of {facts['asked']} have answered"
        self._progress.reset(self._task, description=escape(f"{text}, waiting for {names}" if left else text))
        self._show()

    def _on_progress(self, facts: Mapping[str, Any]) -> None:
        self._progress.advance(self._task, facts["steps"])

    def _on_halved(self, facts: Mapping[str, Any]) -> None:
        self.console.print(f"[yellow]note[/] {escape(facts['text'])}")

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
        self._live.update(Group(self.rounds(), self._progress) if self.cells else self._progress)

    def rounds(self) -> Table:
        """Return the table of the rounds so far; the last thirty of many."""
        shown = [name for name in HEADINGS if name in ALWAYS or any(cells[name] for cells in self.cells)]
        view = table("rounds", "round", *shown)
        for cells in self.cells[-30:]:
            view.add_row(cells["round"], *(cells[name] for name in shown))
        return view


def _cells(line: Mapping[str, Any]) -> dict[str, str]:
    """Return a round's cells by heading; empty where it has no such figure."""
    loss = line.get("held_out", {}).get("loss", {})
    rose = " [yellow]rose[/]" if line.get("rose") else ""
    train = _figure(line.get("train_loss"), "loss")
    absent = f" ({len(line['absent'])} absent)" if line.get("absent") else ""
    skipped = sum(c["skipped_steps"] for c in line.get("clients", {}).values())
    clients = f"{len(line.get('clients', {}))}{absent}" if line["round"] else ""
    teacher = line.get("teacher", {})
    over = ("global", "weighted") if teacher else ("weighted", "global")  # a teacher is judged on the test set
    return {
        "round": str(line["round"] or "start"),
        "clients": clients + (f", [yellow]{skipped} steps skipped[/]" if skipped else ""),
        "train loss": train,
        "held-out loss": _figure(_overall(line, "loss", over), "loss") + rose,
        "full model": _figure(_overall(line, "loss", over, "held_out_full"), "loss"),
        **{name: _figure(_overall(line, name, over), name) for name in MEASURED},
        "teacher": " ".join(_figure(teacher[name], name) for name in ("loss", "accuracy") if name in teacher),
        "worst tenth": _figure(loss.get("worst_decile"), "loss"),
        "never sampled": _figure(loss.get("never_sampled"), "loss"),
        "sent up": size(line["uplink_bytes"]) if "uplink_bytes" in line else "",
        "seconds": f"{line['seconds'].get('round', line['seconds'].get('evaluation', 0.0)):.1f}",
    }


def _overall(line: Mapping[str, Any], measure: str, over: Sequence[str], judged: str = "held_out") -> float | None:
    """Return a measure over the first of these rows that there are: all clients' (weighted), the test set (global)."""
    summary: Mapping[str, float] = line.get(judged, {}).get(measure, {})
    return next((summary[rows] for rows in over if rows in summary), None)


def size(count: float) -> str:
    """Return a number of bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def together(plan: "BatchPlan") -> str:
    """Return how many clients share a pass, and whether blocks run twice, in words."""
    clients = plan.clients_per_pass
    words = "1 client at a time" if clients == 1 else f"{clients} clients together"
    return f"{words} with gradient checkpointing" if plan.recompute else words


def _rows(train_rows: int | None) -> str:
    return "training rows with their clients" if train_rows is None else f"{train_rows:,} training rows"


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
    alone = closing.alone_on_shared(measure)
    title = f"was joining worth it? {measure.replace('_', ' ')}"
    view = table(title, "rows of", *who, *(["alone, on everybody's"] if alone else []))

    def add(name: str, own: Mapping[str, float | None], elsewhere: float | None) -> None:
        figures = [own.get(w) for w in who] + ([elsewhere] if alone else [])
        view.add_row(name, *(_figure(value, measure) for value in figures))

    judged = [c for c in closing.clients if scores.get(c) or f"local:{c}" in shared]
    for client in judged[:MOST_CLIENTS]:
        add(escape(shortened(client)), scores.get(client, {}), shared.get(f"local:{client}"))
    if len(judged) > MOST_CLIENTS:
        view.add_row(f"… {len(judged) - MOST_CLIENTS} more in closing.json")
    view.add_section()
    if judged:
        rows = [scores[c] for c in judged if c in scores]
        add("mean of clients", {w: _mean([row[w] for row in rows if w in row]) for w in who}, _mean(alone))
    add("everybody", shared, None)
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
    """Write rounds, halvings, the closing table, benchmarks and the end to standard output, one JSON object a line."""
    if event == "closing":
        facts = facts["closing"].as_dict()
    if event in ("round", "halved", "closing", "benchmarks", "benchmarks_failed", "end"):
        sys.stdout.write(json.dumps(plain({"event": event, **facts})) + "\n")
        sys.stdout.flush()
