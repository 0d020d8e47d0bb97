"""How a cohort is cut into passes, from the memory the machine has.

    libraries + base + server's copies + clients x (numbers, gradients, moments, update) + activations  <=  memory

The plan decides floating-point sums, so it follows from things that stay the same between two runs on one machine
(its total memory, not what is free just now), and a resumed run keeps the plan it began with. What turns out too large
all the same is halved (halving.py).
"""

from dataclasses import replace

import torch

from sheepfold.config import TrainSettings
from sheepfold.memory import BYTES_PER_NUMBER, total_memory
from sheepfold.needs import Need
from sheepfold.state import BatchPlan

LIBRARIES = {"cpu": 1 << 30, "cuda": 1 << 29}
"""What a process takes before it has a model, allowed for: torch and transformers, or a CUDA context"""
MOST_GROUPS = 1023
"""Clients that a GPU's grouped products take at most"""
USABLE = 0.9
"""Share of the memory that a plan fills; the rest is for what allocators waste"""
ADAPTER_SHARE = 0.25
"""Share of the memory that the stacked adapters of a pass may fill at most"""
MICRO_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Most tokens in a forward pass: on a CPU what stays in its caches and pads little, on a GPU what fills it."""
MOST_MICRO_TOKENS = 65536
"""Where a GPU's forward passes stop to grow with its memory"""


def batch_plan(
    train: TrainSettings, adapter_numbers: int, cohort: int, device: torch.device, need: Need | None = None
) -> BatchPlan:
    """Return the plan for cohorts of this size and adapters of this many numbers.

    need: what training takes beside the adapters; None: what is left of the memory will do for it.
    """
    total = total_memory(device)
    fitting = int(total * ADAPTER_SHARE / (BYTES_PER_NUMBER * max(1, adapter_numbers)))
    clients = train.clients_per_pass or max(1, fitting)
    most = MOST_GROUPS if device.type == "cuda" else cohort
    plan = BatchPlan(
        clients_per_pass=1 if train.engine in ("peft_model", "zeroth_order") else min(clients, cohort, most),
        micro_rows=train.micro_rows or train.batch_rows,
        micro_tokens=MICRO_TOKENS.get(device.type, MICRO_TOKENS["cpu"]),
        recompute=bool(train.gradient_checkpointing),
    )
    if need is None or train.engine != "cohort":
        return plan
    libraries = LIBRARIES.get(device.type, LIBRARIES["cpu"])
    room = int(total * USABLE) - libraries - need.base - need.server
    return fitted(plan, train, cohort, need, room, grows=device.type == "cuda")


def fitted(plan: BatchPlan, train: TrainSettings, cohort: int, need: Need, room: int, *, grows: bool) -> BatchPlan:
    """Return the plan with forward passes, and then as many clients, as fit into `room` bytes.

    Where the longest row alone does not fit, blocks run again in the backward pass, if they can and may. grows: whether
    forward passes become larger where there is room, up to all rows of a step.
    """

    def fits(tokens: int) -> bool:
        """Whether forward passes of so many tokens leave half of the room to the clients, and enough for one."""
        taken = need.activations(tokens, train.batch_rows * cohort, plan.recompute)
        return taken is None or taken <= min(room / 2, room - need.client)

    tokens = plan.micro_tokens
    if grows:
        step = train.batch_rows * cohort * need.longest
        known = need.activations(tokens, 1, plan.recompute) is not None
        while known and tokens < min(step, MOST_MICRO_TOKENS) and fits(2 * tokens):
            tokens *= 2
    while tokens > need.longest and not fits(tokens):
        tokens = max(need.longest, tokens // 2)
    may = need.can_recompute and train.gradient_checkpointing is None and not plan.recompute
    if may and tokens <= need.longest and _too_long(need, tokens, room):
        return fitted(replace(plan, recompute=True), train, cohort, need, room, grows=grows)
    plan = replace(plan, micro_tokens=tokens)
    if train.clients_per_pass is None:
        left = room - (need.in_a_pass(plan) or 0)
        plan = replace(plan, clients_per_pass=max(1, min(plan.clients_per_pass, left // max(1, need.client))))
    return plan


def _too_long(need: Need, tokens: int, room: int) -> bool:
    """Return whether one row of one client takes more than there is, and less where blocks run again."""
    kept, again = (need.activations(tokens, 1, recompute) for recompute in (False, True))
    return kept is not None and again is not None and again < kept and need.client + kept > room
