"""Trackers: TensorBoard, Weights & Biases and MLflow, each fed from a run's journal file.

    rounds.jsonl, closing.json, eval/*.json ── follower ── one of the three;  tracking/<name>.json: what was sent

The loop of rounds knows of none of them. This file is light, since the experiment file is checked with it.
"""

from collections.abc import Mapping, Sequence

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("dir",),
    "wandb": ("project", "dir", "entity", "mode"),
    "mlflow": ("project", "dir", "uri"),
}
"""tracker -> the arguments that it takes"""
MODES = ("online", "offline")
"""Where Weights & Biases sends to: its server, or a folder."""


def check_arguments(names: Sequence[str], arguments: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ValueError for arguments of a tracker that is not asked for, or that it does not take."""
    for name, own in arguments.items():
        if name not in names:
            raise ValueError(f"tracker_args.{name} has no effect without trackers: [{name}]; add it, or remove this")
        for key in own.keys() - set(ARGUMENTS[name]):
            raise ValueError(f"tracker_args.{name}.{key} is unknown; {name} takes {', '.join(ARGUMENTS[name])}")
    if (mode := arguments.get("wandb", {}).get("mode", MODES[0])) not in MODES:
        raise ValueError(f"tracker_args.wandb.mode is {mode!r}; it is {' or '.join(MODES)}")
    if {"dir", "uri"} <= arguments.get("mlflow", {}).keys():
        raise ValueError("tracker_args.mlflow: dir and uri are both set; keep one of them")
    if len(set(names)) < len(names):
        raise ValueError(f"trackers {list(names)} names one twice")
