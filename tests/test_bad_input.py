"""Bad input of more than thirty kinds: exit code 2, one line that says what, where and what next, nothing lost."""

import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sheepfold.config import dump
from sheepfold.models import BUILTIN
from sheepfold.strategies.base import Strategy
from sheepfold.strategies.fedavg import fedavg
from tests.runs import experiment
from tests.test_cli import typed

Words = list[str]


def rows(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def good(n: int = 40) -> list[dict]:
    return [{"instruction": f"say {i}", "output": f"word {i}", "category": "ab"[i % 2]} for i in range(n)]


def own(path: Path, **fields: str) -> Words:
    return [
        f"data.source={path}",
        "data.rows=null",
        "data.partition.by=iid",
        *(f"data.fields.{k}={v}" for k, v in fields.items()),
    ]


def folder_without(tmp: Path, name: str, cut: int | None = None) -> Path:
    """Return a copy of the built-in base with one file gone, or cut short."""
    copy = tmp / "base"
    shutil.copytree(BUILTIN, copy)
    if cut is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes((copy / name).read_bytes()[:cut])
    return copy


def with_file(name: str, content: bytes) -> Callable[[Path], Words]:
    def make(tmp: Path) -> Words:
        (tmp / name).write_bytes(content)
        return own(tmp / name)

    return make


RANKS = ["adapter.rank=8", "adapter.ranks=[2, 4]"]


def unweighted() -> Strategy:
    """A method of one's own that weighs nobody."""
    return replace(fedavg("uniform"), name="unweighted")


CASES: dict[str, tuple[Callable[[Path], Words], str]] = {
    # the experiment file and its keys
    "unknown key": (lambda t: ["train.stepz=1"], "did you mean 'steps'"),
    "wrong type": (lambda t: ["train.lr=fast"], "train.lr: found 'fast'"),
    "value out of range": (lambda t: ["federation.fraction=2"], "federation.fraction: found 2"),
    "steps and epochs": (lambda t: ["train.epochs=1"], "keep one of them"),
    "more clients a round than clients": (lambda t: ["federation.clients_per_round=9"], "is more than"),
    "unknown strategy": (lambda t: ["federation.strategy=fedavgg"], "did you mean 'fedavg'"),
    "strategy argument": (lambda t: ["federation.strategy_args.mu=1"], "no argument of fedavg"),
    "fedit with sgd": (lambda t: ["federation.strategy=fedit", "train.optimizer=sgd"], "use adamw"),
    "unknown optimizer": (lambda t: ["train.optimizer=adamww"], "did you mean 'adamw'"),
    "coupling optimizer": (lambda t: ["train.optimizer=lbfgs"], "use train.engine peft_model"),
    "optimizer argument": (lambda t: ["train.optimizer_args.momentun=0.9"], "no such argument"),
    "unknown metric": (lambda t: ["evaluation.metrics=[exact_mach]"], "exact_match"),
    "unknown stop key": (lambda t: ["stop.key=accuracy"], "loss.weighted"),
    "unknown local rule": (lambda t: ["train.local_rule=proximall"], "proximal"),
    "unknown adapter method": (lambda t: ["adapter.method=lorra", "train.engine=peft_model"], "did you mean 'lora'"),
    # data
    "unknown source": (lambda t: ["data.source=dolly15k", "data.rows=null"], "dolly"),
    "missing file": (lambda t: own(t / "nothing.jsonl"), "nothing.jsonl"),
    "unsupported kind of file": (with_file("rows.xml", b"<a/>"), "rows.xml"),
    "empty file": (with_file("rows.jsonl", b""), "rows.jsonl"),
    "broken line": (with_file("rows.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": \n'), "line 2"),
    "wrong encoding": (with_file("rows.jsonl", b'{"instruction": "caf\xe9", "output": "b"}\n'), "rows.jsonl"),
    "truncated gzip": (with_file("rows.jsonl.gz", gzip.compress(b"{}" * 99)[:20]), "rows.jsonl.gz"),
    "missing column": (lambda t: own(rows(t / "r.jsonl", *good()), instruction="prompt"), "prompt"),
    "no answer anywhere": (lambda t: own(rows(t / "r.jsonl", *({"instruction": "a", "output": " "},) * 9)), "output"),
    "fewer rows than clients": (lambda t: own(rows(t / "r.jsonl", *good(3))), "4 clients"),
    "fewer categories than clients": (
        lambda t: [*own(rows(t / "r.jsonl", *good())), "data.partition.by=meta"],
        "2 categor",
    ),
    "no category for shards": (
        lambda t: [*own(rows(t / "r.jsonl", *({"instruction": "a", "output": "b"},) * 40)), "data.partition.by=shards"],
        "categor",
    ),
    "no client column": (lambda t: [*own(rows(t / "r.jsonl", *good())), "data.partition.by=natural"], "client"),
    "impossible minimum": (lambda t: ["data.partition.by=dirichlet", "data.partition.min_rows=60"], "min_rows"),
    "unknown partitioner": (lambda t: ["data.partition.by=shardz"], "did you mean 'shards'"),
    "unknown template": (lambda t: ["data.template=alpacca"], "alpaca"),
    "every answer cut away": (lambda t: ["data.max_tokens=4"], "max_tokens"),
    # models and adapters
    "missing folder": (lambda t: [f"model.base={t}/nowhere"], "nowhere"),
    "hub id offline": (lambda t: ["model.base=somebody/some-model"], "somebody/some-model"),
    "folder without config": (lambda t: [f"model.base={folder_without(t, 'config.json')}"], "config.json"),
    "folder without tokenizer": (lambda t: [f"model.base={folder_without(t, 'tokenizer.json')}"], "tokenizer"),
    "truncated weights": (lambda t: [f"model.base={folder_without(t, 'model.safetensors', 5000)}"], "are damaged"),
    "target that matches nothing": (lambda t: ["adapter.targets=[q_prj]"], "q_proj"),
    "rank above the matrix": (lambda t: ["adapter.rank=4000"], "4000"),
    "adapter folder that is none": (lambda t: [f"adapter.start={t}"], "no adapter_model.safetensors"),
    "misspelt source beside a path": (lambda t: ["data.source=dolyl", f"data.path={t}/x.json"], "dolly"),
    "no such file for a named source": (lambda t: ["data.source=dolly", f"data.path={t}/x.json"], "x.json"),
    "stop key without rows": (lambda t: ["stop.key=loss.global"], "holdout_per_category"),
    "option without effect": (lambda t: ["train.halve_after=3"], "no effect without round_schedule"),
    "own part that cannot be called": (lambda t: ["federation.strategy=math:pi"], "something to call"),
    "an empty module name": (lambda t: ["federation.strategy=:x"], "fedavg"),
    "a name too long": (lambda t: [f"model.base=/{'x' * 300}"], "xxx"),
    "rows longer than the model": (lambda t: ["data.max_tokens=4096"], "1024 positions"),
    "adapting the head in a cohort": (lambda t: ["adapter.targets=[lm_head]"], "output head"),
    "no such device": (lambda t: ["device=cuda:7"], "cuda"),
    # methods, and what clients have of their own
    "mixed ranks where factors are averaged": (lambda t: [*RANKS, "federation.strategy=fedavg"], "needs equal ranks"),
    "one client's rank above the matrix": (
        lambda t: ["adapter.rank=8", "adapter.ranks=[2, 4000]", "federation.strategy=flora"],
        "choose a smaller rank",
    ),
    "two methods that fold": (lambda t: ["federation.strategy=[flora, fedavg]"], "flora says how updates fold"),
    "a method around one that it does not fit": (lambda t: ["federation.strategy=[scaffold, flexlora]"], "[scaffold, "),
    "misspelt argument of a method": (
        lambda t: ["federation.strategy=[fedprox, flexlora]", "federation.strategy_args={mu: 1, precison: float64}"],
        "did you mean 'precision'",
    ),
    "argument that two methods take": (
        lambda t: ["federation.strategy=[fedavgm, scaffold]", "federation.strategy_args.server_lr=0.5"],
        "say whose, as in fedavgm",
    ),
    "missing argument of a method": (lambda t: ["federation.strategy=fedprox"], "missing a required argument: 'mu'"),
    "argument out of range": (
        lambda t: ["federation.strategy=slora", "federation.strategy_args.density=1.5"],
        "density: found 1.5, expected above 0 and at most 1",
    ),
    "weights of a method that has its own": (
        lambda t: ["federation.strategy=tests.test_bad_input:unweighted", "federation.weights=uniform"],
        "has its own weights; set it to auto",
    ),
    "scaffold with another optimizer": (
        lambda t: ["federation.strategy=scaffold", "train.optimizer=adamax"], "to sgd, as in the paper, or to adamw"
    ),
    "scaffold with momentum": (
        lambda t: ["federation.strategy=scaffold", "train.optimizer=sgd", "train.optimizer_args.momentum=0.9"],
        "found momentum; set it to 0",
    ),
    "slora that never ends its first stage": (
        lambda t: ["federation.strategy=slora", "federation.strategy_args.stage_rounds=2"],
        "LoRA would never start in 2 rounds",
    ),
    "a method of pairs with all weights": (
        lambda t: ["federation.strategy=flora", "adapter.method=full", "train.engine=peft_model"], "adapter.method"
    ),
    "ditto near factors that turn": (
        lambda t: ["federation.strategy=flexlora", "personal.ditto=1"], "nearness to them means nothing"
    ),
    "ditto with nothing to hold it": (lambda t: ["personal.ditto=0"], "personal.ditto: found 0"),
    "keeping a module that is not there": (lambda t: ["personal.keep_local=[c_attn]"], "matches no adapted module"),
    "keeping cores at home": (
        lambda t: ["federation.strategy=fed_sb", "personal.keep_local=[q_proj]"], "cannot stay behind"
    ),
    "keeping variates at home": (
        lambda t: ["federation.strategy=scaffold", "personal.keep_local=[q_proj]"], "remove personal.keep_local"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_2(name, capsys, tmp_path):
    make, expected = CASES[name]
    file = tmp_path / "experiment.yaml"
    file.write_text(dump(experiment(tmp_path)))
    code, out, err = typed(capsys, "run", file, "--json", *make(tmp_path))
    assert code == 2, out + err
    assert err.count("\n") == 1, err
    assert err.startswith("sheepfold: ")
    assert expected in err
    assert "Traceback" not in out + err


def test_there_are_at_least_thirty_kinds():
    assert len(CASES) >= 30


@pytest.mark.parametrize("content", [b"train: [", b"- 1\n", b"\xff\xfe"])
def test_a_broken_experiment_file_is_one_line(content, capsys, tmp_path):
    file = tmp_path / "e.yaml"
    file.write_bytes(content)
    code, _, err = typed(capsys, "run", file)
    assert (code, err.count("\n")) == (2, 1)
    assert "e.yaml" in err


def a_finished_run(capsys, tmp_path: Path, *more: str) -> Path:
    file = tmp_path / "experiment.yaml"
    file.write_text(dump(experiment(tmp_path, keep_rounds=1)))
    assert typed(capsys, "run", file, "--quiet", *more)[0] == 0
    return file


@pytest.mark.parametrize("keep", [0, 100, -7])
def test_a_truncated_checkpoint_names_the_rounds_to_go_on_from(keep, capsys, tmp_path):
    file = a_finished_run(capsys, tmp_path)
    latest = tmp_path / "runs/small/state/latest.safetensors"
    latest.write_bytes(latest.read_bytes()[:keep])
    code, _, err = typed(capsys, "run", file, "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "--resume-from 0001 or 0002" in err
    assert typed(capsys, "run", file, "--resume-from", "1", "--quiet")[0] == 0


def test_resuming_another_experiment_is_refused_with_the_option_that_differs(capsys, tmp_path):
    file = a_finished_run(capsys, tmp_path)
    code, _, err = typed(capsys, "run", file, "--resume", "seed=5")
    assert code == 2
    assert "seed was 0 and is now 5" in err


def mounted(tmp_path: Path, options: str) -> Path:
    """Return a small file system of its own, or skip where this process may not mount one."""
    place = tmp_path / "mount"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    return place


def test_a_full_disk_is_one_line_and_what_was_saved_still_resumes(capsys, tmp_path):
    place = mounted(tmp_path, "size=400k")
    try:
        file = tmp_path / "experiment.yaml"
        file.write_text(dump(experiment(tmp_path, output=str(place), keep_rounds=1, **{"federation.rounds": 12})))
        code, _, err = typed(capsys, "run", file, "--quiet")
        assert (code, err.count("\n")) == (2, 1)
        assert "No space left" in err
        assert "--resume" in err
        journal = [json.loads(line) for line in (place / "small/rounds.jsonl").read_text().splitlines()]
        assert 1 <= journal[-1]["round"] < 12
        subprocess.run(["mount", "-o", "remount,size=40m", place], check=True)
        assert typed(capsys, "run", file, "--quiet", "--resume")[0] == 0
        whole = experiment(tmp_path, name="whole", **{"federation.rounds": 12})
        from sheepfold import simulation, state

        assert (
            simulation.run(whole).adapter.hash() == state.load(place / "small/state/latest.safetensors").adapter.hash()
        )
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_read_only_place_is_one_line(capsys, tmp_path):
    place = mounted(tmp_path, "size=1m")
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    try:
        file = tmp_path / "experiment.yaml"
        file.write_text(dump(experiment(tmp_path, output=str(place))))
        code, _, err = typed(capsys, "run", file, "--quiet")
        assert (code, err.count("\n")) == (2, 1)
        assert "Read-only" in err
        code, _, err = typed(capsys, "run", file, "--quiet", f"output={tmp_path}/runs", f"cache={place}/cache")
        assert (code, err.count("\n")) == (2, 1)
        assert "cache" in err
        code, _, err = typed(capsys, "data", "split", place / "files", file)
        assert (code, err.count("\n")) == (2, 1)
    finally:
        subprocess.run(["umount", place], check=True)


def test_output_that_is_a_file_is_one_line(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    file = tmp_path / "experiment.yaml"
    file.write_text(dump(experiment(tmp_path, output=str(tmp_path / "taken"))))
    code, _, err = typed(capsys, "run", file, "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "taken" in err


def test_exporting_what_is_no_run_is_one_line(capsys, tmp_path):
    code, _, err = typed(capsys, "export", tmp_path, tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert os.listdir(tmp_path) == []


def test_what_is_missing_is_found_before_the_base_is_loaded_and_leaves_no_folder(capsys, tmp_path, monkeypatch):
    from sheepfold import assembly

    def never(*_: object) -> None:
        raise AssertionError("the base was loaded first")

    monkeypatch.setattr(assembly, "load_base", never)
    file = tmp_path / "experiment.yaml"
    file.write_text(dump(experiment(tmp_path)))
    for words in (own(tmp_path / "nothing.jsonl"), ["data.template=alpacca"], [f"adapter.start={tmp_path}/none"]):
        code, _, err = typed(capsys, "run", file, *words)
        assert (code, err.count("\n")) == (2, 1)
    assert not (tmp_path / "runs").exists()


def test_resuming_on_other_rows_is_refused(capsys, tmp_path):
    data = rows(tmp_path / "rows.jsonl", *good())
    file = tmp_path / "experiment.yaml"
    file.write_text(dump(experiment(tmp_path)))
    assert typed(capsys, "run", file, "--quiet", *own(data))[0] == 0
    rows(data, *good()[1:], {"instruction": "new", "output": "row", "category": "a"})
    code, _, err = typed(capsys, "run", file, "--resume", *own(data))
    assert (code, err.count("\n")) == (2, 1)
    assert "not what the run began with" in err
