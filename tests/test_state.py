"""A state's file holds everything the next round depends on, and is never half-written."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, LoraPair, SparseDelta, from_delta
from sheepfold.errors import CheckpointError
from sheepfold.state import BatchPlan, Best, ServerState, Setting, load, save, write_atomic


def a_state(round: int = 3, seed: int = 0, memory: bool = True) -> ServerState:
    draw = torch.Generator().manual_seed(seed)
    pair = LoraPair(torch.randn(2, 5, generator=draw), torch.randn(4, 2, generator=draw), 8.0)
    return ServerState(
        round=round,
        adapter=Adapter({"layers.0.q_proj": pair}, {"score.weight": torch.randn(3, generator=draw)}),
        plan=BatchPlan(4, 8, 2048),
        drawn={"ann": 12, "bob": 3},
        counted={"ann": 3},
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
    assert again.counted == state.counted
    assert Adapter(extra=again.memory).hash() == Adapter(extra=state.memory).hash()


def with_everything(seed: int = 0) -> ServerState:
    """A state with each kind of change in its adapter, and a side of every shape that a side can have."""
    draw = torch.Generator().manual_seed(seed)
    state = a_state(seed=seed)
    cored = LoraPair(torch.randn(2, 5, generator=draw), torch.randn(4, 2, generator=draw), 8.0, torch.randn(2, 2))
    sparse = SparseDelta(torch.randn(3, generator=draw), torch.tensor([0, 7, 19]), (4, 5))
    adapter = Adapter(dict(state.adapter.pairs) | {"a.cored": cored}, state.adapter.extra, {"a.sparse": sparse})
    thin = LoraPair(torch.randn(1, 5, generator=draw), torch.randn(4, 1, generator=draw), 1.0)
    side = Adapter({"a.cored": thin, "layers.0.q_proj": from_delta(torch.randn(4, 5, generator=draw))})
    return replace(state, adapter=adapter, side=side)


@given(st.integers(0, 2**31))
def test_cores_sparse_deltas_and_sides_are_loaded_as_they_were_saved(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("state") / "latest.safetensors"
    state, setting = with_everything(seed), Setting(seed=7, clients=("ann",))
    save(state, path)
    again = load(path, setting)
    assert again.hash() == state.hash()
    assert again.adapter.hash() == state.adapter.hash()
    assert again.side.hash() == state.side.hash()
    assert again.adapter.sparse["a.sparse"].shape == (4, 5)
    assert again.adapter.sparse["a.sparse"].positions.dtype == torch.int64
    assert again.setting is setting, "what follows from the experiment is not saved"
    assert again.whole().hash() == state.whole().hash()


def test_all_that_was_learned_is_side_and_adapter_together():
    state = with_everything()
    whole = state.whole()
    assert whole.pairs.keys() == {"layers.0.q_proj", "a.cored", "a.sparse"}
    assert not whole.sparse
    for path, pair in whole.pairs.items():
        expected = torch.zeros(4, 5, dtype=torch.float64)
        for part in (state.side.pairs, state.adapter.pairs, state.adapter.sparse):
            expected += part[path].delta() if path in part else 0
        torch.testing.assert_close(pair.delta(), expected, atol=1e-5, rtol=1e-5)
        assert pair.core is None
    assert torch.equal(whole.extra["score.weight"], state.adapter.extra["score.weight"])
    assert a_state().whole().hash() == a_state().adapter.hash(), "without a side: the adapter, to the bit"


def test_the_hash_of_a_state_sees_its_side():
    state = a_state()
    thin = LoraPair(torch.ones(1, 5), torch.zeros(4, 1), 1.0)
    hashes = {state.hash()}
    for side in (Adapter({"q": thin}), Adapter({"v": thin}), Adapter({"q": replace(thin, B=torch.ones(4, 1))})):
        hashes.add(replace(state, side=side).hash())
    assert len(hashes) == 4
    assert replace(state, memory={}).hash() == state.hash(), "a hash of what was learned"
    assert state.hash() == state.adapter.hash()


def test_an_altered_side_is_found(tmp_path):
    path = tmp_path / "latest.safetensors"
    state = replace(with_everything(), memory={})
    save(state, path)
    content = bytearray(path.read_bytes())
    content[content.rindex(state.side.pairs["a.cored"].A.numpy().tobytes())] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="altered"):
        load(path)


def test_a_round_keeps_what_it_does_not_replace():
    state = with_everything()
    after = state.advance(Adapter())
    assert (after.round, after.side, after.memory, after.setting) == (4, state.side, state.memory, state.setting)
    assert state.advance(Adapter(), memory={}, side=Adapter()).side.pairs == {}
    assert state.advance(Adapter(), memory={}).memory == {}


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


def test_a_state_of_the_format_before_goes_on_from_what_clients_had_kept(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save as serialise

    path = tmp_path / "latest.safetensors"
    save(a_state(), path)
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["sheepfold"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del head["counted"]
    path.write_bytes(serialise(tensors, metadata={"sheepfold": json.dumps({**head, "format": 2})}))
    assert load(path).counted == {"ann": 3, "bob": 3}
