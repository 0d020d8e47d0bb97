"""Federated fine-tuning of large language models: data stays in its fold, only adapters travel.

    import sheepfold

    experiment = sheepfold.load("experiment.yaml", ["federation.rounds=3"])
    outcome = sheepfold.run(experiment)
    print(outcome.closing, outcome.adapter.hash())

Names load when they are first used, since importing torch alone takes a second.
"""

import importlib
from typing import Any

_HOMES = {
    "Absence": "messages",
    "Adapter": "adapter",
    "AdapterMismatch": "errors",
    "Assignment": "messages",
    "Base": "models",
    "BatchPlan": "state",
    "CheckpointError": "errors",
    "ClientStore": "local.store",
    "CohortEngine": "engines.cohort",
    "CohortModel": "engines.injection",
    "ConfigError": "errors",
    "DataError": "errors",
    "Experiment": "config",
    "FederatedData": "data.rows",
    "LocalRule": "local.rules",
    "LoraPair": "adapter",
    "Mean": "metrics",
    "Measurements": "messages",
    "ModelError": "errors",
    "Outcome": "simulation",
    "Parts": "assembly",
    "PeftModelEngine": "engines.peft_model",
    "Record": "data.rows",
    "RoundReport": "rounds",
    "ServerState": "state",
    "Setting": "state",
    "SheepfoldError": "errors",
    "SparseDelta": "adapter",
    "Strategy": "strategies.base",
    "TokenRows": "data.rows",
    "TrainingError": "errors",
    "Update": "messages",
    "ZerothOrderEngine": "engines.zeroth_order",
    "assemble": "assembly",
    "build": "config",
    "fed_sb": "strategies.fed_sb",
    "fedadagrad": "strategies.fedopt",
    "fedadam": "strategies.fedopt",
    "fedavg": "strategies.fedavg",
    "fedavgm": "strategies.fedopt",
    "fedex": "strategies.fedex",
    "fedit": "strategies.fedavg",
    "fedkseed": "strategies.fedkseed",
    "fedopt": "strategies.fedopt",
    "fedprox": "strategies.fedprox",
    "fedsa": "strategies.fedsa",
    "fedyogi": "strategies.fedopt",
    "ffa_lora": "strategies.ffa_lora",
    "finetune": "finetuning",
    "flexlora": "strategies.flexlora",
    "flora": "strategies.flora",
    "heterolora": "strategies.heterolora",
    "hetlora": "strategies.hetlora",
    "load": "config",
    "load_base": "models",
    "prepare": "data.prepare",
    "read_peft": "peft_io",
    "rolora": "strategies.rolora",
    "run": "simulation",
    "scaffold": "strategies.scaffold",
    "slora": "strategies.slora",
    "write_peft": "peft_io",
}
"""Public name -> the module that defines it."""

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sheepfold' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sheepfold.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
