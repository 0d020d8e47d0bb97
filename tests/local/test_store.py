"""What clients keep from round to round: the right version for every round, for every name, and only on disk."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.errors import CheckpointError
from sheepfold.local.store import LONGEST_NAME, ClientStore, folder_name


@pytest.fixture(autouse=True, scope="module")
def _without_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def of(number: float) -> dict[str, torch.Tensor]:
    """Return something to keep, with a number to know it by."""
    return {"own/layers.0.q_proj/B": torch.full((3, 2), float(number)), "step": torch.tensor([round(number)])}


def found(store: ClientStore, client: str, round: int) -> float | None:
    """Return the number of what a client had after a round; None: nothing."""
    kept = store.get(client, round)
    assert not kept or kept.keys() == of(0).keys()
    return float(kept["own/layers.0.q_proj/B"][0, 0]) if kept else None


def files(store: ClientStore) -> set[str]:
    return {str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file()}


def test_a_client_has_at_every_round_what_it_kept_last():
    store = ClientStore()
    for round in (2, 3, 7):
        store.put("ann", round, of(round))
    assert [found(store, "ann", r) for r in range(10)] == [None, None, 2, 3, 3, 3, 3, 7, 7, 7]
    assert found(store, "bob", 9) is None
    store.put("ann", 3, of(33))
    assert found(store, "ann", 4) == 33


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), unique=True), st.lists(st.integers(0, 12), min_size=1), st.integers(0, 12))
def test_pruning_leaves_every_kept_round_and_all_later_ones_what_they_had(put, kept, last):
    """The law: whatever a saved state, or a round after the newest of them, would read, it still reads."""
    store = ClientStore()
    for round in put:
        store.put("ann", round, of(round))
        store.put("ann-2", round, of(100 + round))
    asked = [*kept, *range(max([*kept, *put]), 14)]
    before = [found(store, "ann", r) for r in asked]
    store.prune(["ann", "never-took-part"], kept)
    assert [found(store, "ann", r) for r in asked] == before
    assert len(list(store.folder.glob("ann/*"))) <= len(set(kept)) + 1, "at most one file a kept round, and the newest"
    assert [found(store, "ann-2", r) for r in put] == [100 + r for r in put], "others are left alone"
    store.rewind(last)
    assert all(int(Path(file).stem) <= last for file in files(store))
    assert [found(store, "ann-2", r) for r in put if r <= last] == [100 + r for r in put if r <= last]


def test_rewinding_forgets_what_came_after_a_round_for_everybody():
    store = ClientStore()
    for client in ("ann", "bob/ward 7"):
        for round in (1, 2, 3):
            store.put(client, round, of(round))
    store.rewind(2)
    assert [found(store, c, 9) for c in ("ann", "bob/ward 7")] == [2, 2]
    store.rewind(0)
    assert files(store) == set()
    assert list(store.clients(["ann", "bob/ward 7"])) == []


ODD = [
    "", "ann", "Ann", "ann ", "a/nn", "a\\nn", "/ann", "..", ".", "../..", "ann/../bob", "ann%2Fbob", "ann/bob", "*",
    "a?", "[a]", ".hidden", "~", "-rf", "con", "ward 7\nbed 3", "Ä", "A\u0308", "犬", "🐑", "\u202e", "x" * 119,
    "x" * 120, "x" * 121, "x" * 500, "x" * 500 + "y", "é" * 40, "é" * 60, "é" * 60 + "a", "task1613/client=7", "000001",
    "000001.safetensors",
]  # fmt: skip


def test_every_name_has_a_folder_of_its_own_inside_the_store(tmp_path):
    store = ClientStore(tmp_path / "clients")
    for number, client in enumerate(ODD):
        store.put(client, 1, of(number))
    assert [found(store, client, 1) for client in ODD] == list(range(len(ODD)))
    assert list(store.clients([*ODD, "nobody"])) == ODD
    assert {p.parent for p in (tmp_path / "clients").iterdir()} == {tmp_path / "clients"}
    assert len(list((tmp_path / "clients").iterdir())) == len(ODD)
    assert [p.name for p in tmp_path.iterdir()] == ["clients"]
    assert all(len(os.fsencode(p.name)) <= 255 for p in (tmp_path / "clients").iterdir())
    store.rewind(0)
    assert list(store.clients(ODD)) == []


@given(st.text(), st.text())
def test_no_two_names_share_a_folder(one, other):
    try:
        folders = [folder_name(name) for name in (one, other)]
    except UnicodeEncodeError:  # half a surrogate pair is no text
        return
    assert (folders[0] == folders[1]) == (one == other)
    for name in folders:
        assert name not in ("", ".", "..")
        assert "/" not in name
        assert len(os.fsencode(name)) <= LONGEST_NAME + 17


@pytest.mark.parametrize("keep", [0, 1, 60, -1])
def test_a_damaged_file_is_one_line_that_names_it_and_the_rounds_before(tmp_path, keep):
    store = ClientStore(tmp_path)
    for round in (1, 2):
        store.put("ward/7", round, of(round))
    path = tmp_path / folder_name("ward/7") / "000002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError) as raised:
        store.get("ward/7", 5)
    message = str(raised.value)
    assert message.startswith(f"{path}: damaged (")
    assert message.endswith("resume from a round before 2")
    assert "\n" not in message
    assert found(store, "ward/7", 1) == 1


def test_a_disk_that_refuses_is_one_line_and_leaves_what_was_kept(tmp_path, monkeypatch):
    store = ClientStore(tmp_path)
    store.put("ann", 1, of(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        store.put("ann", 1, of(2))
    monkeypatch.undo()
    assert found(store, "ann", 1) == 1
    assert files(store) == {"ann/000001.safetensors"}
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        ClientStore(tmp_path / "file").put("ann", 1, of(1))


def test_nothing_stays_in_memory_and_what_is_read_is_the_readers_own():
    store = ClientStore()
    kept = of(5)
    watched = weakref.ref(kept["step"])
    store.put("ann", 1, kept)
    del kept
    gc.collect()
    assert watched() is None, "the store holds on to a tensor"
    first = store.get("ann", 1)
    first["own/layers.0.q_proj/B"].zero_()
    assert found(store, "ann", 1) == 5
    assert not any(isinstance(value, torch.Tensor | dict | list) for value in vars(store).values())


def test_dtypes_and_layouts_come_back_as_they_were():
    store = ClientStore()
    kept = {
        "half": torch.randn(3, dtype=torch.float16),
        "wide": torch.randn(3, 2, dtype=torch.float64).T,
        "positions": torch.arange(4),
        "empty": torch.zeros(0, 3),
        "part": torch.randn(5, 4)[1:3, ::2],
        "number": torch.tensor(2.5),
    }
    store.put("ann", 1, kept)
    back = store.get("ann", 1)
    assert back.keys() == kept.keys()
    for name, tensor in kept.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_a_temporary_store_disappears_with_its_last_user_and_a_named_one_stays(tmp_path):
    temporary, named = ClientStore(), ClientStore(tmp_path / "clients")
    for store in (temporary, named):
        store.put("ann", 1, of(1))
    place = temporary.folder
    assert files(temporary) == files(named) == {"ann/000001.safetensors"}
    del temporary, named, store
    gc.collect()
    assert not place.exists()
    assert (tmp_path / "clients" / "ann" / "000001.safetensors").is_file()


def test_a_store_that_nobody_wrote_to_leaves_no_trace(tmp_path):
    store = ClientStore(tmp_path / "clients")
    assert store.get("ann", 3) == {}
    store.prune(["ann"], [1])
    store.rewind(0)
    assert list(tmp_path.iterdir()) == []
