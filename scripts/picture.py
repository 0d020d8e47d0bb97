"""Draw docs/run.svg: a run of the demo as its terminal looks at the end.

python scripts/picture.py
"""

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from sheepfold import simulation
from sheepfold.config import load
from sheepfold.display import Terminal

OUT = Path(__file__).resolve().parents[1] / "docs" / "run.svg"


def main() -> None:
    """Run the demo, then print what it showed into a recording console."""
    events: list[tuple[str, Mapping[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        simulation.run(load(None, [f"output={folder}"]), listener=lambda event, facts: events.append((event, facts)))
    screen = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, highlight=False)
    terminal = Terminal(screen)
    for event, facts in events:
        if event == "round":
            terminal.lines.append(facts)
        elif event == "closing":
            screen.print()
            screen.print(terminal.rounds())
            terminal(event, facts)
        elif event == "start":
            terminal(event, facts)
        elif event == "end":
            terminal(event, {**facts, "folder": "runs/demo"})
    screen.save_svg(str(OUT), title="sheepfold run")


if __name__ == "__main__":
    main()
