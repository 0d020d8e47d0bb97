"""A conversation as a value: what is shown to the model, who answers, and that the model stops when it is told to."""

import threading
import time
from dataclasses import replace

import pytest

from sheepfold.chat import about
from sheepfold.chat.controls import RANGES, Controls, from_values, idle
from sheepfold.chat.handlers import Ask, Talk
from sheepfold.chat.session import MOST_CHARACTERS, Exchange, chat_prompt, instruction_prompt, replies
from sheepfold.data.rows import Record
from sheepfold.errors import ConfigError, DataError

BRIEF = Controls(new_tokens=8)
PAST = tuple(Exchange(f"Question {i}?", f"Answer {i}.", "base") for i in range(6))


def last(iterator):
    *_, final = iterator
    return final


def test_a_side_is_shown_its_last_turns_whole_and_told_how_many_were_left_out(answering):
    prompt = chat_prompt(answering, PAST, "And now?", replace(BRIEF, turns=2))
    assert prompt.dropped_turns == 4
    assert all(f"Question {i}?" in prompt.text and f"Answer {i}." in prompt.text for i in (4, 5))
    assert "Question 3?" not in prompt.text
    assert "Answer 3." not in prompt.text
    assert prompt.text == chat_prompt(answering, PAST[4:], "And now?", BRIEF).text


def test_without_remembered_turns_a_question_stands_alone(answering):
    alone = chat_prompt(answering, (), "And now?", BRIEF)
    assert chat_prompt(answering, PAST, "And now?", replace(BRIEF, turns=0)).text == alone.text


def test_turns_that_do_not_fit_the_context_are_dropped_whole(answering):
    long = tuple(Exchange(f"Turn {i} " + "word " * 300, "yes", "base") for i in range(5))
    prompt = chat_prompt(answering, long, "And now?", replace(BRIEF, turns=20))
    assert 0 < prompt.dropped_turns < 5
    assert len(prompt.ids) + BRIEF.new_tokens <= answering.max_positions
    assert prompt.text == chat_prompt(answering, long[prompt.dropped_turns :], "And now?", BRIEF).text


@pytest.mark.parametrize(
    ("question", "message"),
    [("  \n", "nothing is asked"), ("word " * 2000, "positions"), ("x" * (MOST_CHARACTERS + 1), "characters")],
)
def test_a_question_that_cannot_be_asked_is_one_clear_line(answering, question, message):
    for make in (lambda: chat_prompt(answering, (), question, BRIEF), lambda: instruct(answering, question)):
        with pytest.raises(DataError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


def instruct(answering, question):
    return instruction_prompt(answering, question, "", BRIEF)


def test_an_instruction_is_asked_as_in_training(answering):
    prompt = instruction_prompt(answering, "Sum up.", "It rained.", BRIEF)
    record = Record("Sum up.", "", "It rained.")
    assert prompt.ids.equal(answering.prompt_of(record, 8).ids)


@pytest.mark.parametrize("controls", [BRIEF, replace(BRIEF, temperature=0.8, seed=3), replace(BRIEF, beams=3)])
def test_sides_answer_together_as_each_does_alone(answering, controls):
    names = ["base", "federated", "client:client-1"]
    prompt = chat_prompt(answering, (), "Name three animals.", controls)
    together = last(replies(answering, [prompt] * 3, names, controls))
    alone = [last(replies(answering, [prompt], [name], controls))[0] for name in names]
    assert [r.text for r in together] == [r.text for r in alone]
    assert [r.end for r in together] == [r.end for r in alone]
    whole = answering.answer([prompt] * 3, names, controls.generation(), seed=controls.seed)
    assert [r.text for r in together] == [answer.text for answer in whole]
    assert together[0].text != together[1].text, "this run taught nothing, so the test shows nothing"


def test_answers_grow_and_never_change_what_was_said(answering):
    prompt = chat_prompt(answering, (), "Name three animals.", BRIEF)
    before = ["", ""]
    steps = 0
    for growing in replies(answering, [prompt] * 2, ["base", "federated"], BRIEF):
        steps += 1
        assert all(reply.text.startswith(said) for reply, said in zip(growing, before, strict=True))
        before = [reply.text for reply in growing]
    assert steps > 3


def test_each_side_goes_on_from_its_own_answers(answering):
    asked = Ask(answering, ["base", "federated"], BRIEF)
    talk = last(asked.chat(Talk(), "Name three animals."))
    talk = last(asked.chat(talk, "And one more?"))
    for past, reply in zip(talk.pasts, talk.replies, strict=True):
        assert [turn.question for turn in past] == ["Name three animals.", "And one more?"]
        assert past[0].answer in reply.prompt.text
    assert talk.replies[0].prompt.text != talk.replies[1].prompt.text


def test_asking_again_answers_the_last_question_from_the_same_past(answering):
    asked = Ask(answering, ["base", "federated"], BRIEF)
    once = last(asked.chat(Talk(), "Name three animals."))
    twice = last(asked.chat(once, "And one more?"))
    before, question = twice.before_last()
    assert before.pasts == once.pasts
    assert last(asked.chat(before, question)).pasts == twice.pasts
    with pytest.raises(DataError, match="nothing was asked"):
        Talk().before_last()


def test_a_stop_ends_the_model_and_keeps_what_was_said(answering):
    long = replace(BRIEF, new_tokens=900, temperature=1.0)
    halt = threading.Event()
    prompt = chat_prompt(answering, (), "Tell me about the goose.", long)
    growing = replies(answering, [prompt] * 2, ["base", "base"], long, halted=halt.is_set)
    next(growing)
    next(growing)
    halt.set()
    final = last(growing)
    assert "halted" in {reply.end for reply in final}
    assert "Stopped." in " ".join(reply.note(long) for reply in final)
    assert frees(answering)


def test_leaving_in_the_middle_frees_the_model(answering):
    long = replace(BRIEF, new_tokens=900, temperature=1.0)
    growing = replies(answering, [chat_prompt(answering, (), "Tell me.", long)], ["federated"], long)
    next(growing)
    growing.close()
    assert frees(answering)


def frees(answering) -> bool:
    """Return whether the model answers somebody else at once."""
    started = time.monotonic()
    prompt = chat_prompt(answering, (), "Hello?", replace(BRIEF, new_tokens=1))
    last(replies(answering, [prompt], ["base"], replace(BRIEF, new_tokens=1)))
    return time.monotonic() - started < 2


def test_a_note_says_what_became_of_an_answer(answering):
    prompt = chat_prompt(answering, PAST, "Name three animals.", replace(BRIEF, turns=5))
    controls = replace(BRIEF, new_tokens=1)
    (reply,) = last(replies(answering, [prompt], ["base"], controls))
    assert reply.remarks(controls) == "1 earlier turn was not shown to the model. Cut off at 1 new token."


def test_the_first_answers_are_greedy():
    generation = Controls().generation()
    assert (generation.temperature, generation.top_p, generation.top_k, generation.beams) == (0, 1, 0, 1)


def test_controls_without_effect_have_none():
    searched = Controls(temperature=0.7, top_p=0.5, top_k=3, beams=4).generation()
    assert (searched.temperature, searched.top_p, searched.top_k, searched.beams) == (0, 1, 0, 4)
    greedy = Controls(temperature=0, top_p=0.5, top_k=3).generation()
    assert (greedy.top_p, greedy.top_k) == (1, 0)
    assert idle(0, 1) == {"top_p", "top_k", "seed"}
    assert idle(0.7, 4) == {"temperature", "top_p", "top_k", "seed"}
    assert not idle(0.7, 1)


@pytest.mark.parametrize("name", RANGES)
def test_a_control_out_of_its_range_is_one_clear_line(name):
    for text in (str(RANGES[name].high + 1), str(RANGES[name].low - 1), "nan", "a lot"):
        with pytest.raises(ConfigError, match=name):
            Controls().with_text(name, text)
    with pytest.raises(ConfigError, match="is empty"):
        from_values({name: None})


def test_what_is_loaded_is_said_in_one_line(answering):
    line = about.loaded(answering)
    assert line == ("base builtin:tiny · adapters: federated, 4 of clients' own · 2 rounds of fedavg · cpu, float32")


def test_examples_are_held_out_rows_of_many_categories(answering):
    from sheepfold.data.prepare import partition_only

    data = partition_only(answering.source.data)
    trained = {data.records[i].instruction + data.records[i].input for c in data.clients.values() for i in c.train}
    shown = about.examples(answering.source)
    assert len({record.category for record in shown}) == len(shown) > 3
    assert not trained & {record.instruction + record.input for record in shown}
    assert about.examples(replace(answering.source, run=None)) == []
