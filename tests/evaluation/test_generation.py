"""Answers do not depend on batches, padding, the global generator, or what the model's own configuration says."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

from sheepfold.config import GenerationSettings
from sheepfold.errors import DataError
from sheepfold.evaluation.generation import Draws, generate, pad_left, until

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48),
    "mistral": MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=40, n_embd=32, n_head=4, n_layer=2, n_positions=32),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32),
    "bloom": BloomConfig(vocab_size=40, hidden_size=32, n_head=4, n_layer=2),
}
GREEDY = GenerationSettings(max_new_tokens=8, batch_rows=3)
SAMPLED = GenerationSettings(max_new_tokens=8, temperature=0.8, top_k=20, top_p=0.9)
IDS = {"pad_token_id": 0, "eos_token_ids": (2, 7)}


@pytest.fixture(params=FAMILIES)
def family_model(request):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    for weight in model.parameters():  # far from uniform, so that rounding decides nothing
        weight.data *= 4 if weight.ndim > 1 else 1
    return model


@pytest.fixture
def model():
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()


def prompts(rows=10):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 40, (2 + (7 * row) % 11,), generator=draw) for row in range(rows)]


@torch.no_grad()
def by_hand(model, prompt, new_tokens, stop):
    """Greedy decoding of one row: no batch, no padding, no cache."""
    ids, new = prompt[None], []
    for _ in range(new_tokens):
        token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        if token in stop:
            break
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return new


def test_greedy_answers_are_those_of_one_row_at_a_time_by_hand(family_model):
    rows = prompts(5)
    expected = [by_hand(family_model, prompt, 8, IDS["eos_token_ids"]) for prompt in rows]
    for batch_rows in (2, 64):
        settings = GREEDY.model_copy(update={"batch_rows": batch_rows})
        assert generate(family_model, rows, settings, seed=0, **IDS) == expected


def test_answers_end_before_any_end_token(model):
    free = generate(model, prompts(), GREEDY, seed=0, pad_token_id=0, eos_token_ids=())
    assert all(len(answer) == 8 for answer in free)
    stop = (free[0][3], free[1][5])
    stopped = generate(model, prompts(), GREEDY, seed=0, pad_token_id=0, eos_token_ids=stop)
    assert stopped == [until(answer, stop) for answer in free]
    assert until([5, 2, 6, 2], (2,)) == [5]


def test_the_pad_id_may_be_the_end_token(model):
    free = generate(model, prompts(), GREEDY, seed=0, pad_token_id=0, eos_token_ids=(2,))
    assert generate(model, prompts(), GREEDY, seed=0, pad_token_id=2, eos_token_ids=(2,)) == free


def test_sampled_answers_depend_on_seed_and_prompt_alone(model):
    rows = prompts()
    first = generate(model, rows, SAMPLED, seed=0, **IDS)
    torch.manual_seed(99)
    small = SAMPLED.model_copy(update={"batch_rows": 2})
    assert generate(model, rows[::-1], small, seed=0, **IDS) == first[::-1]
    assert generate(model, rows, SAMPLED, seed=1, **IDS) != first
    before = torch.get_rng_state()
    generate(model, rows, SAMPLED, seed=0, **IDS)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_the_tempered_and_cut_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    settings = GenerationSettings(temperature=0.7, top_k=4, top_p=0.95)
    draws = Draws([torch.tensor([1])], settings, seed=0)
    rounds = 4000
    drawn = torch.cat([draws(torch.tensor([[1]]), logits).argmax(1) for _ in range(rounds)])
    kept = torch.softmax(logits[0, :4] / 0.7, 0)
    kept = torch.where(kept.cumsum(0) - kept < 0.95, kept, 0)
    expected = torch.cat([kept / kept.sum(), torch.zeros(1)])
    found = torch.bincount(drawn, minlength=5) / rounds
    assert found[expected == 0].sum() == 0
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)  # 4 standard deviations at 4000 draws


def test_the_models_own_generation_config_is_not_applied_and_is_put_back(model):
    plain = generate(model, prompts(), GREEDY, seed=0, **IDS)
    own = GenerationConfig(repetition_penalty=9.0, do_sample=True, top_k=3, min_p=0.5, suppress_tokens=list(range(20)))
    model.generation_config = own
    assert generate(model, prompts(), GREEDY, seed=0, **IDS) == plain
    assert model.generation_config is own


def test_each_batch_is_announced_with_its_rows_before_it_runs(model):
    seen, running = [], []
    handle = model.register_forward_pre_hook(lambda *_: running.append(len(seen)))
    generate(model, prompts(7), GREEDY, seed=0, **IDS, on_batch=seen.append)
    handle.remove()
    assert sorted(row for rows in seen for row in rows) == list(range(7))
    assert [len(rows) for rows in seen] == [3, 3, 1]
    assert running[0] == 1
    assert max(running) == 3
    lengths = [len(prompts(7)[row]) for rows in seen for row in rows]
    assert lengths == sorted(lengths, reverse=True)


def test_an_answer_ends_where_the_models_positions_end_whatever_shares_its_batch():
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES["gpt2"]).eval()
    rows = [torch.arange(3, 33), torch.arange(3, 30), torch.arange(3, 9)]
    answers = generate(model, rows, GREEDY, seed=0, pad_token_id=0, eos_token_ids=())
    assert [len(answer) for answer in answers] == [2, 5, 8]
    assert answers == [by_hand(model, row, len(answer), ()) for row, answer in zip(rows, answers, strict=True)]
    with pytest.raises(DataError, match=r"prompt 1 has 32 tokens and the model 32 positions; .* lower data.max_tokens"):
        generate(model, [rows[0], torch.arange(3, 35)], GREEDY, seed=0, **IDS)
    with pytest.raises(DataError, match="prompt 0 has 0 tokens"):
        generate(model, [torch.tensor([], dtype=torch.long)], GREEDY, seed=0, **IDS)


def test_padding_is_on_the_left_and_masked_by_length():
    ids, mask = pad_left([torch.tensor([5, 0]), torch.tensor([6, 7, 8])], pad_token_id=0)
    assert ids.tolist() == [[0, 5, 0], [6, 7, 8]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_nothing_to_answer_gives_nothing(model):
    assert generate(model, [], GREEDY, seed=0, **IDS) == []
