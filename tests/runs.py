"""Small whole runs on the built-in base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sheepfold.config import Experiment, build

MEASURED = ("seconds", "memory")
"""What the machine says of a round in its journal line: never the same twice"""


def experiment(folder: Path, **over: Any) -> Experiment:
    """Return a run of four clients, two rounds of two steps, in a few seconds; dotted keys in `over` replace."""
    values: dict[str, Any] = {
        "name": "small",
        "output": str(folder / "runs"),
        "cache": str(folder / "cache"),
        "adapter": {"rank": 4},
        "data": {"rows": 96, "max_tokens": 64, "partition": {"by": "shards", "clients": 4}, "eval_share": 0.2},
        "train": {"steps": 2, "batch_rows": 4, "lr": 3e-3},
        "federation": {"rounds": 2},
    }
    return build(placed(values, over))


def placed(values: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Put values under dotted keys into nested sections, and return these."""
    for key, value in over.items():
        node = values
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return values
