"""Learning on real rows: the full model gets better at Dolly, and nobody but its owner has had it."""

import pytest

from sheepfold import simulation
from tests.offsite.bases import lines_of, run_of

pytestmark = pytest.mark.lab


def test_the_full_model_learns_dolly_from_clients_that_never_had_it(lab, tmp_path):
    over = {
        "data": {
            "source": "dolly", "path": str(lab / "data/dolly/train.jsonl.gz"), "rows": 200, "max_tokens": 96,
            "partition": {"by": "shards", "clients": 4}, "eval_share": 0.1, "template": "alpaca",
        },
        "adapter": {"rank": 8, "targets": "all-linear"},
        "train": {"steps": 8, "batch_rows": 4, "lr": 5e-3},
        "federation.rounds": 2,
        "evaluation.every": 0,
        "offsite": {"emu_l": 1, "emu_r": 3},
    }  # fmt: skip
    outcome = simulation.run(run_of(lab / "models" / "lab-llama-1m", tmp_path, **over))
    first, last = (line["held_out_full"]["loss"]["weighted"] for line in (lines_of(outcome)[0], lines_of(outcome)[-1]))
    assert lines_of(outcome)[0]["offsite"]["layers"] == [0, 1, 3], "four layers leave one of two to drop"
    assert last < first - 0.03, f"{first:.3f} before round 1, {last:.3f} after the last one"
