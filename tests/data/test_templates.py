"""The public wordings, to the letter, and what a template refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from sheepfold.config import DataSettings
from sheepfold.data import templates
from sheepfold.data.rows import Message, Record
from sheepfold.data.turns import text_digest
from sheepfold.errors import ConfigError, DataError
from tests.data.conftest import make_tokenizer

WITH = Record("Name it.", "Rex", "a dog")
WITHOUT = Record("Name a dog.", "Rex")
TURNS = [("user", "Hi"), ("assistant", "Hello"), ("user", "How?"), ("assistant", "Fine")]
TALK = Record("Hi", "Fine", messages=tuple(Message(role, content) for role, content in TURNS))

# Written out here from the sources named in wordings.py, not taken from it.
BELOW = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
)
BELOW_SHORT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
PUBLISHED = {
    "alpaca": (
        BELOW + "### Instruction:\nName it.\n\n### Input:\na dog\n\n### Response:\n",
        BELOW_SHORT + "### Instruction:\nName a dog.\n\n### Response:\n",
        "Rex",
    ),
    "alpaca_legacy": (
        BELOW + "### Instruction:\nName it.\n\n### Input:\na dog\n\n### Response:",
        BELOW_SHORT + "### Instruction:\nName a dog.\n\n### Response:",
        "Rex",
    ),
    "alpaca_short": (
        "### Instruction:\nName it.\n\n### Input:\na dog\n\n### Response:\n",
        "### Instruction:\nName a dog.\n\n### Response:\n",
        "Rex",
    ),
    "vigogne": (
        "Ci-dessous se trouve une instruction qui décrit une tâche, associée à une entrée qui fournit un contexte "
        "supplémentaire. Écrivez une réponse qui complète correctement la demande.\n\n### Instruction:\nName it.\n\n"
        "### Entrée:\na dog\n\n### Réponse:\n",
        "Ci-dessous se trouve une instruction qui décrit une tâche. Écrivez une réponse qui complète correctement la "
        "demande.\n\n### Instruction:\nName a dog.\n\n### Réponse:\n",
        "Rex",
    ),
    "plain": ("Name it.\na dog\n", "Name a dog.\n", "Rex"),
    "vicuna": (
        f"{VICUNA} USER: Name it.\n\na dog ASSISTANT:",
        f"{VICUNA} USER: Name a dog. ASSISTANT:",
        " Rex",
    ),
    "baize": (
        "The conversation between human and AI assistant.\n[|Human|] Name it.\n\na dog\n[|AI|]",
        "The conversation between human and AI assistant.\n[|Human|] Name a dog.\n[|AI|]",
        " Rex",
    ),
}


def find(name: str, tokenizer: Any = None, **values: Any) -> templates.Template:
    return templates.find(DataSettings(template=name, **values), tokenizer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_wording_is_the_published_one(name: str) -> None:
    with_input, without, answer = PUBLISHED[name]
    assert find(name).turns(WITH) == [(with_input, answer)]
    assert find(name).turns(WITHOUT) == [(without, answer)]


def test_a_second_turn_of_vicuna_and_baize_continues_the_text() -> None:
    texts = find("vicuna").turns(TALK)
    assert "".join(text for turn in texts for text in turn) == (
        f"{VICUNA} USER: Hi ASSISTANT: HelloUSER: How? ASSISTANT: Fine"  # EOS, an id, stands between the turns
    )
    texts = find("baize").turns(TALK)
    assert "".join(text for turn in texts for text in turn) == (
        "The conversation between human and AI assistant.\n[|Human|] Hi\n[|AI|] Hello\n[|Human|] How?\n[|AI|] Fine"
    )


def test_the_chat_template_is_rendered_turn_by_turn() -> None:
    asked = "<s><|im_start|>user\nName it.\n\na dog<|im_end|>\n<|im_start|>assistant\n"
    chat = find("chat", make_tokenizer())
    assert chat.turns(WITH) == [(asked, "Rex<|im_end|>\n")]
    assert chat.turns(TALK) == [
        ("<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello<|im_end|>\n"),
        ("<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n", "Fine<|im_end|>\n"),
    ]


def test_a_system_message_has_its_place_or_is_refused() -> None:
    system = {"system": "Be brief."}
    assert (
        find("chat", make_tokenizer(), **system).turns(WITHOUT)[0][0].startswith("<s><|im_start|>system\nBe brief.<|im")
    )
    assert find("vicuna", **system).turns(WITHOUT)[0][0].startswith("Be brief. USER:")
    with pytest.raises(ConfigError, match=r"no effect with data\.template 'alpaca'; take chat or vicuna"):
        find("alpaca", **system)


def test_auto_is_the_chat_template_where_there_is_one() -> None:
    assert find("auto", make_tokenizer()).name == "chat"
    assert find("auto", make_tokenizer(chat=None)).name == "alpaca"
    with pytest.raises(ConfigError, match="no chat template"):
        find("chat", make_tokenizer(chat=None))


def test_a_chat_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}|{% endif %}{% endfor %}"
    )
    chat = find("chat", make_tokenizer(chat=forgetful))
    assert chat.turns(WITHOUT) == [("Name a dog.|", "Rex|")]
    with pytest.raises(DataError, match=r"rewrites earlier turns \(turn 2"):
        chat.turns(TALK)


def test_a_chat_template_that_refuses_is_one_line() -> None:
    chat = find("chat", make_tokenizer(chat="{{ raise_exception('System role not supported') }}"))
    with pytest.raises(DataError, match=r"System role not supported.*take another template") as error:
        chat.turns(WITHOUT)
    assert "\n" not in str(error.value)


def test_a_file_in_shepherds_format_is_a_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(
            {
                "description": "Mine.",
                "prompt_input": "{{Q}} {instruction} [{input}] A:",
                "prompt_no_input": "{{Q}} {instruction} A:",
                "response_split": "A:",
            }
        )
    )
    assert find(str(path)).turns(WITH) == [("{Q} Name it. [a dog] A:", "Rex")]
    assert find(str(path)).turns(Record("{braces} stay", "x")) == [("{Q} {braces} stay A:", "x")]


def mine(record: Record) -> tuple[str, str]:
    return f"{record.instruction} ->", record.output


def test_a_function_is_a_template() -> None:
    assert find("tests.data.test_templates:mine").turns(WITHOUT) == [("Name a dog. ->", "Rex")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "expected an object with prompt_input and prompt_no_input"),
        ('{"prompt_input": "a"}', "expected an object with prompt_input and prompt_no_input"),
        ('{"prompt_input": "a", "prompt_no_input": 3}', "prompt_no_input is a int"),
        ('{"prompt_input": "a", "prompt_no_input": "b", "respons_split": "c"}', "did you mean 'response_split'"),
        ('{"prompt_input": "a", "prompt_no_input": "{question}"}', "cannot fill in"),
    ],
)
def test_a_broken_template_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises((ConfigError, DataError)) as error:
        find(str(path)).turns(WITHOUT)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_what_a_format_has_no_words_for_is_refused() -> None:
    with pytest.raises(DataError, match="no wording for a second turn"):
        find("alpaca").turns(TALK)
    told = Record("a", "b", messages=(Message("system", "s"), Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(DataError, match="no place for a conversation's system message"):
        find("alpaca").turns(told)
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        find("alpacca")
    with pytest.raises(ConfigError, match="no template file"):
        find("nowhere.json")


def test_moving_a_letter_between_texts_changes_the_digest() -> None:
    digests = {
        text_digest(turns) for turns in ([[("ab", "c")]], [[("a", "bc")]], [[("a", "b")], [("", "c")]], [[("abc", "")]])
    }
    assert len(digests) == 4


def test_a_template_error_names_the_record_in_any_batch(tokenizer: Any) -> None:
    from sheepfold.data import tokenize

    picky = make_tokenizer(chat="{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}x")
    records = [Record("fine", "yes")] * (tokenize.BATCH_RECORDS + 5) + [Record("bad", "no")]
    with pytest.raises(DataError, match=f"record {tokenize.BATCH_RECORDS + 5}: "):
        list(tokenize._rows(records, picky, find("chat", picky)))
