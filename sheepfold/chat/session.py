"""One conversation, as page and terminal have it: who answers, what they are shown, and the answers as they come.

Every side has a past of its own, since each adapter goes on from its own answers:

    question ─┬─ left's past  ─ prompt ─┐                         ┌─ left's answer  ─ left's past
              └─ right's past ─ prompt ─┴─ one batch of the model ┴─ right's answer ─ right's past
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sheepfold.chat.controls import Controls
from sheepfold.data.rows import Message, Record
from sheepfold.errors import DataError, ModelError

if TYPE_CHECKING:
    from sheepfold.answering.model import Answering
    from sheepfold.answering.prompts import Prompt
    from sheepfold.answering.streaming import Piece

MOST_CHARACTERS = 100_000
"""A question longer than this fits no context, and would only keep the tokenizer busy."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One turn of one side: what was asked, and what was answered by whom."""

    question: str
    answer: str
    name: str


Past = tuple[Exchange, ...]
"""One side's conversation so far, oldest first."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One side's answer as far as it has come."""

    name: str
    prompt: "Prompt"
    text: str = ""
    end: str | None = None
    """None while it goes on; stop: it ended itself; length: cut at the last new token; halted: by the user."""
    seconds: float = 0.0
    """Since the question."""

    def note(self, controls: Controls) -> str:
        """Return how the answer stands: its time, and what a reader should know of it."""
        took = f"{self.seconds:.1f} s." if self.seconds >= 0.1 else "Under 0.1 s."
        stands = took if self.end else "Answering…"
        return " ".join(filter(None, (stands, self.remarks(controls))))

    def remarks(self, controls: Controls) -> str:
        """Return what a reader should know of this answer, '' where there is nothing."""
        remarks = []
        if self.prompt.dropped_turns:
            remarks.append(f"{_turns(self.prompt.dropped_turns)} not shown to the model.")
        if self.end == "length":
            remarks.append(f"Cut off at {controls.new_tokens:,} new token{'s' * (controls.new_tokens > 1)}.")
        if self.end == "halted":
            remarks.append("Stopped.")
        if self.end == "stop" and not self.text.strip():
            remarks.append("An empty answer.")
        return " ".join(remarks)

    def exchange(self, question: str) -> Exchange:
        """Return the turn that this answer ends."""
        return Exchange(question, self.text, self.name)


def chat_prompt(answering: "Answering", past: Past, question: str, controls: Controls) -> "Prompt":
    """Return what a side is shown: as many of its last turns as asked for and as fit, whole ones, and the question.

    Raises DataError for a question that is empty, or does not fit by itself.
    """
    _check(question)
    messages = [m for turn in past for m in (Message("user", turn.question), Message("assistant", turn.answer))]
    return answering.prompt([*messages, Message("user", question)], controls.new_tokens, turns=controls.turns + 1)


def instruction_prompt(answering: "Answering", instruction: str, input: str, controls: Controls) -> "Prompt":
    """Return an instruction's prompt, as in training; raises DataError as `chat_prompt` does."""
    _check(instruction, "an instruction")
    _check(input or "none")
    return answering.prompt_of(Record(instruction, "", input), controls.new_tokens)


def _check(text: str, what: str = "a question") -> None:
    if not text.strip():
        raise DataError(f"nothing is asked: write {what} first")
    if len(text) > MOST_CHARACTERS:
        raise DataError(f"{len(text):,} characters are more than the {MOST_CHARACTERS:,} that are read at once")


def replies(
    answering: "Answering",
    prompts: Sequence["Prompt"],
    names: Sequence[str],
    controls: Controls,
    *,
    halted: Callable[[], bool] = lambda: False,
    every_s: float = 0.0,
) -> Generator[list[Reply], None, None]:
    """Yield all sides' answers as they grow, at most once in `every_s`, and at the end once whole.

    The sides answer in one batch. Closing the iterator, or `halted` turning true, stops the model after its current
    step; answers that were still growing then end as 'halted'.
    """
    growing = [Reply(name, prompt) for name, prompt in zip(names, prompts, strict=True)]
    begun, shown = time.monotonic(), 0.0
    with closing(_pieces(answering, prompts, names, controls)) as pieces:
        for piece in pieces:
            if halted():
                break
            before, now = growing[piece.row], time.monotonic()
            growing[piece.row] = replace(
                before, text=before.text + piece.text, end=piece.finished or before.end, seconds=now - begun
            )
            if now - shown >= every_s:
                shown = now
                yield list(growing)
    whole = time.monotonic() - begun
    yield [reply if reply.end else replace(reply, end="halted", seconds=whole) for reply in growing]


def _pieces(
    answering: "Answering", prompts: Sequence["Prompt"], names: Sequence[str], controls: Controls
) -> "Generator[Piece, None, None]":
    import torch

    try:
        yield from answering.stream(prompts, names, controls.generation(), seed=controls.seed)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{answering.base.device}: out of memory; ask for fewer new tokens, one beam, or fewer turns"
        ) from None


def _turns(count: int) -> str:
    return "1 earlier turn was" if count == 1 else f"{count} earlier turns were"
