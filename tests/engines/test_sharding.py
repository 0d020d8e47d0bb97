"""Processes that train one client together reach what one reaches, and none has the whole model.

One start of two processes does several cases of FSDP; DeepSpeed can be set up once in a process, and skips where it is
not.
"""

import importlib.util
import json
from typing import Any

import pytest

from sheepfold import assembly, simulation
from sheepfold.config import build, dump
from sheepfold.errors import ConfigError
from tests.devices.together import ended, start
from tests.engines.spread import CASES
from tests.runs import experiment
from tests.test_cli import typed

FSDP = [name for name, asked in CASES.items() if asked["sharding"] == "fsdp"]
ZERO = [name for name, asked in CASES.items() if asked["sharding"] == "deepspeed"]


def told(*cases: str) -> dict[str, dict[str, Any]]:
    """Return what two processes told of these cases."""
    [(code, out, err), (other, _, more)] = ended(start(["-m", "tests.engines.spread", *cases], 2), timeout_s=300)
    assert (code, other) == (0, 0), (err + more)[-3000:]
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return {line["what"]: line for line in lines}


@pytest.fixture(scope="module")
def cut() -> dict[str, dict[str, Any]]:
    """What two processes told of every case of FSDP."""
    return told(*FSDP)


@pytest.mark.slow
@pytest.mark.parametrize("what", [case for case in FSDP if case != "overflow"])
def test_two_processes_with_half_of_the_model_each_are_one(cut, what):
    found = cut[what]
    close = 1e-10 if "dtype" in CASES[what] else 5e-5
    assert found["gap"] < close
    assert found["loss"] < close
    assert found["score"] < close
    assert found["answers"], "generated answers differ"


@pytest.mark.slow
@pytest.mark.parametrize("what", FSDP)
def test_each_process_holds_half_of_the_numbers(cut, what):
    found = cut[what]
    assert "DTensor" in found["kinds"]
    assert found["held"] == pytest.approx(found["of"] / 2, rel=0.01)


@pytest.mark.slow
def test_a_step_that_overflows_is_left_out_in_all_processes_alike(cut):
    ours, alone = cut["overflow"]["skipped"], cut["overflow"]["reasons"]
    assert ours[0] == ours[1]
    assert alone[0] == alone[1]
    assert any(map(any, ours)) or any(alone[0]), "nothing overflowed"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("what", ZERO)
def test_zero_in_two_processes_is_one_process_without_it(what):
    found = told(what)[what]
    if "overflow" in what:
        assert found["skipped"][0] == found["skipped"][1] == [3, 3]
        return
    assert max(found["gap"], found["loss"], found["score"]) < 5e-5
    assert found["answers"], "generated answers differ"
    assert found["held"] == pytest.approx(found["of"] / 2, rel=0.02)


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"evaluation.tasks": ["gsm8k"]}, "evaluation.tasks needs the whole model in one process"),
        ({"adapter": {"method": "prompt", "options": {"num_virtual_tokens": 4}}}, "adapter.method prompt_tuning needs"),
        ({"federation.strategy": "fed_sb"}, "federation.strategy fed_sb needs the whole model"),
        (
            {"adapter": {"method": "full"}, "federation.strategy": "fedprox", "federation.strategy_args": {"mu": 0.1}},
            "looks at whole weights",
        ),
    ],
)
def test_what_needs_the_whole_model_is_refused_before_it_loads(tmp_path, two, over, says):
    asked = experiment(tmp_path, **{"adapter": {"rank": 4}, "train.sharding": "fsdp", **over})
    with pytest.raises(ConfigError, match=says) as found:
        assembly.check(asked)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"stages": 2}, "sharding_args.stages: no such option; did you mean 'stage'"),
        ({"stage": 0}, "found 0, expected 1, 2 or 3"),
        ({"stage": 2, "offload_param": "cpu"}, "weights are cut in stage 3 alone"),
        ({"offload_optimizer": "disk"}, "found 'disk', expected cpu"),
        ({"stage": 2, "config": "ds.json"}, "config and stage are both set"),
    ],
)
def test_a_wrong_option_of_deepspeed_is_one_line(tmp_path, two, args, says):
    asked = experiment(tmp_path, **{"train.sharding": "deepspeed", "train.sharding_args": args})
    with pytest.raises(ConfigError, match=says):
        assembly.check(asked)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}}, "optimizer is what train.optimizer says"),
        ({}, "no zero_optimization section"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param to nvme"),
    ],
)
def test_a_file_of_deepspeed_says_nothing_that_the_run_says(tmp_path, two, options, says):
    (tmp_path / "ds.json").write_text(json.dumps(options))
    args = {"config": str(tmp_path / "ds.json")}
    asked = experiment(tmp_path, **{"train.sharding": "deepspeed", "train.sharding_args": args})
    with pytest.raises(ConfigError, match=says):
        assembly.check(asked)


def test_deepspeed_refuses_half_precision_before_a_model_is_loaded(tmp_path, two):
    asked = experiment(tmp_path, **{"train.sharding": "deepspeed", "model": {"dtype": "float16"}})
    with pytest.raises(ConfigError, match=r"it trains float32 or bfloat16, found model\.dtype float16"):
        assembly.check(asked)


def test_sharding_alone_is_told_to_use_torchrun(tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "foundation", None)
    with pytest.raises(ConfigError, match="there is one process; start one a device with torchrun"):
        simulation.run(experiment(tmp_path, **{"train.sharding": "fsdp"}))
    assert not (tmp_path / "runs").exists()


def test_a_plan_of_a_sharded_run_needs_no_torchrun_and_says_whose_bytes_it_counts(tmp_path, capsys):
    file = tmp_path / "experiment.yaml"
    file.write_text(dump(experiment(tmp_path, **{"train.sharding": "fsdp", "adapter": {"method": "full"}})))
    code, out, err = typed(capsys, "plan", file)
    assert code == 0, err
    said = " ".join(out.split())
    assert "of a whole model; each process has its share" in said
    assert "at its peak" not in said
    assert json.loads(typed(capsys, "plan", file, "--json")[1])["peak_bytes"] is None


def test_under_torchrun_the_first_process_alone_prints_the_plan(tmp_path, capsys, two, monkeypatch):
    file = tmp_path / "experiment.yaml"
    file.write_text(dump(experiment(tmp_path, **{"train.sharding": "fsdp"})))
    assert "what this run would do" in typed(capsys, "plan", file)[1]
    monkeypatch.setenv("RANK", "1")
    assert typed(capsys, "plan", file) == (0, "", "")


@pytest.mark.parametrize("what", ["plan --calibrate", "finetune"])
def test_a_run_alone_is_shared_by_processes(tmp_path, capsys, monkeypatch, what):
    file = tmp_path / "experiment.yaml"
    file.write_text(dump(experiment(tmp_path, **{"train.sharding": "fsdp"})))
    words = ["plan", file, "--calibrate"] if what.startswith("plan") else ["finetune", file, tmp_path / "out"]
    said = f"sheepfold: {what}: train.sharding fsdp is for `sheepfold run` alone; set train.sharding=none\n"
    assert typed(capsys, *words) == (2, "", said)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = f"sheepfold: {what}: `sheepfold run` alone is shared by processes; start this without torchrun\n"
    assert typed(capsys, *words, "train.sharding=none") == (2, "", said)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"sharding": "fsdp", "engine": "cohort"}, "sharding fsdp has no effect in engine cohort"),
        ({"sharding": "fsdp", "batch_devices": ["cpu", "cpu"]}, "are both set"),
        ({"sharding": "fsdp", "sharding_args": {"stage": 2}}, "sharding_args has no effect with sharding fsdp"),
        ({"batch_devices": ["cpu"]}, "batch_devices has cpu alone"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(train, says):
    with pytest.raises(ConfigError, match=says):
        build({"train": train})
