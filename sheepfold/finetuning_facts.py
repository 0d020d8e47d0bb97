"""What a centralised fine-tuning says of itself: finetune.json, and the card beside the model or the adapter."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from sheepfold.adapter import Adapter
from sheepfold.assembly import Parts
from sheepfold.card import card_of, loading
from sheepfold.card_facts import Table
from sheepfold.config import Experiment
from sheepfold.export import export_peft, save_model
from sheepfold.facts import LIBRARIES


def facts_of(parts: Parts, taken: Mapping[str, np.ndarray], steps: int, held_out: int) -> dict[str, Any]:
    """Return what is known before the first step."""
    data, experiment = parts.data, parts.experiment
    public = experiment.data.public
    percent = f"{100 * public.share:.4g} % of the rows"
    drawn = f"the first {percent}" if public.pick == "first" else f"{percent}, at random"
    named = {"public": public.source or (drawn if public.share else experiment.data.partition.by)}
    named["clients"] = f"the training rows of {len(data.clients):,} clients"
    return {
        "base": parts.base.name,
        "base_fingerprint": parts.base.fingerprint,
        "data_fingerprint": data.fingerprint,
        "device": str(parts.base.device),
        "dtype": str(parts.base.dtype).removeprefix("torch."),
        "method": experiment.adapter.method,
        "numbers": sum(t.numel() for t in parts.initial.tensors().values()),
        "rows": {name: len(rows) for name, rows in taken.items()},
        "rows_from": {name: named[name] for name in taken},
        "held_out_rows": held_out,
        "held_out_from": "the global test set" if len(data.holdout) else "the clients' held-out rows",
        "steps": steps,
        "labels": list(data.labels),
        "notes": list(data.notes),
        "versions": {library: metadata.version(library) for library in LIBRARIES},
    }


def write(parts: Parts, adapter: Adapter, folder: Path, facts: Mapping[str, Any], name: str) -> None:
    """Write the model or the adapter, its card, and finetune.json."""
    experiment, task = parts.experiment, parts.task
    card = replace(card_of(experiment, 0, task), run=name, method=None)
    card = replace(card, in_one_place=_epochs(facts), tables=_tables(experiment, facts))
    about = {"hash of what was trained": facts["hash"]}
    if adapter.pairs:
        export_peft(adapter, folder, parts.base.model, card, about)
    else:
        save_model(parts.base, folder)
        text = card.text("full model", loading(card, "full model"), about)
        (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "finetune.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _epochs(facts: Mapping[str, Any]) -> str:
    epochs, rows = facts["arguments"]["epochs"], sum(facts["rows"].values())
    return f"{epochs} epoch{'' if epochs == 1 else 's'} on {rows:,} rows"


def _tables(experiment: Experiment, facts: Mapping[str, Any]) -> dict[str, Table]:
    """Return the card's tables: what was measured, how it was trained, and on what."""
    start, end = facts["epochs"][0]["held_out"], facts["epochs"][-1]["held_out"]
    figures = [(name, *("" if v is None else f"{v:.4f}" for v in (start[name], end[name]))) for name in end]
    train = experiment.train
    rows = [
        ("rows", "; ".join(f"{count:,}: {facts['rows_from'][name]}" for name, count in facts["rows"].items())),
        ("source", Path(experiment.data.source).name),
        ("held out", f"{facts['held_out_rows']:,}: {facts['held_out_from']}"),
        ("optimizer", f"{train.optimizer}, weight decay {train.weight_decay:g}, {train.batch_rows} rows a step"),
        ("learning rate", f"{train.lr:g}, {train.schedule} over all {facts['steps']:,} steps"),
        ("seed", str(experiment.seed)),
        ("base fingerprint", facts["base_fingerprint"]),
        ("data fingerprint", facts["data_fingerprint"]),
    ]
    made: dict[str, Table] = {"Training": (("", ""), rows)}
    return {"Held out": (("", "start", "end"), figures), **made} if figures else made
