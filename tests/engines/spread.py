"""One of several processes that train one client together: python -m tests.engines.spread WHAT... trains each WHAT.

Started with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them. The first one prints a JSON line
for each: how far it is from one process by itself, and what this process holds.
"""

import json
import sys
from typing import Any

import numpy as np
import torch

from sheepfold.adapter import Adapter
from sheepfold.config import AdapterSettings, GenerationSettings, TrainSettings
from sheepfold.devices import group
from sheepfold.engines.deepspeed import ZeroEngine
from sheepfold.engines.lockstep import LockstepEngine
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.engines.sharding import ShardedEngine
from sheepfold.local import rules
from sheepfold.local.rules import LocalRule
from sheepfold.messages import Update
from sheepfold.state import BatchPlan
from tests import small

CASES: dict[str, dict[str, Any]] = {
    "lora": {"sharding": "fsdp", "dtype": torch.float64, "ranks": (4, 2), "dropout": 0.2},
    "lora float32": {"sharding": "fsdp", "ranks": (4, 4), "steps": 20},
    "penalty": {"sharding": "fsdp", "dtype": torch.float64, "ranks": (4, 4), "rule": "proximal"},
    "ia3": {"sharding": "fsdp", "method": "ia3", "dtype": torch.float64},
    "full": {"sharding": "fsdp", "method": "full", "dtype": torch.float64},
    "full float32": {"sharding": "fsdp", "method": "full", "steps": 20},
    "correction": {"sharding": "fsdp", "method": "full", "dtype": torch.float64, "rule": "correction"},
    "zero 1": {"sharding": "deepspeed", "ranks": (4, 4), "stage": 1},
    "zero 2": {"sharding": "deepspeed", "method": "full", "stage": 2},
    "zero 3": {"sharding": "deepspeed", "method": "full", "stage": 3},
    "zero 3 lora": {"sharding": "deepspeed", "ranks": (4, 4), "stage": 3},
    "overflow": {"sharding": "fsdp", "method": "full", "lr": 1e30, "steps": 4},
    "zero overflow": {"sharding": "deepspeed", "method": "full", "stage": 3, "lr": 1e30, "steps": 4},
}


def corrected(assignment: Any, own: Any) -> dict[str, torch.Tensor]:
    """Return a correction of every tensor, unlike from place to place."""
    return {n: torch.linspace(-1e-3, 1e-3, t.numel()).view_as(t).to(t) for n, t in assignment.adapter.tensors().items()}


RULES = {"": None, "proximal": rules.local_rule("proximal", {"mu": 0.5}), "correction": LocalRule(
    correction=corrected, mean_gradient=True)}  # fmt: skip


def case(what: str) -> None:
    """Train a case, and in the first process also without the others."""
    asked = {"dtype": torch.float32, "method": "lora", "rule": "", "steps": 4, "lr": 1e-3, "dropout": 0.0} | CASES[what]
    spread: dict[str, Any] = {"sharding": asked["sharding"]}
    if "stage" in asked:
        spread["sharding_args"] = {"stage": asked["stage"]}
    alone = None
    if group.is_main():  # before DeepSpeed, under which transformers waits for other processes when it generates
        engine = _engine(PeftModelEngine, small.model(asked["dtype"]), asked, {})
        alone = _done(engine, asked, engine.initial() if asked["method"] != "lora" else None)
    kind = ZeroEngine if asked["sharding"] == "deepspeed" else ShardedEngine
    model = small.model(asked["dtype"])
    engine = _engine(kind, model, asked, spread, device=torch.device("cpu"))
    fresh = engine.initial() if asked["method"] != "lora" else None
    if not group.is_main():
        engine.serve()
        return
    found = _done(engine, asked, fresh)
    told = {"kinds": sorted({type(p).__name__ for p in model.parameters()}), **_held(engine)}
    engine.close()
    assert alone is not None
    told |= _compared(found, alone)
    print(json.dumps({"what": what, **told}), flush=True)


def _engine(kind: Any, model: Any, asked: dict[str, Any], spread: dict[str, Any], **more: Any) -> Any:
    train = TrainSettings(
        engine="peft_model", steps=asked["steps"], batch_rows=5, micro_rows=2, lr=asked["lr"], grad_norm=0.5, **spread
    )
    method = AdapterSettings(method=asked["method"], dropout=asked["dropout"])
    sites = list(small.sites(model)) if asked["method"] == "lora" else []
    rest = {"seed": 1, "plan": BatchPlan(1, 2, 120), "rule": RULES[asked["rule"]], **more}
    return kind(model, sites, small.tokens(), small.client_rows(), train, method, **rest)


def _done(engine: Any, asked: dict[str, Any], fresh: Adapter | None) -> tuple[Any, ...]:
    """Return updates, a score and an answer."""
    base = small.model(asked["dtype"])
    ranks = dict(zip(("ann", "bob"), asked.get("ranks", (4, 4)), strict=True))
    starts = {c: fresh or small.adapter(base, r, r, dtype=asked["dtype"]) for c, r in ranks.items()}
    answers = list(engine.train(small.assignments(starts, lr=asked["lr"])))
    shown = next((a.adapter for a in answers if isinstance(a, Update)), next(iter(starts.values())))
    rows = np.arange(10)
    settings = GenerationSettings(max_new_tokens=6)
    return answers, engine.scores([shown], [(0, rows)], 4), engine.generate([shown], [(0, rows[:3])], settings, 0, [2])


def _held(engine: LockstepEngine) -> dict[str, int]:
    """Return how many numbers of the model this process holds, and of how many."""
    if isinstance(engine, ZeroEngine):
        inner = engine.zero.engine.optimizer.optimizer
        held = sum(v.numel() for state in inner.state.values() for key, v in state.items() if key == "exp_avg")
        return {"held": held, "of": sum(getattr(p, "ds_numel", p.numel()) for p in engine.zero.factors().values())}
    cut = [p for p in engine.carrier.model.parameters() if hasattr(p, "to_local")]
    return {"held": sum(p.to_local().numel() for p in cut), "of": sum(p.numel() for p in cut)}


def _compared(found: tuple[Any, ...], expected: tuple[Any, ...]) -> dict[str, Any]:
    pairs = [(a, b) for a, b in zip(found[0], expected[0], strict=True) if isinstance(a, Update)]
    return {
        "gap": max((small.gap(a.adapter, b.adapter) for a, b in pairs), default=None),
        "loss": max((abs(a.measurements.loss.value - b.measurements.loss.value) for a, b in pairs), default=None),
        "score": abs(found[1][0].loss.value - expected[1][0].loss.value),
        "answers": found[2] == expected[2],
        "reasons": [[getattr(a, "reason", "") for a in side[0]] for side in (found, expected)],
        "skipped": [
            [a.measurements.skipped_steps for a in side[0] if isinstance(a, Update)] for side in (found, expected)
        ],
    }


if __name__ == "__main__":
    with small.quick(), group.joined():
        for name in sys.argv[1:]:
            case(name)
