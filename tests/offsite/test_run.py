"""Whole runs on an emulator: what travels, how both models are judged, and what is refused."""

import json

import pytest

from sheepfold import simulation
from sheepfold.errors import ConfigError
from sheepfold.forecast import forecast
from tests.offsite import bases
from tests.offsite.bases import EVERYTHING, FULL, lines_of

CASES = [
    *((family, {}) for family in bases.FAMILIES),
    *((family, EVERYTHING) for family in bases.FAMILIES),
    ("gpt2", {"train.engine": "peft_model"}),
]


@pytest.mark.parametrize(("family", "how"), CASES)
def test_with_nothing_dropped_emulator_and_full_model_agree_to_the_bit(family, how, tmp_path):
    once = {"offsite.drop_ratio": 0.0, "federation.rounds": 1, "train.steps": 1}
    outcome = simulation.run(bases.run_of(bases.saved(tmp_path / "base", family), tmp_path, **how, **once))
    start, end = lines_of(outcome)
    assert end["held_out"] == end["held_out_full"]
    assert start["held_out"] == start["held_out_full"] != end["held_out"]


def test_only_adapter_layers_travel(lora, whole):
    assert {int(name.split(".")[2]) for name in lora.adapter.pairs} == {0, 1, 4, 5}
    assert not lora.adapter.extra
    assert {int(name.split(".")[2]) for name in whole.adapter.extra} == {0, 1, 4, 5}
    assert len(whole.adapter.extra) == 4 * 9
    sent = 4 * sum(t.numel() for t in whole.adapter.extra.values())
    heads = lines_of(whole)[1]["uplink_bytes"] - 4 * sent
    assert 0 < heads < 4 * (4 * 9) * 200


def test_the_journal_tells_of_both_models_and_of_the_emulator(lora):
    start, *rounds = lines_of(lora)
    assert start["offsite"]["layers"] == [0, 1, 2, 5, 6, 7]
    size = (lora.folder / "offsite" / "emulator" / "model.safetensors").stat().st_size
    assert (start["offsite"]["of"], start["offsite"]["bytes"], start["offsite"]["aligned"]) == (8, size, None)
    for line in [start, *rounds]:
        assert line["held_out"]["loss"]["weighted"] != line["held_out_full"]["loss"]["weighted"]
        assert line["held_out"]["clients"].keys() == line["held_out_full"]["clients"].keys()


def test_baselines_and_own_adapters_are_judged_on_the_full_model(closed, tmp_path):
    over = {"baselines": ["local", "centralised"], "federation.rounds": 1, "personal.keep_local": ["layers.1"]}
    outcome = simulation.run(bases.run_of(closed, tmp_path, **over))
    shared = json.loads((outcome.folder / "closing.json").read_text())["scores"]["loss"]["shared"]
    assert shared.keys() == {"base", "federated", "centralised", *(f"local:client-{i}" for i in range(4))}
    start, end = lines_of(outcome)
    assert start["held_out_full"]["loss"]["weighted"] == pytest.approx(shared["base"], abs=1e-6)
    assert end["held_out"]["clients"].keys() == end["held_out_full"]["clients"].keys()
    own = sorted((outcome.folder / "personal").iterdir())
    assert own, "an adapter of each client's own"
    names = json.loads((own[0] / "adapter_config.json").read_text())["target_modules"]
    assert {int(name.split(".")[2]) for name in names} == {0, 1, 6, 7}


def test_evaluating_one_model_alone_leaves_the_others_figures_out(closed, lora, tmp_path):
    both = lines_of(lora)[0]
    for asked, key in (("emu", "held_out"), ("full", "held_out_full")):
        once = {"offsite.evaluate": [asked], "federation.rounds": 1, "train.steps": 1}
        outcome = simulation.run(bases.run_of(closed, tmp_path, **once))
        first = lines_of(outcome)[0]
        assert "held_out_full" not in first
        assert first["held_out"]["loss"] == both[key]["loss"]
        assert (outcome.folder / "adapter" / "adapter_config.json").is_file()


def test_plan_foresees_the_emulator(closed, lora, whole, tmp_path):
    of_lora, of_whole = (forecast(bases.run_of(closed, tmp_path, **over)) for over in ({}, FULL))
    for foreseen, run in ((of_lora, lora), (of_whole, whole)):
        told = json.loads((run.folder / "offsite" / "emulator" / "offsite.json").read_text())
        assert (foreseen.base_parameters, foreseen.full_parameters) == (told["parameters"], told["full_parameters"])
        assert foreseen.full_bytes == 4 * told["full_parameters"]
        assert foreseen.adapter_numbers == sum(t.numel() for t in run.adapter.tensors().values())
        assert foreseen.uplink_bytes == lines_of(run)[1]["uplink_bytes"]


REFUSED = [
    ({"adapter": {"method": "ia3"}}, "offsite with adapter.method 'ia3': only lora, rslora and full"),
    ({"offsite.train": ["layers", "head"]}, "offsite.train layers, head: with adapter.method 'lora'"),
    ({"adapter": {"start": "some/folder"}}, "adapter.start has no effect with offsite"),
    ({"task": "classification"}, "offsite with task classification"),
    ({"offsite.evaluate": []}, "offsite.evaluate"),
    ({"offsite.drop_ratio": 0.0, "offsite.align": {"data": {"source": "corpus"}}}, "align has no effect with drop_ra"),
    ({"offsite.align": {"data": {"source": "corpus"}, "kd_weight": 0, "lm_weight": 0}}, "leave nothing to learn"),
    ({"offsite.align": {"steps": 3}}, "offsite.align.data is missing"),
    ({"offsite.emul_l": 3}, "unknown key 'offsite.emul_l'; did you mean 'emu_l'"),
]


@pytest.mark.parametrize(("over", "says"), REFUSED)
def test_an_experiment_that_cannot_be_is_refused_before_anything_loads(over, says, tmp_path):
    with pytest.raises(ConfigError) as refused:
        bases.run_of(tmp_path / "nowhere", tmp_path, **over)
    assert says in str(refused.value)


LATER = [
    ({"offsite.emu_l": 7, "offsite.emu_r": 7}, "none is left between"),
    ({"offsite.drop_ratio": 0.95}, "drop_ratio 0.95: keeps round(4 x 0.05) = 0 of 4"),
    ({"adapter.targets": ["layers.2.mlp.up_proj"]}, "adapter.targets: none is in an adapter layer"),
    ({"offsite.align": {"data": {"source": "corpus"}, "optimizer": "adamv"}}, "offsite.align.optimizer: no 'adamv'"),
]


@pytest.mark.parametrize(("over", "says"), LATER)
def test_a_cut_or_an_alignment_that_cannot_be_is_one_line_and_leaves_no_folder(over, says, closed, tmp_path):
    with pytest.raises(ConfigError) as refused:
        simulation.run(bases.run_of(closed, tmp_path, **over))
    assert says in str(refused.value)
    assert not (tmp_path / "runs").exists()
