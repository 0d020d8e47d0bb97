"""How a cohort is cut into passes, from the memory the machine has.

The plan decides floating-point sums, so it follows from things that stay the same between two runs on one machine
(its total memory, not what is free just now), and a resumed run keeps the plan it began with.
"""

import os

import torch

from sheepfold.config import TrainSettings
from sheepfold.state import BatchPlan

BYTES_PER_NUMBER = 16
"""An adapter number in training: itself, its gradient, and two moments, in float32."""
ADAPTER_SHARE = 0.25
"""Share of the memory that the stacked adapters of a pass may fill; the base and activations get the rest."""
MICRO_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Most tokens in a forward pass: on a CPU what stays in its caches and pads little, on a GPU what fills it."""


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory that the device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def batch_plan(train: TrainSettings, adapter_numbers: int, cohort: int, device: torch.device) -> BatchPlan:
    """Return the plan for cohorts of this size and adapters of this many numbers."""
    fitting = int(total_memory(device) * ADAPTER_SHARE / (BYTES_PER_NUMBER * max(1, adapter_numbers)))
    clients = train.clients_per_pass or max(1, fitting)
    return BatchPlan(
        clients_per_pass=1 if train.engine in ("peft_model", "zeroth_order") else min(clients, cohort),
        micro_rows=train.micro_rows or train.batch_rows,
        micro_tokens=MICRO_TOKENS.get(device.type, MICRO_TOKENS["cpu"]),
    )
