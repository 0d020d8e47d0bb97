"""Runs on an emulator that stopped go on with the same one, to the same bits."""

import multiprocessing
import os
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file

from sheepfold import simulation
from sheepfold.errors import CheckpointError
from tests.offsite import bases
from tests.offsite.bases import FULL, lines_of

WATCHED = {"stop.key": "loss.weighted"}


def test_a_run_that_died_before_its_first_state_goes_on_with_its_emulator(closed, lora, tmp_path, monkeypatch):
    experiment = bases.run_of(closed, tmp_path, **WATCHED)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(simulation, "evaluate", die)
        with pytest.raises(KeyboardInterrupt):
            simulation.run(experiment)
    folder = tmp_path / "runs" / "small" / "offsite" / "emulator"
    when = (folder / "model.safetensors").stat().st_mtime_ns
    outcome = simulation.run(experiment, resume=True)
    assert outcome.state.hash() == lora.state.hash()
    assert (folder / "model.safetensors").stat().st_mtime_ns == when


def test_more_rounds_later_are_the_bits_of_an_uninterrupted_run(closed, whole, tmp_path):
    first = simulation.run(bases.run_of(closed, tmp_path, **FULL, **{"federation.rounds": 1}))
    second = simulation.run(bases.run_of(closed, tmp_path, **FULL), resume=True)
    assert second.folder == first.folder
    assert second.state.hash() == whole.state.hash()
    assert [line["adapter"] for line in lines_of(second)] == [line["adapter"] for line in lines_of(whole)]


def die_in_round_1(folder, base):
    """Run until the first round is on disk, and kill the process there."""

    def listener(event, facts):
        if event == "round" and facts["round"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    simulation.run(bases.run_of(base, folder, **WATCHED), listener=listener)


def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(closed, lora, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=die_in_round_1, args=(tmp_path, closed))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    outcome = simulation.run(bases.run_of(closed, tmp_path, **WATCHED), resume=True)
    assert outcome.state.hash() == lora.state.hash()
    assert [line["adapter"] for line in lines_of(outcome)] == [line["adapter"] for line in lines_of(lora)]


def test_resuming_with_an_altered_emulator_or_another_full_model_is_refused(closed, tmp_path):
    base = shutil.copytree(closed, tmp_path / "base")
    experiment = bases.run_of(base, tmp_path, **{"federation.rounds": 1, "train.steps": 1})
    folder = simulation.run(experiment).folder
    shift(base / "model.safetensors", "model.layers.3.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match="the base's weights are not what the run began with"):
        simulation.run(experiment, resume=True)
    shift(folder / "offsite" / "emulator" / "model.safetensors", "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"emulator: model.norm.weight is not what was written"):
        simulation.run(experiment, resume=True)


def shift(file, name):
    tensors = load_file(file)
    tensors[name] += 1
    save_file(tensors, file, metadata={"format": "pt"})
