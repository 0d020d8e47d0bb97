"""What the studies have in common: where data and models are, and experiments as dotted keys."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def shared(place: str) -> Path:
    """Return a file or folder of $SHEEPFOLD_SHARED, else of ../shared; stop with one line where it is not there."""
    path = Path(os.environ.get("SHEEPFOLD_SHARED") or ROOT.parent / "shared") / place
    if not path.exists():
        raise SystemExit(f"{path}: not there; set SHEEPFOLD_SHARED to the folder that holds data/ and models/")
    return path


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as sections."""
    values: dict[str, Any] = {}
    for key, value in copy.deepcopy(dict(options)).items():
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return values
