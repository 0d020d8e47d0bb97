"""Where memory runs out, half as much is done at once: one line says so, and the result is the same."""

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sheepfold import state as states
from sheepfold.adapter import Adapter
from sheepfold.errors import TrainingError
from tests import small
from tests.runs import experiment

WIDE = {
    "adapter.rank": 256, "adapter.targets": "all-linear", "data.rows": 40, "data.max_tokens": 32,
    "data.partition.by": "iid", "data.partition.clients": 8, "evaluation.batch_rows": 8,
    "train.optimizer": "sgd", "train.optimizer_args.momentum": 0.9, "train.lr": 0.05,
}  # fmt: skip
"""Adapters that are wide beside their base: 2.2 million numbers a client, 35 MB with gradient, momentum and update.

SGD, since AdamW turns a gradient of nearly nothing, which rounding decides, into a whole step.
"""
LOGITS = {
    "train.engine": "peft_model", "adapter.rank": 2, "data.rows": 400, "data.max_tokens": 48,
    "data.partition.by": "iid", "data.partition.clients": 2, "data.eval_share": 0.7, "federation.rounds": 1,
}  # fmt: skip
"""One client at a time, and logits of all tokens at once: what they take goes by the rows of a forward pass"""
LONG = {
    "adapter.rank": 2, "data.max_tokens": 512, "data.eval_share": 0.0, "evaluation.every": 0,
    "data.partition.by": "iid", "data.partition.clients": 2, "data.rows": None,
    "train.steps": 1, "train.batch_rows": 2,
}  # fmt: skip
"""Rows of 400 tokens through eight layers, which keep 100 MB of activations; one layer 13 MB"""
MIB = 2**20
SHORT = 290 * MIB
"""Beside what a run has when it starts: room for four clients of eight (seen: from 250 to 330)"""


def go(folder: Path, base: Path, room: int | None, kill_at: str, over: Mapping[str, Any], resume: bool) -> None:
    """Run with this many bytes beside what the process has when it starts, and die when `kill_at` happens."""
    from sheepfold import simulation
    from sheepfold.clients import Listener

    torch.set_num_threads(1)
    heard = folder / "heard.jsonl"

    def listener(event: str, facts: Mapping[str, Any]) -> None:
        if event == "start" and room is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + room
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if event in ("halved", "round", "progress"):
            with open(heard, "a") as file:
                file.write(
                    json.dumps({"event": event, **{k: facts[k] for k in ("text", "steps") if k in facts}}) + "\n"
                )
        if event == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    told: Listener = listener
    try:
        simulation.run(experiment(folder, **{"model.base": str(base)}, **WIDE | over), resume=resume, listener=told)
    except TrainingError as error:
        (folder / "error").write_text(str(error))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.saved(tmp_path_factory.mktemp("base"), hidden_size=256, intermediate_size=512, num_key_value_heads=4)


def run(folder: Path, base: Path, room: int | None = None, kill_at: str = "", resume: bool = False, **over: Any) -> int:
    """Run in a process of its own; return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sheepfold.simulation", "transformers.models.llama.modeling_llama", __name__])
    process = context.Process(target=go, args=(folder, base, room, kill_at, over, resume))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def heard(folder: Path, event: str) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "heard.jsonl").read_text().splitlines()]
    return [line.get("text", line.get("steps")) for line in lines if line["event"] == event]


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / "small" / "rounds.jsonl").read_text().splitlines()]


def learned(folder: Path) -> Adapter:
    return states.load(folder / "runs" / "small" / "state" / "latest.safetensors").adapter


@pytest.fixture(scope="module")
def at_ease(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has all the memory it wants."""
    folder = tmp_path_factory.mktemp("ease")
    assert run(folder, base) == 0
    assert heard(folder, "halved") == []
    return folder


@pytest.fixture(scope="module")
def short(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has no memory for all clients together."""
    folder = tmp_path_factory.mktemp("short")
    assert run(folder, base, room=SHORT) == 0
    return folder


def test_a_pass_that_does_not_fit_is_halved_said_once_and_gives_the_same(at_ease: Path, short: Path) -> None:
    said = heard(short, "halved")
    assert said == ["round 1: out of memory with 8 clients in a pass, going on with 4"]
    assert [text for line in journal(short) for text in line.get("halved", [])] == said
    assert small.gap(learned(short), learned(at_ease)) < 5e-5
    assert sum(heard(short, "progress")) == sum(heard(at_ease, "progress")), "no step is counted twice"
    kept = states.load(short / "runs" / "small" / "state" / "latest.safetensors").plan
    assert kept.clients_per_pass == 4


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", ["halved", "round"])
def test_a_run_killed_after_halving_resumes_to_the_same_bits_even_with_room(
    kill_at: str, base: Path, short: Path, tmp_path: Path
) -> None:
    assert run(tmp_path, base, SHORT, "halved") == -signal.SIGKILL
    before = (tmp_path / "runs" / "small" / "halvings.jsonl").read_text().splitlines()
    assert len(before) == 1
    if kill_at == "round":
        assert run(tmp_path, base, None, "round", resume=True) == -signal.SIGKILL
    assert run(tmp_path, base, resume=True) == 0
    assert len(heard(tmp_path, "halved")) == 1, "it was halved again without being out of memory"
    assert learned(tmp_path).hash() == learned(short).hash()
    assert [line.get("halved") for line in journal(tmp_path)] == [line.get("halved") for line in journal(short)]


def test_where_nothing_is_left_to_halve_one_line_says_so(base: Path, tmp_path: Path) -> None:
    assert run(tmp_path, base, room=24 * MIB) == 0
    error = (tmp_path / "error").read_text()
    assert error.startswith("out of memory (")
    assert "\n" not in error
    assert "adapter.rank lower" in error
    said = heard(tmp_path, "halved")
    assert said[-2].endswith("going on with 32"), "no row is longer"
    assert said[-1].endswith("going on with gradient checkpointing")
    assert any(text.endswith("2 clients in a pass, going on with 1") for text in said)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and rows beside it whose activations are more than all else."""
    folder = tmp_path_factory.mktemp("deep")
    rows = [{"instruction": f"Say {n}.", "output": "one two three four " * 100} for n in range(16)]
    small.saved(folder, num_hidden_layers=8, hidden_size=256, intermediate_size=1024)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("engine", ["cohort", pytest.param("peft_model", marks=pytest.mark.slow)])
def test_blocks_run_again_where_forward_passes_get_no_smaller_and_the_result_is_the_same(
    engine: str, deep: Path, tmp_path: Path
) -> None:
    over = LONG | {"data.source": str(deep / "rows.jsonl"), "train.engine": engine}
    assert run(tmp_path / "ease", deep, **over) == 0
    # one client's plain model keeps the logits of all tokens too
    assert run(tmp_path / "short", deep, (30 if engine == "cohort" else 60) * MIB, **over) == 0
    assert not (tmp_path / "short" / "error").exists()
    said = heard(tmp_path / "short", "halved")
    assert said[-1] == "round 1: out of memory with the shortest forward passes, going on with gradient checkpointing"
    assert small.gap(learned(tmp_path / "short"), learned(tmp_path / "ease")) < 5e-5
    foreseen, again = (line["memory"]["predicted"] for line in journal(tmp_path / "short")[1:])
    assert again < foreseen - 60 * MIB
    assert again == pytest.approx(journal(tmp_path / "short")[-1]["memory"]["peak"], rel=0.2)


@pytest.mark.slow
def test_what_runs_again_does_so_in_a_resumed_run_and_where_it_is_asked_for_anew(deep: Path, tmp_path: Path) -> None:
    over = LONG | {"data.source": str(deep / "rows.jsonl")}
    assert run(tmp_path / "never", deep, 30 * MIB, **over | {"train.gradient_checkpointing": False}) == 0
    assert "set train.gradient_checkpointing, or" in (tmp_path / "never" / "error").read_text()
    asked = over | {"train.gradient_checkpointing": True}
    assert run(tmp_path / "never", deep, 30 * MIB, resume=True, **asked) == 0
    assert run(tmp_path / "short", deep, 30 * MIB, **over | {"federation.rounds": 1}) == 0
    assert run(tmp_path / "short", deep, resume=True, **over) == 0
    for name in ("never", "short"):
        assert states.load(tmp_path / name / "runs" / "small" / "state" / "latest.safetensors").plan.recompute
    assert small.gap(learned(tmp_path / "never"), learned(tmp_path / "short")) < 5e-5


@pytest.mark.slow
def test_rows_are_halved_where_one_client_trains_or_is_judged_at_a_time(base: Path, tmp_path: Path) -> None:
    over = LOGITS | {"train.batch_rows": 32, "evaluation.batch_rows": 128}
    assert run(tmp_path / "ease", base, **over) == 0
    assert run(tmp_path / "short", base, 30 * MIB, **over) == 0
    said = heard(tmp_path / "short", "halved")
    assert said[0] == "round 0: out of memory with 128 rows judged at a time, going on with 64"
    assert any("rows in a forward pass" in text for text in said)
    ease, short = journal(tmp_path / "ease"), journal(tmp_path / "short")
    for a, b in zip(ease, short, strict=True):
        assert a["held_out"]["loss"]["weighted"] == pytest.approx(b["held_out"]["loss"]["weighted"], rel=1e-5)
    assert small.gap(learned(tmp_path / "short"), learned(tmp_path / "ease")) < 5e-5


def test_what_a_run_takes_was_foreseen_when_its_base_was_loaded(at_ease: Path) -> None:
    before, *rounds = [line["memory"] for line in journal(at_ease)]
    assert "predicted" not in before
    for memory in rounds:
        assert memory["predicted"] == pytest.approx(memory["peak"], rel=0.2)
        assert memory["peak"] > before["peak"] + 8 * 16 * 2_200_000 / 2, "it is the clients that take it"


@pytest.mark.slow
def test_memory_is_flat_over_rounds_and_over_clients_that_are_not_sampled(base: Path, tmp_path: Path) -> None:
    over = {"federation.clients_per_round": 8, "evaluation.every": 0, "federation.rounds": 12, "data.eval_share": 0.2}
    peaks = {}
    for clients in (10, 400):
        folder = tmp_path / str(clients)
        sizes = {"data.partition.clients": clients, "data.rows": 5 * clients}
        assert run(folder, base, **over | sizes) == 0
        peaks[clients] = [line["memory"]["peak"] for line in journal(folder)[1:]]
        # freed memory is used again, but in the first rounds not all of it: what must not grow is what comes after
        assert max(peaks[clients][8:]) < 1.05 * max(peaks[clients][4:8])
    assert peaks[400][-1] < 1.1 * peaks[10][-1], "one client's numbers would be as much again after three"
