"""A row's pieces: final text as soon as it is final, cut before the first stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.answering.streaming import Row, TokenScore
from sheepfold.config import ModelSettings
from sheepfold.models import load_tokenizer

TOKENIZER = load_tokenizer(ModelSettings())
TEXTS = st.text(alphabet="ab .é水🐑\n", max_size=30)
STOPS = st.lists(st.text(alphabet="ab .é水🐑\n", min_size=1, max_size=3), max_size=3)


def written(text: str, stop: list[str], lead: str = ""):
    """Return the pieces of a text's tokens, and the row."""
    row = Row(0, TOKENIZER, frozenset({3}), stop, lead)
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    taken = [row.take(token, TokenScore(token, "", -1.0)) for token in tokens if row.finished is None]
    pieces = [piece for piece in taken if piece is not None]
    if row.finished is None:
        pieces.append(row.end("length"))
    return pieces, row


@given(TEXTS, STOPS)
def test_the_pieces_are_the_text_before_its_first_stop_string(text, stop):
    pieces, row = written(text, stop)
    cut = min([at for s in stop if (at := text.find(s)) >= 0], default=len(text))
    said = "".join(piece.text for piece in pieces)
    # two stop strings may end in another order than they begin: the one that is whole first ends the answer
    whole_first = min([text.find(s) + len(s) for s in stop if s in text], default=None)
    if whole_first is None:
        assert said == text
        assert row.finished == "length"
    else:
        assert cut <= len(said) <= whole_first
        assert text.startswith(said)
        assert row.finished == "stop"


@given(TEXTS, STOPS)
def test_what_was_said_is_never_taken_back_and_no_half_character_is_shown(text, stop):
    pieces, row = written(text, stop)
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert [piece.finished for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert sum(len(piece.tokens) for piece in pieces) <= len(row.ids)


def test_a_beginning_stop_string_waits_until_it_is_none():
    pieces, _ = written("see abba", ["abc"])
    assert "".join(p.text for p in pieces) == "see abba"
    early = written("see ab", ["abc"])[0]
    assert not early[-2].text.endswith("ab") if len(early) > 1 else True
    assert early[-1].finished == "length"


@pytest.mark.parametrize(("text", "said"), [(" yes", "yes"), ("yes", "yes"), ("  yes", " yes")])
def test_what_a_template_begins_answers_with_is_no_part_of_them(text, said):
    assert "".join(p.text for p in written(text, [], lead=" ")[0]) == said


@given(st.text(alphabet="Ans is:", max_size=8), TEXTS)
def test_a_lead_of_any_length_is_no_part_of_the_answer(lead, text):
    assert "".join(p.text for p in written(lead + text, [], lead)[0]) == text
    assert "".join(p.text for p in written("@" + text, [], lead)[0]) == "@" + text


def test_the_end_token_ends_the_row_with_all_its_tokens():
    row = Row(0, TOKENIZER, frozenset({3}), [])
    row.take(TOKENIZER("hen", add_special_tokens=False)["input_ids"][0], TokenScore(1, "", -1.0))
    last = row.take(3, TokenScore(3, "", -1.0))
    assert (last.finished, row.finished) == ("stop", "stop")
