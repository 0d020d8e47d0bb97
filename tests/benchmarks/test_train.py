"""The benchmark of local training: equal ways are measured, others refused, and what a machine cannot do is said."""

import threading
from dataclasses import replace
from multiprocessing import Pipe

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import machine, train, train_table, worker
from benchmarks.train_table import Rate, Result
from benchmarks.ways import WAYS, gap
from benchmarks.worker import Lap, Ready, Worker
from benchmarks.workloads import NotHere, Setting, available, experiment, random_rows, settings, workload
from sheepfold.data.rows import IGNORED
from tests.small import quick

SMALL = Setting(clients=2, rows=6)


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """Every way's updates on a small setting: {way: {client: {name: tensor}}}, and where they started."""
    with quick():
        work = workload(SMALL, tmp_path_factory.mktemp("work"))
        done = {}
        for way in ("trainer", "loop", "reference", "alone", "cohort"):
            trained = WAYS[way](work)[0]()
            done[way] = {client: adapter.tensors() for client, adapter in trained.adapters.items()}
            assert (sum(trained.seconds.values()) > 0) == (way in ("reference", "alone", "cohort"))
        return done, work.start().tensors(), work.useful_tokens


def test_all_ways_train_the_same_updates(updates):
    done, start, useful = updates
    assert useful > 100
    for way, theirs in done.items():
        assert gap(done["trainer"], theirs, start) < 0.01, way
        assert all(not torch.equal(t, start[name]) for t in theirs.values() for name, t in t.items())


def test_a_way_that_trains_something_else_is_refused(updates, tmp_path):
    done, start, _ = updates
    first = next(iter(done["cohort"]))
    other = done["cohort"] | {first: {n: start[n] + 1.05 * (t - start[n]) for n, t in done["cohort"][first].items()}}
    for way, tensors in (("loop", done["loop"]), ("cohort", other)):
        worker.save(tensors, tmp_path / way)
    ways = {way: Worker(way, SMALL, ready=Ready(1.0, 1.0, "cpu", "float32")) for way in ("loop", "cohort")}
    with pytest.raises(SystemExit, match=r"cohort trains something else: its updates differ from loop's by [34]\.\d%"):
        train._compare(Result(SMALL, ways), tmp_path, start)
    ways["cohort"].ready = replace(ways["cohort"].ready, dtype="bfloat16")  # whose rounding alone is as large
    result = Result(SMALL, ways)
    train._compare(result, tmp_path, start)
    assert result.difference["loop"] == 0 < result.difference["cohort"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_roofline_counts_what_a_token_is_multiplied_by(tied):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, tie_word_embeddings=tied,
    )  # fmt: skip
    attention, mlp, norms = 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 24, 2 * 16
    assert machine.matmul_numbers(LlamaForCausalLM(config)) == 3 * (attention + mlp + norms) + 16 + 50 * 16


def test_large_shapes_are_not_measured_without_a_gpu_and_never_estimated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = [train.measure(setting, ["trainer", "cohort"], 1) for setting in settings("7b", "gpu")]
    assert all(r.not_here == "not measured here: no CUDA device" for r in results)
    text, facts = train_table.page(results, 1, Rate.of(results))
    assert text.count("not measured here: no CUDA device") >= len(results)
    assert "roofline" not in text.partition("##")[2].lower()
    assert all(not r["ways"] for r in facts["results"])
    available(Setting("135m"), cpu_shapes=True)
    with pytest.raises(NotHere):
        available(Setting("1b"), cpu_shapes=True)


def test_random_rows_are_the_same_in_every_process_and_half_of_each_is_prompt(tmp_path):
    setting = Setting("135m", clients=3, rows=5, masked=False)
    one, other = random_rows(setting), random_rows(replace(setting, masked=True))
    assert (one.tokens.ids == other.tokens.ids).all()
    assert {len(rows.train) for rows in one.clients.values()} == {5}
    for n in range(15):
        ids, labels = other.tokens.row(n)
        assert 24 <= len(ids) <= 512
        assert int((labels == IGNORED).sum()) == len(ids) // 2
        assert torch.equal(*one.tokens.row(n))
    assert experiment(setting, tmp_path).data.train_on_inputs
    assert len({s.name for s in settings("lab", "cpu")}) == len(settings("lab", "cpu")) > 8


def told(way: str, monkeypatch: pytest.MonkeyPatch, setting: Setting = SMALL) -> object:
    """Return the first thing that a worker's process would tell."""
    ours, theirs = Pipe()
    serving = threading.Thread(target=worker._serve, args=(theirs, way, setting, 0))
    serving.start()
    first = ours.recv()
    ours.send(None)
    serving.join()
    return first


def test_a_way_that_is_not_installed_says_so_in_its_row(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    failed = told("sft", monkeypatch)
    assert failed.why == "trl not installed"
    result = Result(SMALL, {"sft": Worker("sft", SMALL, failed=failed.why)}, 100)
    assert "| sft | trl not installed |" in "\n".join(train_table.lines(result, None))


def test_a_base_that_is_not_there_says_so_in_its_row(monkeypatch, tmp_path):
    missing = told("cohort", monkeypatch, Setting(str(tmp_path / "none"), source="corpus"))
    assert "no such folder" in missing.why


def test_tables_have_medians_of_the_turns_and_the_least_ratio_of_all_settings():
    def laps(*seconds: float) -> list[Lap]:
        return [Lap(s, s, {"data": 0.1 * s, "forward": 0.5 * s, "backward": 0.2 * s}, 50.0) for s in (99.0, *seconds)]

    ready = Ready(20.0, 1.0, "cpu", "float32")
    results = []
    for clients, ours in ((1, (2.0, 1.0, 4.0)), (4, (1.0, 1.0, 1.0))):
        setting = replace(SMALL, clients=clients)
        ways = {"loop": Worker("loop", setting, laps=laps(2, 2, 4), ready=ready)}
        ways["cohort"] = Worker("cohort", setting, laps=laps(*ours), ready=ready)
        results.append(Result(setting, ways, 800, 10, {"loop": 0.0, "cohort": 1e-6}))
    assert results[0].speed("loop") == 400  # the first pass is the warm-up
    assert results[0].ratio("cohort", "loop") == 1.0  # turn by turn: 1, 2, 1
    assert results[0].ratio("cohort", "trainer") is None
    assert train_table.overview(results)[-1].endswith("|  | **1.00** |")
    row = train_table.lines(results[1], Rate(1e6, ""))[-1]
    assert "| cohort | 800 | 800 to 800 |  | 2.00 | 70% |" in row
    assert "| 50 | 30 | 3.2% | 99.00 | 1.0e-06 |" in row
    assert "rest 0.20" in row
