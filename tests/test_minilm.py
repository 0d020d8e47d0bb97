"""A real encoder classifies real sentences: all-MiniLM-L6-v2 on SST-2, federated."""

import json

import pytest

from sheepfold import simulation
from sheepfold.config import build


@pytest.mark.lab
@pytest.mark.slow
def test_four_clients_teach_a_real_encoder_sentiment(lab, minilm, tmp_path):
    outcome = simulation.run(
        build(
            {
                "name": "sst2",
                "task": "classification",
                "output": str(tmp_path / "runs"),
                "cache": str(tmp_path / "cache"),
                "model": {"base": str(minilm)},
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
