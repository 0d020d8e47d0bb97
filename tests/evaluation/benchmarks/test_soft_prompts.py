"""Benchmarks under virtual tokens: which rows share a batch changes no answer and no likelihood."""

from types import SimpleNamespace

import pytest
import torch

from sheepfold.config import AdapterSettings, GenerationSettings, ModelSettings
from sheepfold.engines.carriers import PeftCarrier
from sheepfold.evaluation.benchmarks.harness_model import Model
from sheepfold.evaluation.generation import generate
from sheepfold.models import load_base, max_positions
from tests import small

QUESTIONS = ["Count.", "Once upon a time there was a sheep that went a long way and", "Two sheep and a dog", "Why?"]
VIRTUAL = 4


def base_of(family, folder):
    base = "builtin:tiny" if family == "tiny" else str(small.saved(folder / family, family))
    return load_base(ModelSettings(base=base, dtype="float32"), "cpu")


@pytest.mark.parametrize(
    ("method", "family"), [("prompt", "tiny"), ("p-tuning", "tiny"), ("prefix", "tiny"), ("prefix", "mistral")]
)
def test_answers_and_likelihoods_are_the_same_in_any_batch(method, family, tmp_path):
    base = base_of(family, tmp_path)
    carrier = PeftCarrier(base.model, AdapterSettings(method=method, options={"num_virtual_tokens": VIRTUAL}), 0)
    torch.manual_seed(1)
    for p in carrier.factors().values():
        p.data += torch.randn_like(p)

    def model(batch_rows):
        return Model(carrier.model.eval(), base.tokenizer, batch_rows, None)

    assert model(1).max_length == max_positions(base.model.config) - VIRTUAL
    asked = [SimpleNamespace(args=(text, {"until": [], "max_gen_toks": 8, "do_sample": False})) for text in QUESTIONS]
    alone, together = model(1).generate_until(asked), model(4).generate_until(asked)
    assert alone == together
    settings = GenerationSettings(max_new_tokens=8, batch_rows=1)
    prompts = [torch.tensor(model(1).tok_encode(text)) for text in QUESTIONS]
    ours = generate(
        carrier.model, prompts, settings, seed=0, pad_token_id=0, eos_token_ids=[base.tokenizer.eos_token_id]
    )
    assert alone == [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in ours]

    scored = [SimpleNamespace(args=(text, " an answer")) for text in QUESTIONS]
    each = [[score for score, _ in model(rows).loglikelihood(scored)] for rows in (1, 4)]
    assert each[0] == pytest.approx(each[1], abs=1e-4)
