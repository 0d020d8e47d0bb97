"""The corpus keeps its promises: one stream a seed, no row twice, and checkers that judge."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.assets import corpus, world
from sheepfold.errors import DataError

ROWS = corpus.rows(2_400, seed=0)
BY_CATEGORY = defaultdict(list)
for _row in ROWS:
    BY_CATEGORY[_row["category"]].append(_row)


def judged(row: corpus.Row, answer: str) -> bool:
    return corpus.check(row["category"], row["instruction"], row["input"], row["output"], answer)


def one(category: str, containing: str = "") -> corpus.Row:
    return next(row for row in BY_CATEGORY[category] if containing in row["instruction"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 5))
def test_a_shorter_draw_is_a_prefix_of_a_longer_one(n, m, seed):
    assert corpus.rows(n + m, seed)[:n] == corpus.rows(n, seed)


def test_the_first_row_is_the_same_on_every_platform():
    assert ROWS[0] == {
        "instruction": "Invent a verse about the moon in five words.",
        "input": "",
        "output": "the lonely moon wanders tonight",
        "category": "creative_writing",
    }


def test_seeds_differ():
    assert corpus.rows(80, seed=1) != ROWS[:80]


def test_no_prompt_occurs_twice_up_to_the_last_row():
    prompts = [(row["instruction"], row["input"]) for row in corpus.rows(corpus.MAX_ROWS)]
    assert len(set(prompts)) == corpus.MAX_ROWS


@pytest.mark.parametrize("count", [-1, corpus.MAX_ROWS + 1])
def test_a_count_out_of_range_is_refused(count):
    with pytest.raises(DataError, match="expected 0 to"):
        corpus.rows(count)


def test_the_categories_are_those_of_dolly_and_balanced():
    assert Counter(row["category"] for row in ROWS) == dict.fromkeys(corpus.CATEGORIES, 300)
    assert set(corpus.CATEGORIES) == {
        "open_qa", "closed_qa", "classification", "information_extraction", "summarization", "brainstorming",
        "creative_writing", "general_qa",
    }  # fmt: skip


def test_every_reference_is_right_as_it_stands_and_with_loose_writing():
    for row in ROWS:
        assert judged(row, row["output"]), row
        assert judged(row, f"  {row['output'].upper()}. "), row


@pytest.mark.parametrize("category", corpus.CATEGORIES)
def test_no_constant_answer_is_right_more_than_a_third_of_the_time(category):
    rows = BY_CATEGORY[category]
    for answer, _ in Counter(row["output"] for row in rows).most_common(5):
        assert sum(judged(row, answer) for row in rows) <= 0.35 * len(rows), answer


@pytest.mark.parametrize("category", corpus.CATEGORIES)
def test_empty_and_echoed_and_foreign_answers_are_wrong(category):
    others = [row for name in corpus.CATEGORIES if name != category for row in BY_CATEGORY[name][:3]]
    for row in BY_CATEGORY[category][:60]:
        for answer in ("", row["instruction"], row["input"], row["output"] + " " + row["output"], "I do not know"):
            assert not judged(row, answer), (row, answer)
        wrong = [other for other in others if judged(row, other["output"])]
        assert all(normal(other) == normal(row) for other in wrong), (row, wrong)


def normal(row: corpus.Row) -> str:
    return corpus.normalise(row["output"])


def test_another_person_s_fact_is_wrong():
    row = one("open_qa")
    values = next(v for v in world.ATTRIBUTES.values() if row["output"] in v)
    assert [value for value in values if judged(row, value)] == [row["output"]]


def test_another_place_or_field_of_the_same_input_is_wrong():
    row = one("closed_qa")
    assert [place for place in world.PLACES if judged(row, place)] == [row["output"]]
    row = one("information_extraction")
    values = [part.split(": ")[1] for part in row["input"].split("; ")]
    assert [value for value in values if judged(row, value)] == [row["output"]]


def test_another_label_is_wrong():
    row = one("classification")
    assert [name for name in world.CLASSES if judged(row, name)] == [row["output"]]


def test_a_summary_must_say_who_did_what():
    row = one("summarization")
    who, deed, _, thing = row["output"].split()
    assert not judged(row, f"{who} {deed}")
    assert not judged(row, f"{thing} {deed} the {who}")
    assert not judged(row, row["input"].split(". ")[0])


def test_brainstorming_takes_any_distinct_members_and_nothing_else():
    row = one("brainstorming", "three animals")
    assert judged(row, "goat, hen, fox")
    assert judged(row, "Fox, Sheep, Bear.")
    for wrong in (
        "goat, hen",
        "goat, hen, hen",
        "goat, hen, oak",
        "goat hen fox",
        "goat, hen, fox, bear",
        "goat, hen, ",
    ):
        assert not judged(row, wrong), wrong


def test_creative_writing_takes_any_line_in_form_and_nothing_else():
    row = {"category": "creative_writing", "instruction": "Write a poem line of four words about the moon."}
    row |= {"input": "", "output": "the old moon sings"}
    assert judged(row, "My moon, my night") is False  # a word twice
    assert judged(row, "Softly the moon wakes")
    for wrong in (
        "the moon sings",
        "the old sun sings",
        "moon moon moon moon",
        "the old\nmoon sings",
        "the 2 moon sings",
    ):
        assert not judged(row, wrong), wrong


def test_general_qa_has_its_three_kinds():
    for wording, wrong in (("larger", "9"), ("opposite", "wide"), ("a kind of", "maybe")):
        assert not judged(one("general_qa", wording), wrong)


def test_an_unknown_category_is_named_with_its_nearest():
    with pytest.raises(DataError, match="did you mean 'open_qa'"):
        corpus.check("open_q", "", "", "", "")


def test_instructions_of_different_categories_share_no_wording():
    openings = defaultdict(set)
    for row in ROWS:
        openings[" ".join(row["instruction"].split()[:3])].add(row["category"])
    shared = {opening: names for opening, names in openings.items() if len(names) > 1}
    assert not shared


def test_classes_are_disjoint_and_every_person_has_every_fact():
    assert len(world.CLASS_OF) == sum(map(len, world.CLASSES.values())) == 8 * 16
    assert len(world.FACTS) == len(world.PEOPLE) * len(world.ATTRIBUTES) == 192
