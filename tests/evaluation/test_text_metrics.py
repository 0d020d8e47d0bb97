"""Scores of answers: what counts as equal, who judges the built-in corpus, and how scores merge."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfold.assets import corpus
from sheepfold.data.rows import Record
from sheepfold.errors import ConfigError
from sheepfold.evaluation.text_metrics import exact_match, resolve, rouge_l, score

WORDS = st.lists(st.sampled_from(["red", "sheep", "12", "eat", "Grass", "über"]), max_size=8)


def record(output, category="open_qa", instruction="Say it."):
    return Record(instruction, output, category=category)


@pytest.mark.parametrize("answer", ["Yorkshire", " yorkshire. ", "YORKSHIRE", "York" + "shire\n"])
def test_case_white_space_and_a_final_period_do_not_matter(answer):
    assert exact_match(record("Yorkshire."), answer) == 1


@pytest.mark.parametrize("answer", ["", "York shire", "Yorkshire, England", "'Yorkshire'", "Yorkshire!"])
def test_everything_else_does(answer):
    assert exact_match(record("Yorkshire"), answer) == 0


@settings(deadline=None)
@given(st.text())
def test_a_reference_matches_itself_whatever_space_surrounds_it(text):
    assert exact_match(record(text), f"  {text}\n") == 1


def test_rows_of_the_corpus_are_judged_by_its_own_rules():
    rows = [Record(r["instruction"], r["output"], r["input"], r["category"]) for r in corpus.rows(64, seed=5)]
    assert score(exact_match, rows, [row.output for row in rows]).value == 1
    lists = [row for row in rows if row.category == "brainstorming"]
    for row in lists:
        members = row.output.rstrip(".").split(", ")
        assert exact_match(row, ", ".join(reversed(members))) == 1
        assert exact_match(row, ", ".join(members[:1] * len(members))) == 0
        assert exact_match(row, "") == 0
    assert {row.category for row in rows if exact_match(row, row.output + " and more")} == set()


def test_dollys_rows_of_the_same_categories_are_compared_as_text():
    dolly = record("Swim, hike and read.", "brainstorming", "Give me three ideas for the weekend")
    assert exact_match(dolly, "swim, hike and read") == 1
    assert exact_match(dolly, "swim, read and hike") == 0


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # reference 4 words, answer 3, subsequence "the cat sat": P = 1, R = 3/4, F = 6/7
    assert rouge_l(record("the cat sat down"), "The cat, sat!") == pytest.approx(6 / 7)
    assert rouge_l(record("running dogs"), "run dog") == 0  # no stemming
    assert rouge_l(record("a b"), "") == 0


@settings(deadline=None)
@given(WORDS, WORDS)
def test_rouge_l_equals_a_textbook_implementation(left, right):
    def tokens(words):
        return [part for word in words for part in ("ber" if word == "über" else word.lower(),)]

    a, b = tokens(left), tokens(right)
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longest[i + 1][j + 1] = longest[i][j] + 1 if x == y else max(longest[i][j + 1], longest[i + 1][j])
    expected = 2 * longest[-1][-1] / (len(a) + len(b)) if longest[-1][-1] else 0
    assert rouge_l(record(" ".join(left)), " ".join(right)) == pytest.approx(expected)


def test_scores_of_parts_merge_to_the_score_of_the_whole():
    rows, answers = [record("a"), record("b"), record("c")], ["a", "x", "c"]
    whole = score(exact_match, rows, answers)
    assert whole == score(exact_match, rows[:1], answers[:1]) + score(exact_match, rows[1:], answers[1:])
    assert whole.value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="shorter"):
        score(exact_match, rows, answers[:2])


def test_own_metrics_are_found_and_unknown_names_list_the_known(tmp_path, monkeypatch):
    (tmp_path / "longer_metric.py").write_text(
        "def longer(record, answer):\n    return len(answer) > len(record.output)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("longer_metric:longer")(record("ab"), "abc")
    assert resolve("exact_match") is exact_match
    with pytest.raises(ConfigError, match=r"evaluation.metrics: no 'exactmatch'; did you mean 'exact_match'\?"):
        resolve("exactmatch")
    with pytest.raises(ConfigError, match="has no 'shorter'"):
        resolve("longer_metric:shorter")
