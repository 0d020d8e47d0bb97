"""Numbers in answers, compared as numbers: 18, 18.00, $18 and "18." are one answer."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

NUMBER = re.compile(r"(?<!\d)[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A minus behind a digit is no sign: '10-3' holds 10 and 3."""
SAYS = re.compile(r"the answer is", re.IGNORECASE)


def number(text: str) -> Decimal | None:
    """Return the number that a text is, without its currency sign, thousands' commas and final stop; else None."""
    plain = text.strip().replace(",", "").replace("$", "").rstrip(".")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def answer_number(text: str) -> str:
    """Return the first number after the first 'the answer is', else the text's last number, as written; '' for none.

    Source: FederatedScope-LLM's eval_for_gsm8k, which then compares texts; we compare numbers.
    """
    said = SAYS.search(text)
    after = NUMBER.findall(text[said.end() :]) if said else []
    found = after[:1] or NUMBER.findall(text)[-1:]
    return str(found[0]) if found else ""


def gold_number(answer: str) -> Decimal | None:
    """Return the number of a GSM8K answer: what stands after '####', or the whole of it."""
    return number(answer.rpartition("####")[2])


def numeric_match(references: Sequence[str], predictions: Sequence[str], **_: Any) -> float:
    """Return 1 where the prediction is the reference's number, else 0: one of the harness's metrics."""
    gold, said = gold_number(references[0]), number(predictions[0])
    return float(gold is not None and gold == said)


def take_answer_numbers(responses: Sequence[Sequence[str]], documents: Sequence[Any]) -> list[list[str]]:
    """Return every response's answer_number: one of the harness's filters."""
    return [[answer_number(text) for text in of_one] for of_one in responses]
