"""What a model is asked: messages, a record or plain text in, ids out, tokenized as in training.

A conversation is trimmed by whole turns from the front until it and the answer fit the model's positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, tensor

from sheepfold.data.rows import Message, Record
from sheepfold.data.tokenize import bos_ids, prompt_ids, text_ids
from sheepfold.data.turns import Template
from sheepfold.data.wordings import Wording
from sheepfold.errors import DataError


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given to continue."""

    ids: Tensor
    """(tokens,) int64"""
    text: str
    """The ids as text, special tokens shown."""
    dropped_turns: int = 0
    """Turns from the front that did not fit, or were more than asked for."""
    lead: str = ""
    """What the template begins its answers with: no part of the answer."""


@dataclass(frozen=True, slots=True)
class Prompter:
    """Writes prompts for one base: its template, its tokenizer, its positions."""

    template: Template
    tokenizer: Any
    positions: int | None

    def of_messages(self, messages: Sequence[Message], max_new_tokens: int, turns: int | None = None) -> Prompt:
        """Return the prompt for a conversation that ends with a question, of at most its last `turns` turns.

        A turn is a question and, but for the last, its answer. A wording without a second turn repeats its first, as
        FederatedScope-LLM's chat does. Raises DataError for roles out of order, and where even the last turn alone
        leaves no room for max_new_tokens.
        """
        system, rest = _split(messages)
        count = len(rest) // 2 + 1
        keep = min(count, turns) if turns else count
        while True:
            kept = rest[2 * (count - keep) :]
            ids = self._conversation((*system, *kept))
            if keep == 1 or self._fits(len(ids), max_new_tokens):
                return self._prompt(ids, max_new_tokens, count - keep)
            keep -= 1

    def of_record(self, record: Record, max_new_tokens: int) -> Prompt:
        """Return the prompt that training put before the record's answer. Raises DataError where it does not fit."""
        if record.messages:
            return self.of_messages(record.messages[:-1], max_new_tokens)
        ids = prompt_ids(record, self.tokenizer, self.template)
        return self._prompt(ids, max_new_tokens)

    def of_text(self, text: str, max_new_tokens: int) -> Prompt:
        """Return plain text as a prompt, with BOS where the tokenizer puts it. Raises DataError: empty, or too long."""
        ids = [*bos_ids(self.tokenizer), *text_ids(text, self.tokenizer)]
        return replace(self._prompt(ids, max_new_tokens), lead="")

    def _conversation(self, messages: tuple[Message, ...]) -> list[int]:
        record = Record(messages[-1].content, "", messages=(*messages, Message("assistant", "")))
        template = self.template
        if isinstance(template, Wording) and len(messages) > 2 and not template.prompt_next:
            template = replace(template, prompt_next=template.prompt_no_input)
        return prompt_ids(record, self.tokenizer, template)

    def _fits(self, length: int, max_new_tokens: int) -> bool:
        return self.positions is None or length + max_new_tokens <= self.positions

    def _prompt(self, ids: list[int], max_new_tokens: int, dropped: int = 0) -> Prompt:
        if not ids:
            raise DataError("the prompt is empty: a model needs at least one token to go on from")
        if not self._fits(len(ids), max_new_tokens):
            raise DataError(
                f"the prompt has {len(ids):,} tokens and {max_new_tokens:,} are to follow, but the model has "
                f"{self.positions:,} positions; shorten the prompt, or ask for fewer new tokens"
            )
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Prompt(tensor(ids), text, dropped, getattr(self.template, "answer_lead", ""))


def _split(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the system message, if there is one, and the rest; raises DataError unless user and assistant alternate.

    The rest ends with a question.
    """
    opening = 1 if messages and messages[0].role == "system" else 0
    system, rest = tuple(messages[:opening]), tuple(messages[opening:])
    expected = ["user", "assistant"] * (len(rest) // 2) + ["user"]
    if [message.role for message in rest] != expected:
        raise DataError(
            f"messages: roles {', '.join(m.role for m in messages[:8]) or 'none'}; expected user and assistant in "
            "turns, beginning and ending with user, after at most one system message"
        )
    return system, rest
