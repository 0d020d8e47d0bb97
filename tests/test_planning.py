"""The plan follows from what stays the same between two runs on one machine."""

import torch

from sheepfold.config import TrainSettings
from sheepfold.planning import ADAPTER_SHARE, BYTES_PER_NUMBER, batch_plan, total_memory

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
