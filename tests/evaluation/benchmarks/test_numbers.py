"""Numbers compared as numbers."""

import pytest

from sheepfold.evaluation.benchmarks.numbers import answer_number, number, numeric_match


@pytest.mark.parametrize("said", ["18", "18.00", "$18", "18.", " $18.00 ", "+18", "18.0"])
def test_one_number_written_in_many_ways_is_one_number(said):
    assert numeric_match(references=["9 + 9 = 18\n#### 18"], predictions=[said]) == 1


@pytest.mark.parametrize("said", ["", "[invalid]", "81", "18.01", "-18", "..", "$", "1e400000000", "nan", "eighteen"])
def test_what_is_another_number_or_none_does_not_match(said):
    assert numeric_match(references=["#### 18"], predictions=[said]) == 0


def test_commas_of_thousands_mean_nothing():
    assert numeric_match(references=["#### 1,800"], predictions=["1800.00"]) == 1
    assert number("1,234,567.5") == number("1234567.50")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("First 3 and 4. The answer is 7. Then 9 more.", "7"),
        ("THE ANSWER IS: $1,800.00.", "$1,800.00"),
        ("5 - 3 leaves 2 of them.", "2"),
        ("It costs 1,250.", "1,250"),
        ("The answer is unknown, maybe.", ""),
        ("The answer is unknown, but not 5", "5"),
        ("10-3", "3"),
        ("about .5", ".5"),
        ("The answer is -4 degrees", "-4"),
        ("none", ""),
    ],
)
def test_the_number_after_the_answer_is_else_the_last_one(text, found):
    assert answer_number(text) == found
