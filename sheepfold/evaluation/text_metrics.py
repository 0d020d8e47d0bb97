"""How good a generated answer is, row by row: exact match, ROUGE-L, or a function of your own.

A metric takes the record and the answer as text and returns a number; a score is the `Mean` over rows.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from sheepfold import plugins
from sheepfold.data.rows import Record
from sheepfold.errors import DataError
from sheepfold.metrics import Mean, merge

Metric = Callable[[Record, str], float]
"""(record, answer) -> the score of one row"""


def resolve(name: str) -> Metric:
    """Return the metric of this name, or of `module:function`; ConfigError lists the names for an unknown one."""
    metric: Metric = plugins.find(METRICS, name, "evaluation.metrics")
    return metric


def score(metric: Metric, records: Iterable[Record], answers: Iterable[str]) -> Mean:
    """Return the metric's mean over rows; its count is rows."""
    return merge(Mean(metric(record, answer), 1) for record, answer in zip(records, answers, strict=True))


def exact_match(record: Record, answer: str) -> float:
    """Return 1 where the normalised answer is the normalised reference, else 0.

    Rows of the built-in corpus that have many right answers (brainstorming, creative_writing) are judged by
    the corpus's own rule instead: any three animals, say. A row is one of those where its own reference
    passes the rule, so they are known from files too, and Dolly's rows of the same categories are compared as
    text.
    """
    if _has_rule(record):
        return float(_passes(record, answer))
    return float(normalise(answer) == normalise(record.output))


def rouge_l(record: Record, answer: str) -> float:
    """Return the F-measure, 0 to 1, of the longest common subsequence of words: rouge_score's rougeL, no stemming.

    Words are runs of a-z and 0-9 after lower-casing, as that package splits; an answer without any scores 0.
    Source: Lin, ROUGE, 2004, section 3.1.
    """
    return float(_scorer().score(record.output, answer)["rougeL"].fmeasure)


METRICS: dict[str, Metric] = {"exact_match": exact_match, "rouge_l": rouge_l}


def normalise(text: str) -> str:
    """Return the text casefolded, runs of white space as one space, outer space and one final period removed."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _has_rule(record: Record) -> bool:
    return record.category in ("brainstorming", "creative_writing") and _passes(record, record.output)


def _passes(record: Record, answer: str) -> bool:
    """Return whether the corpus's rule for the row accepts the answer; False where it has none for such a row."""
    from sheepfold.assets import corpus

    try:
        return corpus.check(record.category, record.instruction, record.input, record.output, answer)
    except (DataError, StopIteration):  # the instruction names no count, class or noun that the corpus knows
        return False


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # here, since it imports nltk

    return RougeScorer(["rougeL"], use_stemmer=False)
