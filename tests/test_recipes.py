"""Every recipe is a valid experiment, maps what its header claims, and runs when it is made small."""

import json
from pathlib import Path

import pytest
import torch

from sheepfold import simulation
from sheepfold.config import load
from tests import encoders
from tests.marks import mostly_slow

RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))}

ALL_SMALL = {
    "model.base": "builtin:tiny",
    "data.max_tokens": 160,
    "data.cut": "left",
    "train.epochs": "null",
    "train.steps": 2,
    "train.batch_rows": 2,
    "train.micro_rows": "null",
    "federation.rounds": 2,
    "evaluation.every": 1,
    "keep_rounds": 1,
}
"""What makes any recipe small; the method, the partition and the template stay."""

FLEXLORA = {
    "data.path": "natural_instructions_1613",
    "data.rows": 120,
    "data.subsample": 1,
    "federation.fraction": 0.5,
    "evaluation.metrics": "[]",
}
TYPES = {"adapter.ranks": "{distribution: normal, types: [2, {attention: 8, mlp: 8}, {attention: 8, mlp: 32}, 32]}"}
"""FlexLoRA's types, scaled to the built-in base."""

OFFSITE = {"offsite.emu_l": 1, "offsite.emu_r": 3, "offsite.drop_ratio": 0.5}
"""A middle of two layers, one of which is dropped: the built-in base has four."""
ALIGNED = OFFSITE | {"offsite.align.data": "{source: corpus, rows: 40}", "offsite.align.steps": 2}

SMALL = {
    "flexlora-fedavg-homo": FLEXLORA,
    "flexlora-fedit": FLEXLORA,
    "flexlora-heterolora-normal": FLEXLORA | TYPES,
    "flexlora-normal": FLEXLORA | TYPES,
    "flexlora-slora-normal": FLEXLORA | TYPES | {"federation.strategy_args.stage_rounds": 1},
    "flexlora-slora-homo": FLEXLORA | {"federation.strategy_args.stage_rounds": 1},
    "demo": {"data.rows": 240, "data.partition.holdout_per_category": 2, "baselines": "[]", "evaluation.metrics": "[]"},
    "fs-llm-dolly-lda": {"data.path": "dolly/train.jsonl.gz", "data.rows": 200},
    "fs-llm-dolly-meta": {"data.path": "dolly/train.jsonl.gz", "data.rows": 200},
    "fs-llm-gpt2-alpaca": {"data.path": "alpaca/train.jsonl.gz", "data.rows": 100},
    "fs-llm-gsm8k": {"data.path": "gsm8k", "data.rows": 100},
    "fs-llm-offsite-dolly": {"data.path": "dolly/train.jsonl.gz", "data.rows": 200} | ALIGNED,
    "fs-llm-offsite-gsm8k": {"data.path": "gsm8k", "data.rows": 100} | OFFSITE,
    "shepherd-dolly": {"data.path": "dolly/train.jsonl.gz", "data.rows": 400, "federation.fraction": 0.3},
    "fedkseed-dolly": {
        "data.path": "dolly/train.jsonl.gz",
        "data.rows": 400,
        "data.partition.clients": 12,
        "data.partition.holdout_per_category": 1,
        "federation.fraction": 0.3,
        "evaluation.metrics": "[]",
    },
    "fedkseed-natural-instructions": FLEXLORA,
    "fedkd-cola": {"data.path": "cola", "data.rows": 120, "data.max_tokens": 32},
    "fedkd-sst2": {"data.path": "sst2", "data.rows": 120, "data.max_tokens": 32},
}
"""Recipe -> further options; a data.path is one of the shared folder's."""
QUICK = ["fs-llm-gsm8k", "fs-llm-offsite-dolly", "fedkseed-dolly", "fedkd-sst2"]

CLIENTS = {
    **{name: 10 for name in RECIPES if name.startswith("flexlora-")},
    "fedkseed-dolly": 12,
    "fedkseed-natural-instructions": 10,
    "demo": 10,
    "fs-llm-code-search-net": 6,
    "fs-llm-dolly-lda": 3,
    "fs-llm-dolly-meta": 8,
    "fs-llm-gpt2-alpaca": 1,
    "fs-llm-gsm8k": 3,
    "fs-llm-offsite-dolly": 8,
    "fs-llm-offsite-gsm8k": 3,
    "fs-llm-offsite-rosetta": 9,
    "fs-llm-rosetta": 9,
    "shepherd-dolly": 10,
    "fedkd-cola": 4,
    "fedkd-sst2": 4,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models are tiny here: two threads only wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_valid_experiment_of_its_own_name(name):
    assert load(RECIPES[name]).name == name


def test_shepherds_recipe_has_the_settings_of_its_main_py():
    e = load(RECIPES["shepherd-dolly"])
    assert (e.adapter.rank, e.adapter.alpha, e.adapter.dropout, e.adapter.targets) == (16, 16, 0.05, ("q_proj",))
    assert (e.train.batch_rows, e.train.micro_rows, e.train.epochs, e.train.lr) == (64, 8, 10, 3e-4)
    assert (e.federation.rounds, e.federation.fraction, e.federation.weights) == (50, 0.1, "rows")
    assert (e.data.template, e.data.max_tokens, e.data.train_on_inputs) == ("alpaca", 512, True)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("fs-llm-")])
def test_an_fs_llm_recipe_trains_as_fs_llm_does(name):
    e = load(RECIPES[name])
    assert (e.train.optimizer, e.train.batch_rows, e.train.grad_norm, e.train.schedule) == ("sgd", 1, None, "constant")
    assert (e.data.template, e.data.train_on_inputs, e.federation.weights) == ("alpaca_legacy", False, "processed_rows")
    if name != "fs-llm-gpt2-alpaca":
        assert e.stop.patience > e.federation.rounds / e.evaluation.every  # the best is kept, and no run ends early


@pytest.mark.parametrize("name", ["fedkseed-dolly", "fedkseed-natural-instructions"])
def test_fedkseeds_recipes_have_its_settings(name):
    e = load(RECIPES[name])
    assert (e.adapter.options["candidates"], e.adapter.options["eps"], e.train.lr) == (4096, 5e-4, 3e-7)
    assert (e.train.steps, e.train.batch_rows, e.train.grad_norm, e.data.max_tokens) == (200, 1, None, 1024)
    assert (e.federation.fraction, e.federation.rounds) == (0.05, 60 if name == "fedkseed-dolly" else 40)


FEDKD = ["fedkd-cola", "fedkd-sst2"]
BASELINES = {"FedLoRA": ["federation.strategy=fedavg"], "FedAvg": ["federation.strategy=fedavg", "adapter.method=full"]}


@pytest.mark.parametrize("name", FEDKD)
def test_fedkd_loras_recipes_have_the_settings_of_its_arguments_py(name):
    e = load(RECIPES[name])
    assert (e.task, e.model.base, e.data.source) == ("classification", "distilbert-base-uncased", name[6:])
    assert e.model.dtype == "float32", "in half precision the steps of FedAvg of the whole model are rounded away"
    assert (e.adapter.rank, e.adapter.alpha, e.adapter.dropout, e.adapter.targets) == (8, 16, 0.1, ("q_lin", "v_lin"))
    assert (e.train.batch_rows, e.train.epochs, e.train.lr, e.train.schedule) == (32, 1, 5e-5, "constant")
    assert (e.data.partition.by, e.data.partition.clients, e.federation.rounds) == ("order", 4, 10)
    assert (e.data.public.share, e.data.public.pick) == (0.2, "first")
    assert (e.data.test_split, e.data.eval_share) == ("validation", 0)
    theirs = e.federation.strategy_args["fedkd"]
    assert (theirs["teacher"], theirs["teacher_epochs"], theirs["epochs"]) == ("bert-base-uncased", 1, 1)
    assert (theirs["lr"], theirs["batch_rows"]) == (5e-5, 32)


@pytest.mark.lab
@pytest.mark.parametrize("method", BASELINES)
def test_one_changed_line_makes_each_baseline_of_fedkd_lora(method, lab, tmp_path):
    """All three keep the public rows from the clients, so that they compare."""
    changed = dict(option.split("=") for option in BASELINES[method])
    small = SMALL["fedkd-cola"] | {"data.path": str(lab / "data" / "cola")}
    outcome = run_small("fedkd-cola", tmp_path, **small | changed)
    told = json.loads((outcome.folder / "results.json").read_text())
    assert told["method"] == "fedavg"
    assert "teacher" not in told["rounds"][-1]
    assert {"loss", "accuracy", "matthews"} <= told["rounds"][-1].keys()
    assert json.loads((outcome.folder / "data.json").read_text())["public"] == 24
    assert bool(outcome.adapter.pairs) == (method == "FedLoRA")


def run_small(name: str, tmp_path: Path, **options: object) -> simulation.Outcome:
    """Run a recipe with little data and few steps, and check what any run must leave behind."""
    if name in FEDKD:
        options["model.base"] = encoders.saved(tmp_path / "base", "distilbert")
        options["federation.strategy_args.fedkd.teacher"] = encoders.saved(tmp_path / "teacher", "bert")
    values = ALL_SMALL | options | {"output": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")}
    outcome = simulation.run(load(RECIPES[name], [f"{key}={value}" for key, value in values.items()]))
    lines = [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]
    facts = json.loads((outcome.folder / "data.json").read_text())
    assert [line["round"] for line in lines if "round" in line] == [0, 1, 2]
    assert lines[-1]["adapter"] == outcome.state.hash() != lines[0]["adapter"]
    assert all(line["held_out"]["loss"] for line in lines)
    assert len(facts["clients"]) == CLIENTS[name]
    whole = values.get("adapter.method", load(RECIPES[name]).adapter.method) in ("seeds", "full")
    assert (outcome.folder / "adapter" / ("model.safetensors" if whole else "adapter_config.json")).is_file()
    return outcome


def test_the_demo_runs_small(tmp_path):
    run_small("demo", tmp_path, **SMALL["demo"])


@pytest.mark.lab
@pytest.mark.parametrize("name", mostly_slow([name for name in SMALL if "data.path" in SMALL[name]], QUICK))
def test_a_recipe_runs_small_on_shared_data(name, lab, tmp_path):
    path = str(lab / "data" / str(SMALL[name]["data.path"]))
    run_small(name, tmp_path, **SMALL[name] | {"data.path": path})


@pytest.mark.parametrize(("name", "more"), [("fs-llm-rosetta", {}), ("fs-llm-offsite-rosetta", ALIGNED)])
def test_rosetta_runs_small_on_rows_in_its_layout(tmp_path, name, more):
    languages = ["C", "C++", "Go", "Haskell", "Java", "JavaScript", "Kotlin", "Python", "Rust"]
    path = write_json(
        tmp_path / "rosetta_alpaca.json",
        [
            {"instruction": f"Print {n}.", "input": name, "output": f"print({n}) // {name}"}
            for n in range(6)
            for name in languages
        ],
    )
    outcome = run_small(name, tmp_path, **{"data.path": path} | more)
    assert outcome.state.best is not None


def test_code_search_net_runs_small_on_rows_in_its_layout(tmp_path):
    languages = ["go", "java", "javascript", "php", "python", "ruby"]
    path = write_json(
        tmp_path / "code_search_net.json",
        [
            {"docstring": f"Return {n}.", "language": language, "code": f"def f{n}(): return {n}"}
            for n in range(6)
            for language in languages
        ],
    )
    run_small("fs-llm-code-search-net", tmp_path, **{"data.path": path, "data.subsample": 0.8})


def test_every_recipe_is_run_by_a_test_here():
    assert RECIPES.keys() == CLIENTS.keys() == SMALL.keys() | {
        "fs-llm-rosetta", "fs-llm-offsite-rosetta", "fs-llm-code-search-net"
    }  # fmt: skip


def write_json(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text(json.dumps(rows))
    return str(path)
