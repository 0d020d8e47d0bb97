"""Aligning: the middle learns from declared rows, by the formula, and nothing else moves."""

import json

import pytest
import torch

from sheepfold import simulation
from sheepfold.config import build
from sheepfold.errors import ConfigError, DataError, TrainingError
from sheepfold.layers import keep_layers
from sheepfold.models import load_tokenizer
from sheepfold.offsite import align, emulator
from sheepfold.offsite.cut import cut_of
from sheepfold.offsite.settings import AlignSettings, OffsiteSettings
from tests import small
from tests.offsite import bases

DATA = {"source": "corpus", "rows": 60, "seed": 7}
ALIGN = {"data": DATA, "steps": 12, "batch_rows": 4, "lr": 3e-3, "kd_weight": 1.0, "lm_weight": 0.0}


def pair(family="llama"):
    """Return a full model, its emulator and the cut, in float64."""
    count = {"n_layer": 8} if family == "gpt2" else {"num_hidden_layers": 8}
    full = small.model(family=family, initializer_range=0.2, **count)
    kept = small.model(family=family, initializer_range=0.2, **count)
    cut = cut_of(full, OffsiteSettings(**bases.ENDS))
    keep_layers(kept, cut.source)
    return full, kept, cut


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt"])
@torch.no_grad()
def test_the_loss_is_the_formula_over_real_tokens(family):
    full, kept, cut = pair(family)
    tokens, rows = small.tokens(), [3, 0, 11]  # of unequal length: some of the batch is padding
    found = align.losses(full, kept, cut, tokens, rows)
    differences, squares, nats, targets = [], [], 0.0, 0
    for n in rows:  # one row at a time, without any padding, through transformers' own hidden states
        ids, labels = tokens.row(n)
        # hidden_states[i] enters layer i: behind layers 2 to 5 of the full model, and behind 2, 5 of the emulator
        t = full(ids[None], output_hidden_states=True, use_cache=False).hidden_states[6][0]
        out = kept(ids[None], output_hidden_states=True, use_cache=False)
        s = out.hidden_states[4][0]
        differences.append((t - s).square().flatten())
        squares.append(t.square().flatten())
        losses = torch.nn.functional.cross_entropy(out.logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")
        nats, targets = nats + float(losses), targets + int((labels[1:] != -100).sum())
    rms = torch.cat(squares).mean().sqrt()
    torch.testing.assert_close(found.kd, (torch.cat(differences) / rms**2).mean(), atol=1e-9, rtol=1e-9)
    assert float(found.lm) == pytest.approx(nats / targets, abs=1e-9)
    settings = AlignSettings(data={"source": "corpus"}, kd_weight=0.9, lm_weight=0.1)
    assert float(found.total(settings)) == pytest.approx(0.9 * float(found.kd) + 0.1 * float(found.lm))


def written(closed, folder, **over):
    experiment = build(
        {
            "model": {"base": str(closed)},
            "cache": str(folder / "cache"),
            "data": {"max_tokens": 64},
            "offsite": bases.ENDS | over,
        }
    )
    tokenizer = load_tokenizer(experiment.model)
    out = folder / f"out-{len(list(folder.iterdir()))}"
    return emulator.write(experiment, out, tokenizer, align.read_rows(experiment, tokenizer))


def test_aligning_brings_the_middles_together_and_moves_nothing_else(closed, tmp_path):
    plain = written(closed, tmp_path)
    made = written(closed, tmp_path, align=ALIGN)
    assert made.aligned["after"]["kd"] < 0.8 * made.aligned["before"]["kd"]
    assert (made.aligned["steps"], made.aligned["rows"]) == (12, 60)
    middle = {name for name in plain.tensors if name.startswith(("model.layers.2.", "model.layers.3."))}
    moved = {name for name in plain.tensors if plain.tensors[name] != made.tensors[name]}
    assert moved == middle, "every tensor of the middle, and no other bit"
    assert "aligned in 12 steps" in made.line()
    again = written(closed, tmp_path, align=ALIGN)
    assert again.tensors == made.tensors, "one seed gives one emulator"
    other = written(closed, tmp_path, align=ALIGN | {"seed": 1, "steps": 2})
    assert other.tensors != written(closed, tmp_path, align=ALIGN | {"steps": 2}).tensors


CHANGED = [
    {"optimizer": "sgd"},
    {"lr": 1e-3},
    {"schedule": "linear"},
    {"grad_norm": None},
    {"batch_rows": 2},
    {"kd_weight": 0.5, "lm_weight": 0.5},
    {"optimizer_args": {"betas": [0.5, 0.9]}},
    {"data": DATA | {"seed": 8}},
    {"data": DATA | {"rows": 30}},
]


def test_every_option_of_the_alignment_has_an_effect(closed, tmp_path):
    first = written(closed, tmp_path, align=ALIGN | {"steps": 2})
    for over in CHANGED:
        assert written(closed, tmp_path, align=ALIGN | {"steps": 2} | over).tensors != first.tensors, over


def test_a_run_aligns_on_its_own_rows_and_says_what_came_of_it(closed, tmp_path):
    over = {"offsite.align": ALIGN, "federation.rounds": 1, "train.steps": 1}
    outcome = simulation.run(bases.run_of(closed, tmp_path, **over))
    first = json.loads((outcome.folder / "rounds.jsonl").read_text().splitlines()[0])
    told = json.loads((outcome.folder / "offsite" / "emulator" / "offsite.json").read_text())
    assert first["offsite"]["aligned"] == told["aligned"]
    assert told["aligned"]["after"]["kd"] < told["aligned"]["before"]["kd"]


def test_rows_that_a_client_holds_are_refused(closed, tmp_path):
    same = {"source": "corpus", "rows": 40}  # what the clients have
    with pytest.raises(DataError, match=r"offsite.align.data: 40 of its 40 rows are held by clients .* name rows that"):
        simulation.run(bases.run_of(closed, tmp_path, **{"offsite.align": ALIGN | {"data": same}}))
    assert not (tmp_path / "runs").exists()


def test_a_source_that_is_not_there_is_named_by_its_own_key(closed, tmp_path):
    nowhere = ALIGN | {"data": {"source": "alpaca", "path": str(tmp_path / "nowhere.json")}}
    with pytest.raises((ConfigError, DataError), match=r"^offsite.align: "):
        simulation.run(bases.run_of(closed, tmp_path, **{"offsite.align": nowhere}))


def test_a_loss_that_is_not_finite_ends_it_in_one_line(closed, tmp_path):
    wild = ALIGN | {"lr": 1e30, "grad_norm": None, "optimizer": "sgd"}
    with pytest.raises(TrainingError, match=r"offsite.align(, step \d+)?: .*lower offsite.align.lr"):
        written(closed, tmp_path, align=wild)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")], "and leaves no half folder"
