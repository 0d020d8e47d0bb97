"""What the page's buttons do. Every browser tab has a `Talk` of its own, kept on this side of the wire.

Each generator yields a tab's talk as it changes: first with empty answers, then as they grow, then finished.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING

from sheepfold.chat import session
from sheepfold.chat.controls import Controls
from sheepfold.chat.session import Past, Reply
from sheepfold.errors import DataError

if TYPE_CHECKING:
    from sheepfold.answering.model import Answering
    from sheepfold.answering.prompts import Prompt

EVERY_S = 0.05
"""Seconds between two pictures of a growing answer: smooth to the eye, and light on the wire."""


@dataclass(frozen=True, slots=True)
class Talk:
    """One tab's conversation: what each side remembers, and what was answered last."""

    pasts: tuple[Past, Past] = ((), ())
    question: str = ""
    """What is being answered; '' between questions."""
    replies: tuple[Reply, ...] = ()

    def finished(self) -> "Talk":
        """Return the talk with its answers remembered, each by the side that gave it."""
        left, right = (
            past + tuple(reply.exchange(self.question) for reply in self.replies[side : side + 1])
            for side, past in enumerate(self.pasts)
        )
        return replace(self, pasts=(left, right), question="")

    def before_last(self) -> tuple["Talk", str]:
        """Return the talk before its last question, and that question. Raises DataError where there was none."""
        if not self.pasts[0]:
            raise DataError("nothing was asked yet, so there is nothing to answer again")
        left, right = (past[: len(past) - len(self.replies[side : side + 1])] for side, past in enumerate(self.pasts))
        return Talk((left, right)), self.pasts[0][-1].question


@dataclass(frozen=True, slots=True)
class Ask:
    """Who is asked, and how."""

    answering: "Answering"
    names: Sequence[str]
    """The left side's adapter, and the right's where there are two sides."""
    controls: Controls
    halt: Event = field(default_factory=Event)
    """Set where no more of the answer is wanted: stop was pressed, or the tab is closed."""

    def chat(self, talk: Talk, question: str) -> Iterator[Talk]:
        """Yield the talk as its sides answer a further question. Raises DataError before the model is asked."""
        prompts = [
            session.chat_prompt(self.answering, past, question, self.controls)
            for past, _ in zip(talk.pasts, self.names, strict=False)
        ]
        last = talk
        for last in self._answers(replace(talk, question=question), prompts):
            yield last
        yield last.finished()

    def instruct(self, instruction: str, input: str) -> Iterator[Talk]:
        """Yield the answers to an instruction, which has no past. Raises DataError before the model is asked."""
        prompt = session.instruction_prompt(self.answering, instruction, input, self.controls)
        yield from self._answers(Talk(), [prompt] * len(self.names))

    def _answers(self, talk: Talk, prompts: Sequence["Prompt"]) -> Iterator[Talk]:
        empty = tuple(Reply(name, prompt) for name, prompt in zip(self.names, prompts, strict=True))
        yield replace(talk, replies=empty)
        growing = session.replies(
            self.answering, prompts, self.names, self.controls, halted=self.halt.is_set, every_s=EVERY_S
        )
        for replies in growing:
            yield replace(talk, replies=tuple(replies))
