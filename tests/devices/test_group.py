"""Which process this is, and what it takes of its machine."""

import sys
from dataclasses import replace

import pytest
import torch

from sheepfold import cli
from sheepfold.config import dump
from sheepfold.devices import group, place
from sheepfold.devices.engine import smallest
from sheepfold.devices.team import failure, named
from sheepfold.errors import ConfigError, DataError, TrainingError
from sheepfold.models import pick_device
from sheepfold.state import BatchPlan
from tests.runs import experiment


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


def test_without_torchrun_a_process_is_the_first_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (group.rank(), group.world(), group.local_rank(), group.local_world()) == (0, 1, 0, 1)
    assert group.is_main()
    assert not group.several()


def test_torchrun_says_which_process_this_is(second_of_two, monkeypatch):
    assert (group.rank(), group.world(), group.local_rank(), group.local_world()) == (1, 2, 1, 2)
    assert not group.is_main()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match=r"\$RANK is 'one', expected a number"):
        group.rank()


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as choosing one goes; returns those that were chosen."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_has_its_own_gpu(name, second_of_two, gpus):
    assert pick_device(name) == torch.device("cuda", 1)
    assert gpus == [1]


def test_processes_do_not_share_a_gpu(second_of_two, gpus, monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device 'cuda:0': 2 processes would share it; set auto, or cpu"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="this machine has 3 processes and 2 GPUs; start as many"):
        pick_device("auto")


@pytest.mark.parametrize(("said", "torchrun", "expected"), [("1", True, 2), ("3", True, 3), ("1", False, 3)])
def test_a_process_takes_its_share_of_the_cores_where_torchrun_says_one(said, torchrun, expected, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(group, "cores", lambda: 4)
    try:
        torch.set_num_threads(3)
        place.take_threads()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_run_on_flower_is_not_started_by_torchrun(tmp_path, monkeypatch, capsys):
    file = tmp_path / "experiment.yaml"
    file.write_text(dump(experiment(tmp_path)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["sheepfold", "run", str(file), "--on", "flower"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = "--on flower: clients train on machines of their own; start this without torchrun"
    assert capsys.readouterr().err == f"sheepfold: {said}\n"


def test_a_plan_that_several_processes_halved_is_the_smallest_of_each_bound():
    ours, theirs = BatchPlan(2, 8, 512), BatchPlan(4, 4, 1024, judged_rows=16)
    assert smallest(ours, theirs) == smallest(theirs, ours) == BatchPlan(2, 4, 512, judged_rows=16)
    assert smallest(replace(ours, recompute=True), theirs).recompute
    assert smallest(ours, ours) == ours


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 GiB"), MemoryError()]
)
def test_a_cpu_that_is_full_in_another_process_is_out_of_memory_here(error):
    found = failure(1, *named(error))
    assert isinstance(found, torch.OutOfMemoryError)
    assert str(error) in str(found)
    assert named(RuntimeError("a shape"))[0] == "RuntimeError"


def test_what_another_process_failed_with_is_raised_here_with_its_place(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert failure(1, "DataError", "no file").args == ("process 1 of 2: no file",)
    assert isinstance(failure(1, "DataError", "no file"), DataError)
    assert isinstance(failure(1, "OutOfMemoryError", "no room"), torch.OutOfMemoryError)
    assert str(failure(1, "KeyError", "'a'")) == "process 1 of 2: 'a' (KeyError); its traceback is above"
    assert isinstance(failure(1, "KeyError", "'a'"), TrainingError)
