"""What `make bench` runs, and how a round's seconds are counted."""

from pathlib import Path

import pytest
import torch

from benchmarks import all as everything
from benchmarks import data, memory, round
from benchmarks.all import Part


def test_every_part_is_a_command_that_knows_its_options_and_shapes_wait_for_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {part.name: part for part in everything.parts(tmp_path)}
    assert {name for name, part in found.items() if part.not_here == "not measured here: no CUDA device"} == {
        "135m", "1b", "7b",
    }  # fmt: skip
    for part in found.values():
        assert (Path(everything.__file__).parent / part.command[0]).is_file()
    for part, module in (("data", data), ("round", round), ("memory", memory)):
        assert module.parsed(found[part].command[1:]).quick
    from benchmarks import train

    assert train.parsed(found["7b"].command[1:]).all_tokens
    assert train.parsed(found["train"].command[1:]).settings == "quick"


def test_a_part_is_stopped_when_the_time_is_up_and_those_left_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "LEAST_S", 0.001)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    slow, broken = (Part(name, name, (str(tmp_path / f"{name}.py"),)) for name in ("slow", "broken"))
    ended = [*everything.run([broken, Part("gpu", "", not_here="no GPU")], 600.0), *everything.run([slow, slow], 1.0)]
    assert [how for _, how, _ in ended] == ["failed (3)", "no GPU", "stopped: the time was up", "no time was left"]


def test_a_part_of_a_round_inside_another_counts_for_itself_alone(monkeypatch):
    moments = iter((0.0, 1.0, 5.0, 7.0, 8.0, 10.0))
    monkeypatch.setattr(round.time, "perf_counter", lambda: next(moments))
    clock = round.Clock()
    with clock.of("outer"):
        clock.around("inner", lambda: None)()  # from 1 to 5
        clock.around("inner", lambda: None)()  # from 7 to 8
    assert clock.take() == {"inner": 5.0, "outer": 5.0}
    assert clock.take() == {}


def test_a_rounds_parts_are_all_found_and_leave_little_of_it(tmp_path):
    args = round.parsed(["--clients", "6", "--cohort", "3", "--rounds", "4", "--steps", "1", "--out", str(tmp_path)])
    found = round.run(6, args)
    assert len(found) == 5
    assert set(round.PARTS) | {"training"} <= set(found[2]["parts"])
    assert "all beside training" in round.page({6: round.summary(found)}, args)


@pytest.mark.parametrize(
    ("words", "stem"),
    [
        ([], "memory"),
        (["--quick"], "memory-quick"),
        (["--base", "builtin:tiny"], "memory-builtin-tiny"),
        (["--base", "/models/llama", "--quick"], "memory-llama-quick"),
    ],
)
def test_a_table_of_memory_is_named_by_what_is_in_it(words, stem):
    assert memory.stem(memory.parsed(words)) == stem
