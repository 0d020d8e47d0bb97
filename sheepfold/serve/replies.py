"""Answers in OpenAI's shapes: whole, or in chunks as they come.

Piece, Echo, End ─┬─ whole: gathered by choice ─▶ one JSON object
             └─ chunk: one JSON object each
"""

import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sheepfold.answering.streaming import Piece, TokenScore
from sheepfold.serve.orders import Echo, End, Order
from sheepfold.serve.tokens import TokenBytes

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's own number."""


@dataclass(slots=True)
class Choice:
    """One answer so far."""

    echoed: bool = False
    text: str = ""
    tokens: list[TokenScore] = field(default_factory=list)
    """Of the text: those of an echoed prompt first."""
    new_tokens: int = 0
    offset: int = 0
    """Characters that chunks have covered."""
    finished: str | None = None


class Reply:
    """One request's reply; `kind` is chat or text."""

    prefix = ""
    object = ""
    chunk_object = ""

    def __init__(self, order: Order, tokens: TokenBytes, fingerprint: str) -> None:
        self.order, self.tokens = order, tokens
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": order.model,
            "system_fingerprint": fingerprint,
        }
        self.choices = [Choice() for _ in order.prompts]

    def take(self, piece: Piece | Echo | End) -> None:
        """Add what came to its choice."""
        choice = self.choices[piece.row]
        choice.text += piece.text
        choice.finished = piece.finished or choice.finished
        if isinstance(piece, Piece):
            choice.new_tokens += len(piece.tokens)
        if self.order.top is not None:
            choice.tokens += piece.tokens

    def whole(self) -> dict[str, Any]:
        """Return the reply that holds everything taken."""
        choices = [self._choice(i, choice) for i, choice in enumerate(self.choices)]
        return {**self.head, "object": self.object, "choices": choices, "usage": self.usage()}

    def chunks(self, piece: Piece | Echo | End, usage: bool) -> Iterator[dict[str, Any]]:
        """Yield the chunks for what just came; usage: a place for it is in every chunk."""
        choice = self.choices[piece.row]
        choice.finished = piece.finished
        if isinstance(piece, Piece) and not (piece.text or piece.tokens or piece.finished):
            return  # a search's sign of life
        if isinstance(piece, Piece):
            choice.new_tokens += len(piece.tokens)
        told = self._delta(piece.row, choice, piece.text, piece.tokens if self.order.top is not None else ())
        choice.echoed, choice.offset = True, choice.offset + len(piece.text)
        yield {**self._chunk([told]), **({"usage": None} if usage else {})}

    def last_chunk(self) -> dict[str, Any]:
        """Return the chunk with the usage and no choice."""
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the exact counts: prompts once each, and the tokens of the answers' texts."""
        new = sum(choice.new_tokens for choice in self.choices)
        prompt = self.order.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_object, "choices": choices}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, index: int, choice: Choice, text: str, tokens: Sequence[TokenScore]) -> dict[str, Any]:
        raise NotImplementedError


class ChatReply(Reply):
    """chat.completion and chat.completion.chunk"""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finished,
        }

    def _delta(self, index: int, choice: Choice, text: str, tokens: Sequence[TokenScore]) -> dict[str, Any]:
        delta: dict[str, Any] = {} if choice.echoed else {"role": "assistant", "content": ""}
        if text:
            delta["content"] = text
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": choice.finished,
        }

    def _logprobs(self, tokens: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.order.top is None:
            return None
        scored = [
            {**self._one(t.id, t.logprob), "top_logprobs": [self._one(id, logprob) for id, _, logprob in t.top]}
            for t in tokens
        ]
        return {"content": scored, "refusal": None}

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        own = self.tokens.of(id)
        return {"token": self.tokens.text(id), "logprob": _finite(logprob), "bytes": list(own)}


class CompletionReply(Reply):
    """text_completion, whole and in chunks"""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.tokens, 0),
            "finish_reason": choice.finished,
        }

    def _delta(self, index: int, choice: Choice, text: str, tokens: Sequence[TokenScore]) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(tokens, choice.offset) if tokens else None,
            "finish_reason": choice.finished,
        }

    def _logprobs(self, tokens: Sequence[TokenScore], offset: int) -> dict[str, Any] | None:
        if self.order.top is None:
            return None
        return {
            "tokens": [self.tokens.text(t.id) for t in tokens],
            "token_logprobs": [None if math.isnan(t.logprob) else _finite(t.logprob) for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens] if self.order.top else None,
            "text_offset": list(self.tokens.offsets([t.id for t in tokens], offset)),
        }

    def _top(self, token: TokenScore) -> dict[str, float] | None:
        """Return the likeliest tokens and the one that came; of two with the same text, the likelier."""
        if math.isnan(token.logprob):
            return None
        top: dict[str, float] = {}
        for id, logprob in [*((id, logprob) for id, _, logprob in token.top), (token.id, token.logprob)]:
            top.setdefault(self.tokens.text(id), _finite(logprob))
        return top


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
