"""The command line: what people type, and what comes back."""

import json
import re
import subprocess
import sys
import time

import pytest
import yaml

from sheepfold import cli
from sheepfold.config import dump
from tests.runs import experiment


def typed(capsys, *words: str) -> tuple[int, str, str]:
    """Return exit code, output and errors of a command, run in this process."""
    before, sys.argv = sys.argv, ["sheepfold", *map(str, words)]
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return int(code), out, err


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(dump(experiment(tmp_path)))
    return path


def test_help_answers_at_once_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['sheepfold', '--help']\nfrom sheepfold import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'pydantic') if m in sys.modules])"
    )
    began = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("[]")
    assert "run" in out.stdout
    assert time.perf_counter() - began < 30  # the figure is in docs/; this only catches a hang


def test_run_prints_a_live_table_and_where_things_are(capsys, file):
    code, out, _ = typed(capsys, "run", file, "--baseline", "local", "evaluation.metrics=[exact_match]")
    assert code == 0
    assert "4 clients" in out
    assert "was joining worth it? exact match" in out
    assert "On everybody's" in out
    assert "runs/small" in out.replace("\n", "")


def test_run_speaks_json_for_scripts_and_nothing_when_quiet(capsys, file):
    code, out, _ = typed(capsys, "run", file, "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [e["event"] for e in events] == ["round", "round", "round", "end"]
    assert events[-1]["adapter"] == events[-2]["adapter"]
    assert typed(capsys, "run", file, "--quiet")[:2] == (0, "")


def test_plan_foresees_what_the_run_then_does(capsys, file, tmp_path):
    code, out, _ = typed(capsys, "plan", file, "--json")
    foreseen = json.loads(out)
    assert code == 0
    assert "at most 1,024 tokens a forward pass" in typed(capsys, "plan", file)[1]
    assert "at most 4 rows a forward pass" in typed(capsys, "plan", file, "train.engine=peft_model")[1]
    assert typed(capsys, "run", file, "--quiet")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "runs/small/rounds.jsonl").read_text().splitlines()][1:]
    did = [c for line in lines for c in line["clients"].values()]
    assert foreseen["rows_in_all"] == sum(c["processed_rows"] for c in did)
    assert foreseen["steps_a_round"] == sum(c["steps"] for c in lines[0]["clients"].values())
    assert foreseen["uplink_bytes"] == lines[0]["uplink_bytes"]
    tokens = sum(c["processed_tokens"] for c in did)
    assert foreseen["tokens_in_all"] == pytest.approx(tokens, rel=0.25)
    state = json.loads(json.dumps(foreseen["plan"]))
    assert state["clients_per_pass"] == 4


def test_plan_says_seconds_after_a_few_steps_and_forgets_what_they_taught(capsys, file, tmp_path):
    code, out, _ = typed(capsys, "plan", file, "--calibrate", "--json", "federation.rounds=5", "evaluation.every=2")
    measured = json.loads(out)["calibration"]
    assert code == 0
    assert measured["evaluations"] == 4, "before round 1, after 2, 4 and 5"
    assert measured["run_s"] == pytest.approx(5 * measured["round_s"] + 4 * measured["evaluation_s"])
    assert measured["steps"] >= 4
    said = typed(capsys, "plan", file, "--calibrate")[1].replace("\n", " ")
    assert "tokens a second" in said
    assert re.search(r"seconds +[0-9]\.[0-9] in all", said), "a short run's seconds have a decimal"
    assert not (tmp_path / "runs").exists()


def test_data_commands_show_split_and_examine(capsys, file, tmp_path):
    code, out, _ = typed(capsys, "data", "show", file, "--html", tmp_path / "map.html", "--json")
    assert code == 0
    counts = json.loads(out)
    assert sum(sum(row.values()) for row in counts.values()) == 96
    assert "<table" in (tmp_path / "map.html").read_text()
    assert "client-0" in typed(capsys, "data", "show", file)[1]
    code, out, _ = typed(capsys, "data", "split", tmp_path / "files", file, "--json")
    assert code == 0
    assert json.loads(out)["clients"] == 4
    assert (tmp_path / "files" / "4" / "local_training_0.json").is_file()
    code, out, _ = typed(capsys, "data", "doctor", file, "--json")
    assert code == 0
    assert sum(client["train_rows"] for client in json.loads(out)["clients"]) > 0
    assert typed(capsys, "data", "doctor", file)[0] == 0


def test_what_was_split_into_files_runs_as_a_federation_of_files(capsys, file, tmp_path):
    typed(capsys, "data", "split", tmp_path / "files", file)
    own = [f"data.source={tmp_path}/files/4", "data.partition.by=files", "data.rows=null", "name=files"]
    code, out, err = typed(capsys, "run", file, "--json", *own)
    assert code == 0, err
    assert len(json.loads(out.splitlines()[1])["clients"]) == 4


def test_export_writes_what_plain_peft_and_transformers_load(capsys, file, tmp_path):
    assert typed(capsys, "run", file, "--quiet")[0] == 0
    assert typed(capsys, "export", tmp_path / "runs/small", tmp_path / "adapter")[0] == 0
    assert typed(capsys, "export", tmp_path / "runs/small", tmp_path / "merged", "--to", "merged")[0] == 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    code, _, err = typed(capsys, "export", tmp_path / "runs/small", tmp_path / "adapter")
    assert code == 2
    assert "adapter" in err


def test_the_schema_is_printed_for_editors(capsys):
    code, out, _ = typed(capsys, "schema")
    assert code == 0
    assert "federation" in json.loads(out)["properties"]


def test_a_run_is_written_down_with_every_option_resolved(capsys, file, tmp_path):
    typed(capsys, "run", file, "--quiet", "train.lr=0.001")
    written = yaml.safe_load((tmp_path / "runs/small/experiment.yaml").read_text())
    assert written["train"]["lr"] == 0.001
    assert written["model"]["base"] == "builtin:tiny"
