"""What a run writes down and tells: its data, its start, and each round, as plain values."""

from collections import Counter
from typing import Any

from sheepfold.assembly import Parts
from sheepfold.rounds import RoundReport
from sheepfold.state import ServerState


def data_facts(parts: Parts) -> dict[str, Any]:
    """Return what the data amounts to: enough to tell whether two runs saw the same."""
    data = parts.data
    sizes = {c: {"train": len(r.train), "eval": len(r.eval), "test": len(r.test)} for c, r in data.clients.items()}
    return {
        "fingerprint": data.fingerprint,
        "base": parts.base.fingerprint,
        "records": len(data.records),
        "labels": list(data.labels),
        "holdout": len(data.holdout),
        "dropped": dict(data.dropped),
        "notes": list(data.notes),
        "tokens_from_cache": data.tokens_from_cache,
        "clients": sizes,
    }


def run_facts(parts: Parts) -> dict[str, Any]:
    """Return what a reader wants to know before the first round."""
    tensors = parts.initial.tensors().values()
    return {
        "base": parts.base.name,
        "device": str(parts.base.device),
        "dtype": str(parts.base.dtype).removeprefix("torch."),
        "clients": len(parts.data.clients),
        "cohort": parts.sampler.size,
        "rounds": parts.experiment.federation.rounds,
        "train_rows": int(sum(len(c.train) for c in parts.data.clients.values())),
        "adapter_numbers": sum(t.numel() for t in tensors),
        "ranks": _kinds_of_clients(parts),
        "plan": parts.engine.plan,
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
    return {
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
