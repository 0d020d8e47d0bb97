"""Prompts are what training saw, and conversations lose whole turns."""

import pytest

from sheepfold.answering.prompts import Prompter
from sheepfold.config import DataSettings, ModelSettings
from sheepfold.data import templates
from sheepfold.data.rows import Message, Record
from sheepfold.data.tokenize import tokenize
from sheepfold.errors import DataError
from sheepfold.models import load_tokenizer

NAMES = ["chat", "alpaca", "alpaca_short", "alpaca_legacy", "vigogne", "plain", "vicuna", "baize"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSettings())


def prompter(tokenizer, name: str, positions: int | None = None) -> Prompter:
    return Prompter(templates.find(DataSettings(template=name), tokenizer), tokenizer, positions)


def talk(*texts: str) -> list[Message]:
    return [Message(role, text) for role, text in zip(["user", "assistant"] * len(texts), texts, strict=False)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", ["", "Anna has two hens."])
def test_a_records_prompt_is_what_training_put_before_its_answer(tokenizer, name, given):
    record = Record("How many hens has Anna?", "two", given)
    own = prompter(tokenizer, name)
    trained = tokenize([record], tokenizer, own.template, max_tokens=512).rows.prompt(0)
    assert own.of_record(record, 8).ids.tolist() == trained.tolist()


@pytest.mark.parametrize("name", ["chat", "vicuna", "baize"])
def test_a_conversations_prompt_is_what_training_put_before_its_last_answer(tokenizer, name):
    messages = talk("Name a bird.", "crow", "Name a fish.", "carp")
    own = prompter(tokenizer, name)
    record = Record("", "carp", messages=tuple(messages))
    trained = tokenize([record], tokenizer, own.template, max_tokens=512).rows.prompt(0)
    assert own.of_messages(messages[:-1], 8).ids.tolist() == trained.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_long_conversation_is_the_prompt_of_its_last_turns(tokenizer, name):
    messages = talk("Name a bird.", "crow", "Name a fish.", "carp", "Name a dog.")
    free = prompter(tokenizer, name)
    last_two, last = free.of_messages(messages[2:], 8), free.of_messages(messages[4:], 8)
    tight = prompter(tokenizer, name, len(last_two.ids) + 8)
    assert tight.of_messages(messages, 8).text == last_two.text
    assert tight.of_messages(messages, 8).dropped_turns == 1
    assert tight.of_messages(messages, 9).text == last.text
    assert free.of_messages(messages, 8, turns=1).text == last.text


def test_the_system_message_stays_when_turns_go(tokenizer):
    messages = [Message("system", "Be brief."), *talk("Name a bird.", "crow", "Name a fish.")]
    prompt = prompter(tokenizer, "chat").of_messages(messages, 8, turns=1)
    assert "Be brief." in prompt.text
    assert "crow" not in prompt.text


def test_plain_text_is_asked_as_it_is(tokenizer):
    assert prompter(tokenizer, "alpaca").of_text("Once upon", 8).text.endswith("Once upon")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "roles none"),
        (talk("a", "b"), "roles user, assistant"),
        ([Message("tool", "x")], "roles tool"),
        (talk("word " * 400), "positions"),
    ],
)
def test_what_cannot_be_asked_is_one_line(tokenizer, messages, words):
    with pytest.raises(DataError, match=words):
        prompter(tokenizer, "chat", 200).of_messages(messages, 8)


def test_an_empty_text_is_refused(tokenizer):
    with pytest.raises(DataError, match="empty"):
        prompter(tokenizer, "plain").of_text("", 8)
