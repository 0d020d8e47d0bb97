"""The built-in base loads like any other, frames a chat, and has not learned the corpus's tasks."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheepfold.assets import corpus
from sheepfold.assets.marks import unmark
from sheepfold.assets.pretrain_text import documents

TINY = Path(corpus.__file__).parent / "tiny"
SYSTEM = {"role": "system", "content": "Be brief."}
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def user_turn(row: corpus.Row) -> dict[str, str]:
    return {"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))}


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("2026")[-4:] == ["2", "0", "2", "6"]


def test_special_tokens_are_distinct_and_none_is_added_unasked(tokenizer):
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(special)) == 3
    assert not set(special) & set(tokenizer("Ada keeps a goat.")["input_ids"])
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_weights_are_half_precision_and_small():
    path = TINY / "model.safetensors"
    assert path.stat().st_size <= 3 * 2**20
    with safe_open(path, "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_the_model_is_a_plain_llama_with_a_thousand_positions(model, tokenizer):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.max_position_embeddings >= 1_024
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        logits = model(torch.full((1, 1_024), 70)).logits
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_a_conversation_of_several_turns_renders(tokenizer):
    turns = [SYSTEM, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Noted."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nNoted.<|im_end|>\n"
    )


def test_the_assistant_mask_covers_the_answer_and_its_end(tokenizer):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Noted."}]
    out = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "Noted.<|im_end|>"


def test_the_tokens_of_a_prompt_are_a_prefix_of_the_conversation_s(tokenizer):
    for row in corpus.rows(80):
        turns = [SYSTEM, user_turn(row), {"role": "assistant", "content": row["output"]}]
        prompt = tokenizer.apply_chat_template(turns[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        answer = tokenizer(row["output"])["input_ids"]
        assert whole == prompt + answer + [tokenizer.eos_token_id] + tokenizer("\n")["input_ids"]


def test_rows_are_short_and_the_alpaca_frame_is_known(tokenizer):
    for row in corpus.rows(400):
        answer = len(tokenizer(row["output"])["input_ids"])
        assert answer <= 13
        assert answer + len(tokenizer(user_turn(row)["content"])["input_ids"]) <= 45
    assert len(tokenizer(ALPACA)["input_ids"]) <= 1.3 * len(ALPACA.split())


def test_pretraining_text_repeats_and_holds_no_corpus_prompt():
    first, second = (list(islice(documents(0), 4_000)) for _ in range(2))
    assert first == second
    text = "\n".join(unmark(document)[0] for document in first)
    assert not [row for row in corpus.rows(4_000) if row["instruction"] in text]


def test_the_base_has_not_learned_the_tasks(model, tokenizer):
    tokenizer.padding_side = "left"
    rows = corpus.rows(96, seed=1)
    prompts = [tokenizer.apply_chat_template([user_turn(r)], add_generation_prompt=True, tokenize=False) for r in rows]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=16, do_sample=False)
    answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [
        corpus.check(row["category"], row["instruction"], row["input"], row["output"], answer)
        for row, answer in zip(rows, answers, strict=True)
    ]
    assert sum(right) <= 0.15 * len(rows)
