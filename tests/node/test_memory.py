"""What a machine kept is found again for whatever round its server goes on from, or it says that it is gone."""

import pytest
import torch

from sheepfold.errors import CheckpointError, ConfigError, WireError
from sheepfold.network.charter import Charter
from sheepfold.node.memory import RECENT, Memory
from tests.wire.samples import a_handed

CHARTER = Charter("0" * 16, {"federation": {"rounds": 4}}, ("ann", "bob"), "base", "0.1.0")


def answered(memory, round, last, keeps=True):
    """Answer an assignment as an engine does: go on from what was kept, and keep the round's number."""
    handed = a_handed(round=round, client="ann", last=last)
    memory.check(handed, remembers=True)
    with memory.answering(handed):
        found = memory.store.recall("ann", last)
        if keeps:
            memory.store.put("ann", round + 1, {"came": torch.tensor([float(round + 1)])})
    return kept(found)


def kept(found):
    return float(found["came"]) if found else None


def test_a_client_goes_on_from_its_last_update_that_counted(tmp_path):
    memory = Memory(tmp_path, "ann")
    assert answered(memory, 0, 0) is None
    assert answered(memory, 1, 1) == 1.0
    assert answered(memory, 2, 1) == 1.0, "its second update was late"
    assert answered(memory, 5, 3) == 3.0
    again = Memory(tmp_path, "ann")
    assert answered(again, 6, 6) == 6.0, "after a restart too"


def test_an_update_that_kept_nothing_leaves_what_was_kept_before(tmp_path):
    memory = Memory(tmp_path, "ann")
    answered(memory, 0, 0)
    answered(memory, 1, 1)  # is not counted
    answered(memory, 3, 1, keeps=False)  # is, and kept nothing
    assert answered(memory, 4, 4) == 1.0


def test_a_message_that_comes_again_costs_nothing_that_was_kept_since(tmp_path):
    memory = Memory(tmp_path, "ann")
    for round in range(4):
        answered(memory, round, round)
    assert answered(memory, 2, 2) == 2.0
    assert answered(memory, 4, 4) == 4.0


@pytest.mark.parametrize("keeps", [True, False])
def test_a_machine_that_dies_over_a_message_that_came_again_has_what_the_first_one_kept(tmp_path, keeps):
    """The server counts the first answer, and this machine was at the second when its power went."""
    memory = Memory(tmp_path, "ann")
    answered(memory, 0, 0)
    answered(memory, 1, 1)
    dying = memory.answering(a_handed(round=1, client="ann", last=1))
    dying.__enter__()
    if keeps:
        memory.store.put("ann", 2, {"came": torch.tensor([-1.0])})
    again = Memory(tmp_path, "ann")
    assert answered(again, 2, 2) == 2.0
    assert not list(tmp_path.glob("clients/ann/*.before"))


def test_a_failure_over_a_message_that_came_again_costs_nothing(tmp_path):
    memory = Memory(tmp_path, "ann")
    answered(memory, 0, 0)

    def failing():
        with memory.answering(a_handed(round=0, client="ann")):
            memory.store.put("ann", 1, {"came": torch.tensor([-1.0])})
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        failing()
    assert answered(memory, 1, 1) == 1.0


def test_a_server_goes_back_to_a_state_that_it_keeps_and_no_further(tmp_path):
    memory = Memory(tmp_path, "ann", keep_rounds=5)
    for round in range(14):
        answered(memory, round, round)
    files = len(list(tmp_path.glob("clients/ann/*")))
    assert files <= 2 * RECENT + 3
    assert answered(memory, 13, 13) == 13.0
    assert answered(memory, 12, 12) == 12.0
    assert answered(memory, 5, 5) == 5.0
    assert answered(memory, 6, 6) == 6.0, "and on from there"
    with pytest.raises(
        WireError, match="round 4 goes on from what ann kept after round 3, which this machine does not"
    ):
        answered(memory, 3, 3)


def test_a_machine_whose_folder_is_new_says_so_where_it_matters(tmp_path):
    memory = Memory(tmp_path, "ann")
    handed = a_handed(round=3, client="ann", last=3)
    with pytest.raises(WireError, match="its folder is new, or dropped it since"):
        memory.check(handed, remembers=True)
    memory.check(handed, remembers=False)


def test_a_round_whose_training_failed_was_not_answered(tmp_path):
    memory = Memory(tmp_path, "ann")
    answered(memory, 0, 0)
    with pytest.raises(ValueError, match="no"), memory.answering(a_handed(round=1, client="ann", last=1)):
        raise ValueError("no")
    assert memory.version(2) is None
    assert answered(memory, 1, 1) == 1.0


def test_one_run_has_one_charter(tmp_path):
    Memory(tmp_path, "ann").agree(CHARTER)
    more = Charter(CHARTER.run, {"federation": {"rounds": 9}}, CHARTER.clients, CHARTER.base, "0.1.0")
    Memory(tmp_path, "ann").agree(more)
    other = Charter(CHARTER.run, {"federation": {"rounds": 9}, "train": {"lr": 1.0}}, CHARTER.clients, "base", "0.1.0")
    with pytest.raises(ConfigError, match=r"run 0{16}: train.lr was 0.0003 and is now 1.0; a run has one charter"):
        Memory(tmp_path, "ann").agree(other)


def test_a_damaged_record_is_one_line(tmp_path):
    (tmp_path / "rounds.json").write_text("[{")
    with pytest.raises(CheckpointError, match=r"rounds\.json: damaged; move the run's folder away"):
        Memory(tmp_path, "ann")
