"""The same run with its clients' rows in one place and apart: the same bits, the same figures, the same table."""

import json
from pathlib import Path
from typing import Any

import pytest

from sheepfold import simulation
from sheepfold.assembly import Site, assemble
from sheepfold.errors import CheckpointError, ConfigError
from sheepfold.peft_io import read_peft
from tests import encoders, runs, small
from tests.apart import Apart
from tests.marks import mostly_slow
from tests.strategies.test_fedkd import kd, shelf  # noqa: F401, a fixture
from tests.test_stateful import METHODS, method

ONE = {"train.clients_per_pass": 1}
PEFT = {"train.engine": "peft_model"}
NARROW = {"federation.wire": {"up": "int8", "down": "bf16"}}
SEEDS = {"adapter": {"method": "seeds", "options": {"candidates": 64}}, "federation.strategy": "fedkseed"}
SOFT = {"num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"}
OTHERS: dict[str, dict[str, Any]] = {
    "dora": PEFT | {"adapter.method": "dora"},
    "ia3": PEFT | {"adapter.method": "ia3", "train.lr": 0.02} | NARROW,
    "prompt": PEFT | {"adapter.method": "prompt", "adapter.options": SOFT},
    "full": PEFT | {"adapter.method": "full"},
    "fedkseed": SEEDS | {"train.lr": 1e-3},
    "fedkseed pro": SEEDS | {"train.lr": 1e-3, "federation.strategy_args": {"probabilities": True}},
    "ditto": {"personal.ditto": 0.5} | NARROW,
    "keep_local": {"personal.keep_local": ["layers.1.*v_proj"]} | NARROW,
    "scaffold, narrow": METHODS["scaffold"] | NARROW,
    "hetlora, narrow": METHODS["hetlora"] | NARROW,
    "flora, narrow": METHODS["flora"] | NARROW,
    "epochs": {"train.epochs": 1, "train.steps": None},
}
QUICK = ["hetlora", "fedadam x fedsa", "ia3", "fedkseed", "scaffold, narrow"]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with small.quick():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    small.saved(folder / "base")
    return folder


def tiny(folder: Path, base: Path, **over: Any):
    values = {
        "model.base": str(base / "base"), "cache": str(base / "cache"), "data.rows": 48, "data.max_tokens": 64,
        "train.batch_rows": 2, "federation.rounds": 3, "federation.clients_per_round": 3, "keep_rounds": 1,
    }  # fmt: skip
    train = {} if over.get("train.engine") or "seeds" in str(over.get("adapter")) else ONE
    return runs.experiment(folder, **(values | train | over))


def journal(outcome: simulation.Outcome) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in runs.MEASURED} for line in lines]


def close(left: Any, right: Any) -> None:
    """Assert that two trees of figures are the same: one batch holds other rows than the other, so not to the bit."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            close(left[key], right[key])
    else:
        assert left == pytest.approx(right, abs=2e-5)


def same(here: simulation.Outcome, there: simulation.Outcome) -> None:
    """Assert that two runs came to the same bits, bytes and figures."""
    for ours, theirs in zip(journal(here), journal(there), strict=True):
        ours_judged, theirs_judged = ours.pop("held_out", {}), theirs.pop("held_out", {})
        close(ours_judged, theirs_judged)
        close(ours.pop("teacher", {}), theirs.pop("teacher", {}))
        assert theirs == ours
    assert there.state.hash() == here.state.hash()


@pytest.mark.parametrize("name", mostly_slow(METHODS | OTHERS, QUICK))
def test_a_run_apart_comes_to_the_same_bits(name, base, tmp_path):
    made = tiny(tmp_path, base, **(METHODS | OTHERS)[name])
    same(simulation.run(made), simulation.run(made, place=Apart(tmp_path / "apart")))


def test_a_server_that_distils_keeps_its_teacher_to_itself(shelf, tmp_path):  # noqa: F811
    over = {"federation.clients_per_round": 2, "data.partition.holdout_per_category": 1, **PEFT}
    made, place = kd(shelf, tmp_path, **over), Apart(tmp_path / "apart")
    here, there = simulation.run(made), simulation.run(made, place=place)
    same(here, there)
    assert any("teacher" in name for name in there.state.memory)
    assert all(node.parts.server is None for node in place.nodes.values())


@pytest.mark.parametrize("engine", ["cohort", "peft_model"])
def test_rows_with_labels_are_judged_apart(engine, tmp_path):
    over = {"train.engine": engine, "evaluation.metrics": ["f1", "matthews"], "baselines": ["local"]}
    made = encoders.experiment(tmp_path, **over, **(ONE if engine == "cohort" else {}))
    here, there = simulation.run(made), simulation.run(made, place=Apart(tmp_path / "apart"))
    same(here, there)
    assert there.closing.scores.keys() == {"loss", "accuracy", "f1", "matthews"}
    compared(here, there)


def compared(here: simulation.Outcome, there: simulation.Outcome) -> None:
    """Assert that closing tables are the same, but for what nobody can know who has not all rows."""
    ours, theirs = here.closing.as_dict(), there.closing.as_dict()
    for rows_of in ours["scores"].values():
        for who in [w for w in rows_of.get("shared", {}) if w.startswith("local:") or w == "centralised"]:
            del rows_of["shared"][who]
        for own in rows_of.values():
            own.pop("centralised", None)
    close(ours, theirs)


CLOSINGS: dict[str, dict[str, Any]] = {
    "baselines": {"baselines": ["local", "centralised"]},
    "a test set": {"baselines": ["local"], "data.partition.holdout_per_category": 1},
    "answers": {"evaluation.metrics": ["exact_match"], "evaluation.generation": {"max_new_tokens": 3}},
    "fedsa": method("fedsa") | {"baselines": ["local"]},
    "hetlora": METHODS["hetlora"] | {"baselines": ["local"]},
    "flora": METHODS["flora"] | {"evaluation.rows_per_client": 2, "baselines": ["local"]},
    "slora": METHODS["slora"] | {"baselines": ["local"]},
    "ditto": {"personal.ditto": 0.5},
    "fine-tuned": {"personal.finetune_steps": 2},
    "fine-tuned, scaffold x fedex": METHODS["scaffold x fedex"] | {"personal.finetune_steps": 2},
    "fine-tuned pro": OTHERS["fedkseed pro"] | {"personal.finetune_steps": 2},
    "fine-tuned prompt": OTHERS["prompt"] | {"personal.finetune_steps": 2},
}


@pytest.mark.parametrize("name", mostly_slow(CLOSINGS, ["baselines", "a test set", "hetlora", "fine-tuned pro"]))
def test_a_closing_apart_is_the_same_table(name, base, tmp_path):
    made, place = tiny(tmp_path, base, **CLOSINGS[name]), Apart(tmp_path / "apart")
    told: list[str] = []
    here = simulation.run(made)
    there = simulation.run(made, place=place, listener=lambda event, facts: told.append(str(facts.get("text"))))
    same(here, there)
    compared(here, there)
    assert ("no centralised baseline: nobody has all rows" in told) == ("centralised" in made.baselines)
    for client, node in place.nodes.items():
        assert any(node.home.iterdir()), "everybody goes home with an adapter"
        own = here.folder / "personal" / client
        if own.is_dir() and made.adapter.method == "lora":
            assert read_peft(node.home).hash() == read_peft(own).hash()
    assert not (there.folder / "personal").exists(), "the server has none of them"


def test_the_server_writes_down_what_clients_tell_of_their_rows(base, tmp_path):
    made = tiny(tmp_path, base)
    here, there = simulation.run(made), simulation.run(made, place=Apart(tmp_path / "apart"))
    ours, theirs = (json.loads((o.folder / "data.json").read_text()) for o in (here, there))
    assert theirs["clients"] == ours["clients"]
    assert theirs["told"].keys() == ours["clients"].keys()
    assert theirs["records"] == 0, "and no row of theirs"
    assert "sheepfold" in (there.folder / "model_card.md").read_text()


def test_who_does_not_judge_is_named_and_the_others_figures_are_there(base, tmp_path):
    made = tiny(tmp_path, base, baselines=["local"])
    outcome = simulation.run(made, place=Apart(tmp_path / "apart", silent={"client-1"}))
    for line in journal(outcome):
        assert line["not_judged"] == {"client-1": "not connected"}
        assert line["held_out"]["clients"].keys() == {"client-0", "client-2", "client-3"}
    assert "client-1" not in outcome.closing.scores["loss"]
    assert outcome.closing.helped("loss")[2] == 3


@pytest.mark.parametrize("over", [METHODS["scaffold"], NARROW, method("fedsa"), {"personal.ditto": 0.5} | NARROW],
                         ids=["scaffold", "int8", "fedsa", "ditto"])  # fmt: skip
def test_an_update_that_did_not_count_leaves_no_trace(over, base, tmp_path):
    """A client whose answer of round 2 is lost goes on as one that never trained in it."""
    made = tiny(tmp_path, base, **over | {"federation.rounds": 4, "federation.clients_per_round": None})
    lost = {(2, "client-1"), (1, "client-3")}
    trained = simulation.run(made, place=Apart(tmp_path / "apart", lost))

    class Away(Apart):
        """A place where the client does not even hear of the round."""

        def clients(self, parts, folder, listener):
            flock, nodes = super().clients(parts, folder, listener), self.nodes
            for round, name in lost:
                node = nodes[name]

                def train(blob, node=node, round=round, heard=node.train, count=iter(range(1, 99))):
                    return b"" if next(count) == round else heard(blob)

                node.train = train
            return flock

    never = simulation.run(made, place=Away(tmp_path / "away", lost))
    assert journal(never) == journal(trained)
    assert never.state.hash() == trained.state.hash()
    assert never.closing == trained.closing
    assert dict(trained.state.counted) == dict.fromkeys(trained.state.drawn, 4)
    plain = simulation.run(made)
    assert plain.state.hash() != trained.state.hash()


def test_a_run_apart_resumes_to_the_same_bits_with_what_clients_kept(base, tmp_path):
    over = METHODS["scaffold"] | NARROW
    made, folder = tiny(tmp_path, base, **over), tmp_path / "apart"
    whole = simulation.run(made, place=Apart(folder))
    again = simulation.run(made, resume_from=1, place=Apart(folder))
    assert again.folder == whole.folder
    assert again.state.hash() == whole.state.hash()


def test_a_run_is_not_resumed_with_other_clients(base, tmp_path):
    made = tiny(tmp_path, base)

    class Fewer(Apart):
        def site(self, experiment):
            found = super().site(experiment)
            return Site(["client-0", "client-1", "client-3"], found.data)

    simulation.run(made, place=Apart(tmp_path / "apart"))
    with pytest.raises(CheckpointError, match="its clients are not those that the run began with; start a new run"):
        simulation.run(made, resume_from=1, place=Fewer(tmp_path / "fewer"))


def test_an_emulator_does_not_travel(base, tmp_path):
    made = tiny(tmp_path, base, offsite={"emu_l": 1, "emu_r": 2})
    with pytest.raises(ConfigError, match="offsite: an emulator has no way to another machine"):
        assemble(made, emulator=lambda: tmp_path, site=Site(["ann"], lambda tokenizer, task: None))
