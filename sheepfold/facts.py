"""What a run writes down and tells: its data, its start, and each round, as plain values."""

from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from sheepfold.assembly import Parts
from sheepfold.data.rows import FederatedData
from sheepfold.data.table import NONE
from sheepfold.devices import group
from sheepfold.rounds import RoundReport
from sheepfold.state import ServerState
from sheepfold.wire.exams import ClientFacts

MOST_CATEGORIES = 80
"""Categories that are counted by name, the most frequent; the rest are added up, so that no run's facts grow large."""
LIBRARIES = ("sheepfold", "torch", "transformers")


def data_facts(parts: Parts) -> dict[str, Any]:
    """Return what the data amounts to: enough to tell whether two runs saw the same."""
    data = parts.data
    sizes = dict.fromkeys(parts.clients, dict.fromkeys(("train", "eval", "test"), 0))  # of rows elsewhere: see below
    sizes |= {c: {"train": len(r.train), "eval": len(r.eval), "test": len(r.test)} for c, r in data.clients.items()}
    return {
        "fingerprint": data.fingerprint,
        "base": parts.base.fingerprint if parts.closed is None else parts.closed.fingerprint,
        **({} if parts.closed is None else {"emulator": parts.base.fingerprint}),
        **({} if parts.server is None else {"teacher": parts.server.fingerprint}),
        "records": len(data.records),
        "labels": list(data.labels),
        "holdout": len(data.holdout),
        "public": len(data.public),
        "dropped": dict(data.dropped),
        "notes": list(data.notes),
        "tokens_from_cache": data.tokens_from_cache,
        "clients": sizes,
        "categories": category_rows(data),
        "ranks": _modules_by_rank(parts),
        "versions": {library: metadata.version(library) for library in LIBRARIES},
    }


def with_clients(facts: Mapping[str, Any], heard: Mapping[str, ClientFacts]) -> dict[str, Any]:
    """Return a run's facts on its data with what clients told of rows on their own machines."""
    sizes = {c: {"train": f.train, "eval": f.eval, "test": f.test} for c, f in heard.items()}
    told = {c: {"fingerprint": f.fingerprint, "target_tokens": f.target_tokens} for c, f in heard.items()}
    return {**facts, "clients": {**facts["clients"], **sizes}, "told": {**facts.get("told", {}), **told}}


def category_rows(data: FederatedData) -> dict[str, Any]:
    """Return the training rows of each client in each category: {names, rows: {client: {index of a name: rows}}}.

    Zeros are left out. Beyond MOST_CATEGORIES the last name is '(n others)'.
    """
    held = {c: Counter(data.records[row].category or NONE for row in rows.train) for c, rows in data.clients.items()}
    total = Counter[str]()
    for counted in held.values():
        total.update(counted)
    ranked = [name for name, _ in total.most_common()]
    kept = sorted(ranked if len(ranked) <= MOST_CATEGORIES else ranked[: MOST_CATEGORIES - 1])
    number = {name: i for i, name in enumerate(kept)}
    table: dict[str, dict[str, int]] = {}
    for client, counted in held.items():
        row = Counter[int]()
        for name, rows in counted.items():
            row[number.get(name, len(kept))] += rows
        table[client] = {str(i): row[i] for i in sorted(row)}
    others = [f"({len(ranked) - len(kept):,} others)"] if len(ranked) > len(kept) else []
    return {"names": [*kept, *others], "rows": table}


def _modules_by_rank(parts: Parts) -> dict[str, dict[str, int]]:
    """Return how many modules of each client begin with which rank; nothing where all clients have the same."""
    return {
        client: {str(rank): count for rank, count in sorted(Counter(own.values()).items())}
        for client, own in parts.setting.ranks.items()
    }


def run_facts(parts: Parts) -> dict[str, Any]:
    """Return what a reader wants to know before the first round."""
    tensors = parts.initial.tensors().values()
    return {
        "base": parts.base.name,
        "device": str(parts.base.device),
        "dtype": str(parts.base.dtype).removeprefix("torch."),
        "clients": len(parts.clients),
        "cohort": parts.sampler.size,
        "rounds": parts.experiment.federation.rounds,
        "train_rows": None if parts.apart else int(sum(len(c.train) for c in parts.data.clients.values())),
        "adapter_numbers": sum(t.numel() for t in tensors),
        "ranks": _kinds_of_clients(parts),
        "plan": parts.engine.plan,
        "processes": group.world(),
        "strategy": parts.strategy.name,
        "notes": list(parts.data.notes),
    }


def _kinds_of_clients(parts: Parts) -> list[tuple[str, int]]:
    """Return how many clients have which ranks ('8-48'), the most frequent first; nothing where all have the same."""
    named = Counter("-".join(map(str, sorted(set(own.values())))) for own in parts.setting.ranks.values())
    return named.most_common()


def round_line(report: RoundReport, state: ServerState) -> dict[str, Any]:
    """Return a round's line of the journal."""
    stages: dict[str, float] = {}
    for measured in report.clients.values():
        for stage, seconds in measured.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    clients = {
        name: {
            "loss": m.loss.value,
            "rows": m.rows,
            "steps": m.steps,
            "skipped_steps": m.skipped_steps,
            "processed_rows": m.processed_rows,
            "processed_tokens": m.processed_tokens,
        }
        | ({"why_skipped": m.why_skipped} if m.skipped_steps else {})
        for name, m in report.clients.items()
    }
    line = {
        "round": state.round,
        "cohort": list(report.cohort),
        "lr": report.lr,
        "train_loss": report.loss.value,
        "clients": clients,
        "absent": report.absences,
        "uplink_bytes": report.uplink_bytes,
        "downlink_bytes": report.downlink_bytes,
        "seconds": {"round": report.seconds, **stages},
        "adapter": state.hash(),
    }
    if group.several():
        line["processes"] = group.world()  # that shared it; seconds by stage are one's, on average
    if report.late:
        line["late"] = report.late
    if report.server:
        line["server"] = dict(report.server)
        line["seconds"] = {"round": report.seconds, "server": report.server_seconds, **stages}
    return line
