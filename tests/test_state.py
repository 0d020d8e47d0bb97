"""A state's file holds everything the next round depends on, and is never half-written."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, LoraPair
from sheepfold.errors import CheckpointError
from sheepfold.state import BatchPlan, Best, ServerState, load, save, write_atomic


def a_state(round: int = 3, seed: int = 0, memory: bool = True) -> ServerState:
    draw = torch.Generator().manual_seed(seed)
    pair = LoraPair(torch.randn(2, 5, generator=draw), torch.randn(4, 2, generator=draw), 8.0)
    return ServerState(
        round=round,
        adapter=Adapter({"layers.0.q_proj": pair}, {"score.weight": torch.randn(3, generator=draw)}),
        plan=BatchPlan(4, 8, 2048),
        drawn={"ann": 12, "bob": 3},
        memory={"momentum/layers.0.q_proj": torch.randn(2, 5, generator=draw)} if memory else {},
        best=Best("loss.weighted", 1.25, 2, 1),
    )


@given(st.integers(0, 10_000), st.integers(0, 2**31))
def test_what_was_saved_is_what_is_loaded(tmp_path_factory, round, seed):
    path = tmp_path_factory.mktemp("state") / "latest.safetensors"
    state = a_state(round, seed)
    save(state, path)
    again = load(path)
    assert again.adapter.hash() == state.adapter.hash()
    assert (again.round, again.plan, again.drawn, again.best) == (state.round, state.plan, state.drawn, state.best)
    assert Adapter(extra=again.memory).hash() == Adapter(extra=state.memory).hash()


@pytest.mark.parametrize("keep", [0, 1, 9, 200, -1])
def test_a_truncated_state_is_found_and_says_what_can_be_done(tmp_path, keep):
    path = tmp_path / "latest.safetensors"
    save(a_state(), path)
    save(a_state(2), tmp_path / "round-0002.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="--resume-from 0002"):
        load(path)


def test_an_altered_number_is_found(tmp_path):
    path = tmp_path / "latest.safetensors"
    save(a_state(), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="altered"):
        load(path)


def test_a_missing_state_and_somebody_elses_file_are_one_line_each(tmp_path):
    with pytest.raises(CheckpointError, match="no such state"):
        load(tmp_path / "latest.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a sheepfold state"):
        load(tmp_path / "other.safetensors")


def test_a_refused_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "latest.safetensors"
    save(a_state(1), path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(a_state(2), path)
    monkeypatch.undo()
    assert load(path).round == 1
    assert [p.name for p in Path(tmp_path).iterdir()] == ["latest.safetensors"]


def test_writing_makes_the_folders_it_needs(tmp_path):
    write_atomic(tmp_path / "a" / "b" / "c.json", b"{}")
    assert (tmp_path / "a" / "b" / "c.json").read_bytes() == b"{}"
