"""The main job on real input: Dolly's 15,011 records in Shepherd's ten-client partition, on the lab's base."""

import json

import pytest
import torch

from sheepfold import simulation
from sheepfold.assembly import assemble
from sheepfold.config import load, recipe
from sheepfold.data.prepare import partition_only
from sheepfold.export import export

pytestmark = pytest.mark.lab


def experiment(lab, tmp_path, *more: str):
    return load(
        recipe("shepherd-dolly"),
        [
            f"model.base={lab}/models/lab-llama-1m",
            f"data.path={lab}/data/dolly/train.jsonl.gz",
            f"output={tmp_path}/runs",
            f"cache={tmp_path}/cache",
            "federation.fraction=1.0",
            "data.eval_share=0.02",
            *more,
        ],
    )


def test_shepherds_partition_of_dolly_has_its_sizes(lab, tmp_path):
    parted = partition_only(experiment(lab, tmp_path).data)
    assert len(parted.records) == 15011
    assert len(parted.holdout) == 80
    categories = [{parted.records[n].category for n in [*c.train, *c.eval, *c.test]} for c in parted.clients.values()]
    assert len(categories) == 10
    assert all(len(own) <= 4 for own in categories), "two shards hold at most four categories"
    assert {len(c.train) + len(c.eval) for c in parted.clients.values()} <= {1492, 1493, 1494}


@pytest.mark.slow
def test_dolly_trains_and_its_exports_are_the_evaluated_model(lab, tmp_path):
    over = ["train.epochs=null", "train.steps=20", "train.batch_rows=4", "train.micro_rows=4", "federation.rounds=5"]
    over += ["train.lr=3e-3"]  # the seed's 3e-4 is a 7B model's: it moves this base by 0.1 nats
    made = experiment(lab, tmp_path, *over)
    outcome = simulation.run(made)
    lines = [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]
    losses = [line["held_out"]["loss"]["weighted"] for line in lines]
    assert losses[5] < losses[0] - 0.5
    for before, line in zip(losses, lines[1:], strict=False):
        assert line["rose"] == (line["held_out"]["loss"]["weighted"] > before)

    parts = assemble(made, outcome.state.plan)
    ids = torch.stack(
        [
            parts.data.tokens.row(int(n))[0][:24]
            for n in parts.data.holdout[:8]
            if parts.data.tokens.length(int(n)) >= 24
        ]
    )
    evaluated = _logits_of_the_engine(parts, outcome.adapter, ids)
    parts.engine.close()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export(outcome.folder, tmp_path / "adapter")
    export(outcome.folder, tmp_path / "merged", to="merged")
    base = AutoModelForCausalLM.from_pretrained(made.model.base, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert float((base(ids).logits - evaluated).abs().max()) > 0.1, "the adapter must do something"
        assert float((merged(ids).logits - evaluated).abs().max()) < 1e-4
        with_adapter = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert float((with_adapter(ids).logits - evaluated).abs().max()) < 1e-4


def _logits_of_the_engine(parts, adapter, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits that held-out loss and generation come from."""
    from sheepfold.engines.injection import Selection
    from sheepfold.engines.stack import stacked

    engine = parts.engine
    stack = stacked([adapter], engine.device, grad=False)
    with torch.no_grad(), engine.cohort.using(Selection(stack, torch.zeros(len(ids), dtype=torch.int64))):
        return engine.head.logits(engine.head.hidden(ids))
