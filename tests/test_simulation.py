"""Whole runs: what they leave behind, what repeats, what resumes."""

import json
import subprocess
import sys

import pytest

from sheepfold import simulation
from sheepfold import state as states
from sheepfold.errors import CheckpointError, ConfigError, TrainingError
from sheepfold.peft_io import read_peft
from tests.runs import MEASURED, experiment


def lines(outcome) -> list[dict]:
    return [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_experiment_its_journal_its_states_and_its_adapter(tmp_path):
    outcome = simulation.run(experiment(tmp_path, keep_rounds=1, **{"data.partition.holdout_per_category": 1}))
    folder = outcome.folder
    written = {"experiment.yaml", "data.json", "rounds.jsonl", "state", "adapter", "model_card.md", "results.json"}
    assert {p.name for p in folder.iterdir()} == written
    start, first, second = lines(outcome)
    assert (start["round"], first["round"], second["round"]) == (0, 1, 2)
    assert (
        second["adapter"]
        == outcome.adapter.hash()
        == states.load(folder / "state" / "latest.safetensors").adapter.hash()
    )
    assert read_peft(folder / "adapter").hash() == outcome.adapter.hash()
    assert {p.name for p in (folder / "state").iterdir()} == {
        "latest.safetensors",
        "round-0001.safetensors",
        "round-0002.safetensors",
    }
    assert len(first["clients"]) == len(first["cohort"]) == 4
    assert all(c["steps"] == 2 and c["skipped_steps"] == 0 for c in first["clients"].values())
    assert 0 < first["uplink_bytes"] - 4 * outcome.adapter.nbytes() < 4 * 4096, "numbers and heads"
    assert set(start["held_out"]["loss"]) >= {
        "weighted",
        "plain",
        "worst_decile",
        "best_decile",
        "never_sampled",
        "global",
    }
    assert "never_sampled" not in first["held_out"]["loss"]
    assert first["held_out"]["loss"]["weighted"] < start["held_out"]["loss"]["weighted"]
    stages = first["seconds"]
    assert sum(stages[s] for s in ("data", "forward", "backward", "step")) <= stages["round"]
    sizes = json.loads((folder / "data.json").read_text())["clients"]
    assert sum(c["train"] + c["eval"] for c in sizes.values()) == 96 - 8


def test_one_seed_repeats_to_the_bit_another_does_not_and_the_partition_has_its_own(tmp_path):
    first, again = (simulation.run(experiment(tmp_path, **{"adapter.dropout": 0.1})) for _ in range(2))
    assert first.folder != again.folder, "nothing is overwritten"
    assert first.adapter.hash() == again.adapter.hash()
    other = simulation.run(experiment(tmp_path, seed=1, **{"adapter.dropout": 0.1}))
    assert other.adapter.hash() != first.adapter.hash()
    same_data = [json.loads((o.folder / "data.json").read_text())["fingerprint"] for o in (first, other)]
    assert same_data[0] == same_data[1]
    moved = simulation.run(experiment(tmp_path, **{"adapter.dropout": 0.1, "data.partition.seed": 1}))
    assert json.loads((moved.folder / "data.json").read_text())["fingerprint"] != same_data[0]
    assert json.loads((again.folder / "data.json").read_text())["tokens_from_cache"] is True


def test_a_run_resumed_from_a_kept_round_ends_with_the_same_bits(tmp_path):
    whole = simulation.run(
        experiment(tmp_path, keep_rounds=1, **{"federation.rounds": 3, "federation.clients_per_round": 2})
    )
    before = lines(whole)
    resumed = simulation.run(
        experiment(tmp_path, keep_rounds=1, **{"federation.rounds": 3, "federation.clients_per_round": 2}),
        resume_from=1,
    )
    assert resumed.folder == whole.folder
    assert resumed.adapter.hash() == whole.adapter.hash()
    for old, new in zip(before, lines(resumed), strict=True):
        assert old.keys() == new.keys()
        assert all(old[key] == new[key] for key in old if key not in MEASURED)


def test_what_cannot_be_resumed_says_why(tmp_path):
    with pytest.raises(CheckpointError, match="no run to resume"):
        simulation.run(experiment(tmp_path), resume=True)
    simulation.run(experiment(tmp_path))
    (tmp_path / "runs" / "small").rename(tmp_path / "runs" / "small-2")
    with pytest.raises(CheckpointError, match=r"small-2: is a run of the name small; resume it with name=small"):
        simulation.run(experiment(tmp_path, name="small-2"), resume=True)
    (tmp_path / "runs" / "small-2").rename(tmp_path / "runs" / "small")
    with pytest.raises(ConfigError, match=r"train.lr was 0.003 and is now 0.1"):
        simulation.run(experiment(tmp_path, **{"train.lr": 0.1}), resume=True)
    with pytest.raises(CheckpointError, match="kept rounds: none"):
        simulation.run(experiment(tmp_path), resume_from=1)


def test_early_stopping_keeps_the_best_weights_and_says_so(tmp_path):
    over = {
        "stop.key": "loss.weighted",
        "stop.patience": 2,
        "train.lr": 1.0,
        "train.grad_norm": None,
        "federation.rounds": 9,
    }
    outcome = simulation.run(experiment(tmp_path, **over))
    best = outcome.state.best
    losses = [line["held_out"]["loss"]["weighted"] for line in lines(outcome)]
    assert outcome.stopped_early
    assert len(losses) < 10
    assert best.value == min(losses)
    assert best.round == losses.index(min(losses)) == len(losses) - 3
    assert any(line.get("rose") for line in lines(outcome))
    kept = states.load(outcome.folder / "state" / "best.safetensors")
    assert kept.adapter.hash() == lines(outcome)[best.round]["adapter"]
    assert read_peft(outcome.folder / "best").hash() == kept.adapter.hash()
    again = simulation.run(experiment(tmp_path, **over), resume=True)
    assert again.state.round == outcome.state.round, "a stopped run stays stopped"


def test_the_closing_table_compares_base_alone_federated_and_centralised(tmp_path):
    over = {"baselines": ["local", "centralised"], "evaluation.metrics": ["exact_match", "rouge_l"]}
    over["data.partition.holdout_per_category"] = 1
    outcome = simulation.run(experiment(tmp_path, **over))
    closing = outcome.closing
    assert set(closing.scores) == {"loss", "exact_match", "rouge_l"}
    for measure, scores in closing.scores.items():
        for client in closing.clients:
            assert set(scores[client]) == {"base", "local", "federated", "centralised"}
        assert set(scores["shared"]) == {"base", "federated", "centralised", *(f"local:{c}" for c in closing.clients)}
        if measure != "loss":
            assert all(0 <= v <= 1 for row in scores.values() for v in row.values())
    journal = lines(outcome)
    assert closing.scores["loss"]["shared"]["federated"] == pytest.approx(journal[-1]["held_out"]["loss"]["global"])
    assert closing.scores["loss"]["shared"]["base"] == pytest.approx(journal[0]["held_out"]["loss"]["global"])
    assert len(set(closing.scores["loss"]["shared"].values())) == len(closing.clients) + 3
    assert json.loads((outcome.folder / "closing.json").read_text())["scores"] == closing.scores


def test_local_only_is_what_a_federation_of_one_client_reaches(tmp_path):
    """A client that trains alone is FedAvg over itself: the baseline must be the same training."""
    from sheepfold.assembly import assemble
    from sheepfold.joining import train_alone
    from sheepfold.local.steps import round_lr
    from sheepfold.messages import Assignment

    # SGD: AdamW's first steps go by signs, and a gradient that is zero up to rounding may have either
    made = experiment(tmp_path, **{"train.optimizer": "sgd", "train.lr": 0.5})
    parts = assemble(made)
    alone = train_alone(parts, 2, lambda r: round_lr(made.train, r, 2))
    client = list(parts.data.clients)[1]
    adapter = parts.initial
    for r in range(2):
        [update] = parts.engine.train([Assignment(client, r, adapter, made.train.lr, r * 2)])
        adapter = update.adapter
    parts.engine.close()
    torch_gap = max(
        float((a - b).abs().max())
        for a, b in zip(adapter.tensors().values(), alone[client].tensors().values(), strict=True)
    )
    assert torch_gap < 5e-5
    assert adapter.hash() != parts.initial.hash()


@pytest.mark.parametrize("method", ["full", "ia3"])
def test_the_reference_engine_federates_other_methods(tmp_path, method):
    over = {"adapter.method": method, "train.engine": "peft_model", "train.lr": 1e-3}
    outcome = simulation.run(experiment(tmp_path, **over))
    journal = lines(outcome)
    assert journal[-1]["held_out"]["loss"]["weighted"] < journal[0]["held_out"]["loss"]["weighted"]
    assert outcome.adapter.extra
    assert not outcome.adapter.pairs


def test_a_second_run_tokenizes_nothing_and_a_lora_run_never_imports_peft(tmp_path):
    code = f"""
import sys
from pathlib import Path
from tests.runs import experiment
from sheepfold import simulation
from sheepfold.data import tokenize
made = experiment(Path({str(tmp_path)!r}))
simulation.run(made)
def never(*a, **k): raise AssertionError("tokenized again")
tokenize._encode = never
simulation.run(made)
print("peft" in sys.modules, "bitsandbytes" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.strip().endswith("False False")


def test_a_run_that_died_before_its_first_state_begins_again(tmp_path):
    made = experiment(tmp_path)
    whole = simulation.run(made)
    for path in (whole.folder / "state").iterdir():
        path.unlink()
    again = simulation.run(made, resume=True)
    assert again.folder == whole.folder
    assert again.adapter.hash() == whole.adapter.hash()
    assert [line["round"] for line in lines(again)] == [0, 1, 2]


def test_a_run_that_diverges_stops_with_the_reason_and_keeps_its_last_state(tmp_path):
    over = {"train.lr": 1e30, "train.grad_norm": None, "train.optimizer": "sgd"}
    with pytest.raises(TrainingError, match=r"no client took a good step .*overflow"):
        simulation.run(experiment(tmp_path, **over))
    folder = tmp_path / "runs" / "small"
    assert states.load(folder / "state" / "latest.safetensors").round < 2
    text = (folder / "rounds.jsonl").read_text()
    assert "NaN" not in text


def test_more_rounds_may_follow_and_end_as_if_they_had_been_asked_for_at_once(tmp_path):
    whole = simulation.run(experiment(tmp_path, name="whole", **{"federation.rounds": 4}))
    simulation.run(experiment(tmp_path, **{"federation.rounds": 2}))
    longer = simulation.run(experiment(tmp_path, **{"federation.rounds": 4}), resume=True)
    assert longer.adapter.hash() == whole.adapter.hash()
    planned = {"train.round_schedule": "cosine", "name": "planned"}
    simulation.run(experiment(tmp_path, **planned))
    with pytest.raises(ConfigError, match=r"federation.rounds was 2"):
        simulation.run(experiment(tmp_path, **planned, **{"federation.rounds": 3}), resume=True)


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from sheepfold.journal import new_folder

    with ThreadPoolExecutor(8) as pool:
        folders = [f.path for f in pool.map(lambda _: new_folder(experiment(tmp_path)), range(8))]
    assert len(set(folders)) == 8


def test_resume_finds_its_own_run_beside_one_that_is_called_alike(tmp_path):
    first = simulation.run(experiment(tmp_path, name="foo"))
    simulation.run(experiment(tmp_path, name="foo-2", seed=5))
    assert simulation.run(experiment(tmp_path, name="foo"), resume=True).folder == first.folder


def no_number(record, answer):
    return "x"


def forgets_to_return(weights):
    from sheepfold.strategies.base import Strategy

    return Strategy(name="mine", fold=lambda state, updates: list(updates) and None)


def test_own_parts_that_return_the_wrong_thing_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no_number.*expected a number"):
        simulation.run(experiment(tmp_path, **{"evaluation.metrics": ["tests.test_simulation:no_number"]}))
    with pytest.raises(TrainingError, match="mine: its fold returned a NoneType"):
        simulation.run(experiment(tmp_path, **{"federation.strategy": "tests.test_simulation:forgets_to_return"}))
