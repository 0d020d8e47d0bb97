"""What a forward and backward pass takes is counted on shapes alone, and agrees with what real tensors take."""

from typing import Any

import pytest
import torch

from sheepfold.activations import Live, activation_bytes, rows_of_a_pass
from sheepfold.adapter import Adapter
from sheepfold.config import AdapterSettings, TrainSettings
from sheepfold.engines.batches import Row
from sheepfold.engines.injection import CohortModel, Selection
from sheepfold.engines.stack import stacked
from sheepfold.tasks.causal_lm import CAUSAL_LM
from tests import small

TOKENS = small.tokens()


def counted(
    family: str = "llama",
    rows: list[int] | None = None,
    *,
    together: bool = True,
    recompute: bool = False,
    **train: Any,
) -> int | None:
    base = small.model(torch.float32, family)
    adapter = small.adapter(base, 4, 0, family, torch.float32)
    settings = TrainSettings(**{"engine": "cohort", **train})
    return activation_bytes(
        base.to("meta"), list(small.sites(base, family)), adapter, AdapterSettings(), settings, CAUSAL_LM, TOKENS,
        rows or rows_of_a_pass(TOKENS, 512, 100), dtype=torch.float32, together=together, recompute=recompute,
    )  # fmt: skip


def really(family: str, rows: list[int]) -> int:
    """Return the most bytes that a real pass of two clients has in use beside the model and the stack."""
    base = small.model(torch.float32, family)
    adapter = small.adapter(base, 4, 0, family, torch.float32)
    cohort = CohortModel(base, small.sites(base, family))
    head, batch = CAUSAL_LM.head(base), CAUSAL_LM.collate(TOKENS, [Row(n, 0) for n in rows])
    stack = stacked([adapter] * 2, "cpu", grad=True)
    with Live() as live, cohort.using(Selection(stack, batch.group)):
        torch.autograd.backward(head.of(batch).sum())
    return live.peak


@pytest.mark.parametrize("family", small.FAMILIES)
def test_every_family_is_counted_as_its_real_pass_is(family: str) -> None:
    rows = rows_of_a_pass(TOKENS, 512, 100)
    found = counted(family, rows)
    assert found is not None
    assert found == pytest.approx(really(family, rows), rel=0.1)


def test_more_rows_take_more_and_checkpointing_takes_less() -> None:
    longest = rows_of_a_pass(TOKENS, 512, 100)
    whole, half = counted(rows=longest), counted(rows=longest[len(longest) // 2 :])
    assert whole is not None
    assert half is not None
    assert 1.6 * half < whole < 2.4 * half
    again = counted(rows=longest, recompute=True)
    assert again is not None
    assert again < 0.8 * whole


def test_the_reference_engine_also_keeps_the_logits_of_all_tokens() -> None:
    rows = rows_of_a_pass(TOKENS, 512, 4)
    reference, ours = counted(rows=rows, engine="peft_model"), counted(rows=rows)
    assert reference is not None
    assert ours is not None
    tokens = max(TOKENS.length(n) for n in rows) * len(rows)
    assert reference > ours
    assert reference > 4 * tokens * small.VOCABULARY


def test_a_model_is_left_as_it_was() -> None:
    base = small.model(torch.float32).to("meta")
    names = [name for name, _ in base.named_modules()]
    adapter = small.adapter(base, 4, 0, dtype=torch.float32)
    activation_bytes(
        base, list(small.sites(base)), adapter, AdapterSettings(), TrainSettings(engine="cohort"), CAUSAL_LM, TOKENS,
        [0, 1], dtype=torch.bfloat16, together=False,
    )  # fmt: skip
    assert [name for name, _ in base.named_modules()] == names
    assert next(base.parameters()).dtype == torch.float32


def test_where_numbers_decide_the_way_nothing_is_guessed() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    made = MixtralForCausalLM(
        MixtralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=97,
                      num_key_value_heads=2, num_local_experts=2, experts_implementation="eager")
    ).to("meta")  # fmt: skip
    sites = [name for name, _ in made.named_modules() if name.endswith("q_proj")]
    adapter = Adapter({sites[0]: next(iter(small.adapter(small.model(torch.float32), 4, 0).pairs.values()))})
    found = activation_bytes(
        made, sites, adapter, AdapterSettings(), TrainSettings(engine="cohort"), CAUSAL_LM, TOKENS, [0, 1],
        dtype=torch.float32, together=True,
    )  # fmt: skip
    assert found is None


def test_the_rows_of_a_pass_are_the_longest_that_its_tokens_hold() -> None:
    rows = rows_of_a_pass(TOKENS, 200, 100)
    longest = max(TOKENS.lengths())
    assert len(rows) == 200 // longest
    assert {TOKENS.length(n) for n in rows} == set(sorted(TOKENS.lengths())[-len(rows) :])
    assert len(rows_of_a_pass(TOKENS, 1, 100)) == 1, "a row that is longer has a pass of its own"
    assert len(rows_of_a_pass(TOKENS, 10**6, 3)) == 3
