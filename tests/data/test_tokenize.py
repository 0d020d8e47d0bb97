"""Tokens: prompt ids and answer ids joined, masked exactly, cut as asked, and never made twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sheepfold.config import DataSettings
from sheepfold.data import templates, token_cache
from sheepfold.data.rows import Message, Record
from sheepfold.data.tokenize import Tokenized, bos_ids, cut_row, join, tokenize
from sheepfold.errors import DataError
from tests.data.conftest import make_tokenizer

BOS, EOS = 1, 2
RECORDS = [Record("Name a dog.", "Rex"), Record("Add.", "3, the answer", "1 2"), Record("Say é", "é ✓")]
TURNS = [("user", "Hi"), ("assistant", "Hello"), ("user", "How?"), ("assistant", "Fine")]
TALK = Record("Hi", "Fine", messages=tuple(Message(role, content) for role, content in TURNS))


def tokens(records: list[Record], tokenizer: Any, template: str = "alpaca", **values: Any) -> Tokenized:
    found = templates.find(DataSettings(template=template), tokenizer)
    return tokenize(records, tokenizer, found, **({"max_tokens": 512} | values))


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("template", ["alpaca", "alpaca_legacy", "plain", "vicuna", "baize"])
def test_a_row_is_bos_prompt_answer_eos(tokenizer: Any, template: str) -> None:
    rows = tokens(RECORDS, tokenizer, template).rows
    for i, record in enumerate(RECORDS):
        [(prompt, answer)] = templates.find(DataSettings(template=template), tokenizer).turns(record)
        before, after = [BOS, *encode(tokenizer, prompt)], [*encode(tokenizer, answer), EOS]
        ids, labels = rows.row(i)
        assert ids.tolist() == before + after
        assert labels.tolist() == [-100] * len(before) + after
        assert rows.prompt(i).tolist() == before


def test_the_border_is_exact_where_a_tokenizer_would_merge_across_it(tokenizer: Any) -> None:
    prompt, answer = "the ans", "wer is"
    assert encode(tokenizer, prompt + answer) != encode(tokenizer, prompt) + encode(tokenizer, answer)
    own = templates.Own("own", lambda record: (record.instruction, record.output))
    ids, labels = tokenize([Record(prompt, answer)], tokenizer, own, max_tokens=99).rows.row(0)
    assert ids.tolist() == [BOS, *encode(tokenizer, prompt), *encode(tokenizer, answer), EOS]
    assert ids[labels >= 0].tolist() == [*encode(tokenizer, answer), EOS]


def test_a_tokenizer_that_begins_every_text_with_a_space_gets_no_second_one() -> None:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["the dog is Rex: a b"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    own = templates.Own("own", lambda record: (record.instruction, record.output))
    for answer in ("Rex", " Rex"):
        ids, labels = tokenize([Record("the dog is:", answer)], tokenizer, own, max_tokens=99).rows.row(0)
        assert "".join(tokenizer.convert_ids_to_tokens(ids[labels >= 0].tolist())) == "▁Rex</s>"


def test_a_tokenizer_without_bos_gets_none() -> None:
    tokenizer = make_tokenizer(bos=False)
    assert bos_ids(tokenizer) == []
    assert tokens(RECORDS[:1], tokenizer).rows.row(0)[0].tolist()[0] != BOS


def test_the_chat_template_brings_its_own_bos_and_gets_one_eos_at_the_end(tokenizer: Any) -> None:
    ids, labels = tokens([TALK], tokenizer, "chat").rows.row(0)
    assert ids.tolist().count(BOS) == ids.tolist().count(EOS) == 1
    assert ids.tolist()[-1] == EOS
    assert tokenizer.decode(ids[labels >= 0]) == "Hello<|im_end|>\nFine<|im_end|>\n</s>"
    assert tokenizer.decode(tokens([TALK], tokenizer, "chat").rows.prompt(0)).endswith("assistant\n")


def test_a_chat_template_whose_turns_end_with_eos_gets_no_second_one() -> None:
    end = "{% if m['role'] == 'assistant' %}</s>{% else %}|{% endif %}"
    ending = "{% for m in messages %}{{ m['content'] }}" + end + "{% endfor %}"
    ids = tokens([TALK], make_tokenizer(chat=ending), "chat").rows.row(0)[0].tolist()
    assert ids.count(EOS) == 2
    assert ids[-1] == EOS


def test_every_answer_of_a_conversation_is_a_target_and_ends(tokenizer: Any) -> None:
    ids, labels = tokens([TALK], tokenizer, "vicuna").rows.row(0)
    assert tokenizer.decode(ids[labels >= 0]) == " Hello</s> Fine</s>"


def test_train_on_inputs_learns_the_prompt_too(tokenizer: Any) -> None:
    rows = tokens(RECORDS, tokenizer, train_on_inputs=True).rows
    ids, labels = rows.row(0)
    assert (ids == labels).all()
    assert (rows.target_tokens() == rows.lengths() - 1).all()


def test_bad_tokenizers_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        tokens(RECORDS, tokenizer)


# ── cutting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def row(prompt: int, answer: int) -> tuple[list[int], list[bool], int]:
    return join([(list(range(10, 10 + prompt)), list(range(50, 50 + answer)))], [BOS], EOS)


def test_a_right_cut_takes_the_end_and_a_left_cut_the_front_of_the_prompt() -> None:
    (ids, target, prompt), was_cut = cut_row(row(5, 2), 7, "right", keep=1)
    assert (ids, sum(target), prompt, was_cut) == ([BOS, 10, 11, 12, 13, 14, 50], 1, 6, True)
    (ids, target, prompt), was_cut = cut_row(row(5, 2), 7, "left", keep=1)
    assert (ids, sum(target), prompt, was_cut) == ([BOS, 12, 13, 14, 50, 51, EOS], 3, 4, True)


def test_a_left_cut_shortens_an_answer_only_when_no_prompt_is_left() -> None:
    (ids, target, prompt), _ = cut_row(row(5, 9), 4, "left", keep=1)
    assert (ids, target, prompt) == ([BOS, 50, 51, 52], [False, True, True, True], 1)


@given(
    prompt=st.integers(0, 20),
    answer=st.integers(0, 20),
    most=st.integers(2, 30),
    cut=st.sampled_from(["left", "right"]),
)
def test_a_cut_row_fits_and_keeps_its_order(prompt: int, answer: int, most: int, cut: str) -> None:
    whole = row(prompt, answer)
    (ids, target, before), was_cut = cut_row(whole, most, cut, keep=1)
    assert len(ids) == len(target) == min(most, len(whole[0]))
    assert was_cut == (len(whole[0]) > most)
    assert sorted(ids, key=whole[0].index) == ids
    assert before == len(ids) - sum(target)
    assert ids[0] == BOS
    if cut == "left":
        assert any(target)


def test_rows_that_lose_their_answer_are_counted_as_cut_and_targetless(tokenizer: Any) -> None:
    records = [Record("long " * 40, "x"), Record("a", "b")]
    right, left = (tokens(records, tokenizer, "plain", max_tokens=20, cut=cut).rows for cut in ("right", "left"))
    assert right.cut.tolist() == left.cut.tolist() == [True, False]
    assert right.target_tokens().tolist() == [0, 2]
    assert left.target_tokens().tolist() == [2, 2]


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Mute:
    """A tokenizer that may be asked about, and never used."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("tokenized again")


Mute.__name__ = "TokenizersBackend"  # the class's name is part of what a tokenizer is


def same(first: Tokenized, second: Tokenized) -> bool:
    names = ("ids", "is_target", "offsets", "prompt_tokens", "cut")
    return all(np.array_equal(getattr(first.rows, name), getattr(second.rows, name)) for name in names)


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_second_start_tokenizes_nothing(tokenizer: Any, tmp_path: Path, template: str) -> None:
    Mute.__name__ = type(tokenizer).__name__
    first = tokens(RECORDS, tokenizer, template, cache=tmp_path)
    second = tokens(RECORDS, Mute(tokenizer), template, cache=tmp_path)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert same(first, second)
    assert not second.rows.ids.flags.owndata
    assert not second.rows.ids.flags.writeable


def test_padding_and_truncation_of_other_calls_do_not_miss_the_cache(tokenizer: Any, tmp_path: Path) -> None:
    tokens(RECORDS, tokenizer, cache=tmp_path)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokens(RECORDS, tokenizer, cache=tmp_path).from_cache


@pytest.mark.parametrize(
    "changed",
    [
        {"records": [*RECORDS, Record("a", "b")]},
        {"records": [Record("Name a dog.R", "ex"), *RECORDS[1:]]},
        {"template": "alpaca_short"},
        {"template": "chat"},
        {"max_tokens": 511},
        {"cut": "left"},
        {"tokenizer": make_tokenizer(bos=False)},
    ],
)
def test_whatever_changes_the_tokens_changes_the_fingerprint(tokenizer: Any, changed: dict[str, Any]) -> None:
    usual = {"records": RECORDS, "tokenizer": tokenizer}
    assert tokens(**usual).fingerprint != tokens(**(usual | changed)).fingerprint


def test_the_chat_templates_own_wording_and_system_are_in_the_fingerprint() -> None:
    one, other = make_tokenizer(), make_tokenizer(chat="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert tokens(RECORDS, one, "chat").fingerprint != tokens(RECORDS, other, "chat").fingerprint
    told = templates.find(DataSettings(template="chat", system="Be brief."), one)
    assert tokenize(RECORDS, one, told, max_tokens=512).fingerprint != tokens(RECORDS, one, "chat").fingerprint


@pytest.mark.parametrize("damage", ["cut short", "one byte", "empty", "other"])
def test_a_damaged_cache_file_is_made_again(tokenizer: Any, tmp_path: Path, damage: str) -> None:
    first = tokens(RECORDS, tokenizer, cache=tmp_path)
    [path] = (tmp_path / "tokens").iterdir()
    content = bytearray(path.read_bytes())
    expected = first.rows.ids.astype(np.int32).tobytes()
    content[content.find(expected)] ^= 1
    path.unlink()  # a new inode, so the first rows' memory map stays whole
    path.write_bytes({"cut short": content[:-300], "one byte": content, "empty": b"", "other": b"hello" * 99}[damage])
    again = tokens(RECORDS, tokenizer, cache=tmp_path)
    assert not again.from_cache
    assert same(first, again)
    assert tokens(RECORDS, tokenizer, cache=tmp_path).from_cache


def test_a_cache_folder_that_cannot_be_written_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"token cache .*cannot be written.*SHEEPFOLD_CACHE") as error:
        tokens(RECORDS, tokenizer, cache=tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_no_half_written_file_is_left_behind(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.os, "replace", full)
    with pytest.raises(DataError, match="No space left on device"):
        tokens(RECORDS, tokenizer, cache=tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_the_cache_folder_is_the_setting_else_the_variable_else_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHEEPFOLD_CACHE", "/tmp/elsewhere")
    assert token_cache.folder("/tmp/here") == Path("/tmp/here")
    assert token_cache.folder(None) == Path("/tmp/elsewhere")
    monkeypatch.delenv("SHEEPFOLD_CACHE")
    assert token_cache.folder(None) == Path.home() / ".cache" / "sheepfold"
