"""The plan follows from what stays the same between two runs on one machine."""

from dataclasses import replace
from typing import Any

import torch

from sheepfold.config import TrainSettings
from sheepfold.memory import BYTES_PER_NUMBER, total_memory
from sheepfold.needs import Need
from sheepfold.planning import ADAPTER_SHARE, batch_plan, fitted
from sheepfold.state import BatchPlan

CPU = torch.device("cpu")


def test_a_pass_holds_the_cohort_where_memory_allows():
    assert batch_plan(TrainSettings(), 1000, 12, CPU).clients_per_pass == 12
    fitting = int(total_memory(CPU) * ADAPTER_SHARE / BYTES_PER_NUMBER)
    assert batch_plan(TrainSettings(), fitting // 3, 12, CPU).clients_per_pass == 3
    assert batch_plan(TrainSettings(), fitting * 3, 12, CPU).clients_per_pass == 1


def test_what_is_asked_for_is_kept():
    plan = batch_plan(TrainSettings(clients_per_pass=5, batch_rows=8, micro_rows=2), 1000, 12, CPU)
    assert (plan.clients_per_pass, plan.micro_rows) == (5, 2)
    assert batch_plan(TrainSettings(batch_rows=8), 1000, 12, CPU).micro_rows == 8
    assert batch_plan(TrainSettings(engine="peft_model"), 1000, 12, CPU).clients_per_pass == 1


def test_two_plans_on_one_machine_are_equal():
    assert batch_plan(TrainSettings(), 10**6, 50, CPU) == batch_plan(TrainSettings(), 10**6, 50, CPU)


NEED = Need(
    base=0, numbers=1000, activations=lambda tokens, rows, again: (20 if again else 100) * tokens, longest=64,
    can_recompute=True,
)  # fmt: skip
"""100 bytes a token, 20 where blocks run again; 20,000 bytes a client"""


def fit(room: int, cohort: int = 16, *, grows: bool = False, **train: Any) -> BatchPlan:
    settings = TrainSettings(batch_rows=8, **train)
    return fitted(BatchPlan(cohort, 8, 1024), settings, cohort, NEED, room, grows=grows)


def test_forward_passes_get_smaller_where_memory_is_and_then_clients_fewer():
    ample = fit(10**7)
    assert (ample.clients_per_pass, ample.micro_tokens) == (16, 1024)
    assert fit(300_000).clients_per_pass == (300_000 - 100 * 1024) // NEED.client
    assert fit(60_000).micro_tokens == 256, "half of the room is for the clients"
    assert fit(27_000) == BatchPlan(1, 8, 64), "or what one client leaves"
    assert fit(300_000, clients_per_pass=16).clients_per_pass == 16, "what is asked for is kept"


def test_blocks_run_again_only_where_not_even_the_longest_row_fits_otherwise():
    assert fit(26_000) == BatchPlan(1, 8, 256, recompute=True), "and then forward passes are as large as fits"
    assert fit(26_000, gradient_checkpointing=False) == BatchPlan(1, 8, 64)
    assert fit(1000) == BatchPlan(1, 8, 64, recompute=True), "one client, and no row is longer: less there is not"
    useless = replace(NEED, activations=lambda tokens, rows, again: 100 * tokens)
    assert fitted(BatchPlan(16, 8, 1024), TrainSettings(), 16, useless, 1000, grows=False) == BatchPlan(1, 8, 64)
    unable = replace(NEED, can_recompute=False)
    assert fitted(BatchPlan(16, 8, 1024), TrainSettings(), 16, unable, 1000, grows=True) == BatchPlan(1, 8, 64)
    asked = BatchPlan(16, 8, 1024, recompute=True)
    settings = TrainSettings(gradient_checkpointing=True)
    assert fitted(asked, settings, 16, NEED, 10**7, grows=False) == asked, "what is asked for is kept"


def test_a_gpus_forward_passes_grow_up_to_all_rows_of_a_step():
    assert fit(10**8, grows=True).micro_tokens == 8192
    assert fit(10**8, cohort=2, grows=True).micro_tokens == 1024
    assert fit(500_000, grows=True).micro_tokens == 2048
    assert fit(10**8).micro_tokens == 1024


def test_nothing_is_cut_where_activations_are_not_known():
    unknown = Need(base=0, numbers=1000, activations=lambda tokens, rows, again: None, can_recompute=True)
    assert fitted(BatchPlan(4, 8, 1024), TrainSettings(), 4, unknown, 10**6, grows=True) == BatchPlan(4, 8, 1024)
