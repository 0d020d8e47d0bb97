"""What trackers are told of a run: numbers by name from the journal's lines, the closing table and benchmark results.

held_out/weighted ...  train/loss  train/lr  bytes/up  bytes/down  seconds/forward ...  clients/trained ...
server/total ...  teacher/loss ...  (where the server trains a teacher)
closing/loss.own_rows.federated ...  eval/gsm8k/exact_match/federated ...
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sheepfold.card_facts import closing_means
from sheepfold.report.benchmarks import Benchmark


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return a round's numbers; what the round does not have, or could not measure, is absent."""
    found: dict[str, Any] = {f"held_out/{k}": v for k, v in line.get("held_out", {}).get("loss", {}).items()}
    found |= {f"held_out_full/{k}": v for k, v in line.get("held_out_full", {}).get("loss", {}).items()}
    found |= {f"{who}/{k}": v for who in ("server", "teacher") for k, v in line.get(who, {}).items()}
    found |= {f"seconds/{stage}": v for stage, v in line.get("seconds", {}).items()}
    if "cohort" in line:
        clients = line["clients"].values()
        found |= {
            "train/loss": line["train_loss"],
            "train/lr": line["lr"],
            "bytes/up": line["uplink_bytes"],
            "bytes/down": line["downlink_bytes"],
            "clients/asked": len(line["cohort"]),
            "clients/trained": len(line["clients"]),
            "clients/absent": len(line["absent"]),
            "clients/skipped_steps": sum(c["skipped_steps"] for c in clients),
            "clients/processed_rows": sum(c["processed_rows"] for c in clients),
            "clients/processed_tokens": sum(c["processed_tokens"] for c in clients),
        }
    if "rose" in line:
        found["held_out/rose"] = int(line["rose"])
    return {name: float(value) for name, value in found.items() if value is not None}


def spreads(line: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the numbers that each client has one of, without names."""
    found = {
        "clients/train_loss": [c["loss"] for c in line.get("clients", {}).values() if c["loss"] is not None],
        "clients/held_out_loss": [v for v in line.get("held_out", {}).get("clients", {}).values() if v is not None],
    }
    return {name: values for name, values in found.items() if values}


def closing(table: Mapping[str, Any]) -> dict[str, float]:
    """Return the closing table's means: over the clients' own rows, and on everybody's."""
    return {
        f"closing/{measure}.{rows}.{who}": value
        for (measure, rows), means in closing_means(table).items()
        for who, value in means.items()
    }


def benchmarks(results: Iterable[Benchmark]) -> dict[str, float]:
    """Return benchmark figures by name: eval/<task>/<measure>/<adapter>, in the characters that MLflow takes.

    Parts of a task, as MMLU's subjects, are left out; so is the adapter where a file of lm-eval's names none.
    """
    found = {}
    for each in results:
        if each.value is not None and not each.inside:
            measure = each.measure.replace(" (", ".").removesuffix(")")
            name = "/".join(part for part in ("eval", each.task, measure, each.subject) if part)
            found[re.sub(r"[^\w\-. :/]", "_", name)] = each.value
    return found


def flat(values: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Return nested options as {'train.lr': 0.005, ...}; empty sections are left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{at}{key}.") if isinstance(value, Mapping) else {f"{at}{key}": value}
    return found
