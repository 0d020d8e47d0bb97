"""Answers as they come: one batch, one step of the model at a time, text that is final as soon as it is.

    model.generate (worker) ── tokens of a step ──▶ queue ──▶ Row: tokens ─ text ─ stop strings ──▶ Piece

transformers' own `generate` runs in a worker thread and tells of every step; whoever reads the pieces may leave at any
time, and the worker ends after its current step.
"""

import queue
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token and how likely the model found it."""

    id: int
    text: str
    logprob: float
    """In nats, from the model's own logits: before temperature, top-p and top-k."""
    top: tuple[tuple[int, str, float], ...] = ()
    """The likeliest tokens at this place, best first: (id, text, logprob)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new in one row's answer."""

    row: int
    text: str
    tokens: tuple[TokenScore, ...] = ()
    """The tokens of the text, where scores were asked for."""
    finished: str | None = None
    """'stop': an end token or a stop string; 'length': no room for more; None: more is to come."""


@dataclass(slots=True)
class Row:
    """One answer while it is written: decodes token by token, holds back what may still change or be cut."""

    number: int
    tokenizer: Any
    end_ids: frozenset[int]
    stop: Sequence[str]
    lead: str = ""
    ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finished: str | None = None
    _said: int = 0
    """Characters handed out"""
    _scored: int = 0
    """Scores handed out"""
    _ends: list[int] = field(default_factory=list)
    """Where each token's text ends, in characters"""
    _text: str = ""
    _begun: str = ""
    """Text so far, while it may be the lead"""
    _first: int = 0
    """The token from which the next text is decoded: decoding all of them at every step would be quadratic"""
    _read: int = 0

    def take(self, token: int, score: TokenScore | None) -> Piece | None:
        """Take the next token; return what of the text is now final, None where nothing is."""
        if token in self.end_ids:
            return self.end("stop")
        self.ids.append(token)
        if score is not None:
            self.scores.append(score)
        self._text += self._decoded()
        self._ends.append(len(self._text))
        if (cut := _first_stop(self._text, self.stop, self._said)) is not None:
            self._text = self._text[:cut]
            return self.end("stop")
        return self._piece(len(self._text) - _held(self._text, self.stop))

    def end(self, why: str) -> Piece:
        """Return the rest: nothing more will come."""
        if why != "stop" or not self.stop or _first_stop(self._text, self.stop, 0) is None:
            self._text += self._decoded(last=True)
        self.finished = why
        piece = self._piece(len(self._text))
        return piece or Piece(self.number, "", (), why)

    def _decoded(self, last: bool = False) -> str:
        """Return the text that the newest tokens add; half a character waits for its other half."""
        before = self._decode(self.ids[self._first : self._read])
        now = self._decode(self.ids[self._first :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not last):
            return ""
        self._first, self._read = self._read, len(self.ids)
        return self._without_lead(now[len(before) :], last)

    def _without_lead(self, new: str, last: bool) -> str:
        """Return new text without what the template begins answers with; what may be that is waited for."""
        if not self.lead:
            return new
        self._begun += new
        if self.lead.startswith(self._begun) and self._begun != self.lead and not last:
            return ""
        lead, self.lead = self.lead, ""
        return self._begun.removeprefix(lead)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _piece(self, until: int) -> Piece | None:
        text = self._text[self._said : until]
        count = sum(end <= until for end in self._ends) if self.scores else 0
        tokens = tuple(self.scores[self._scored : count])
        self._said, self._scored = until, max(count, self._scored)
        if not text and not tokens and self.finished is None:
            return None
        return Piece(self.number, text, tokens, self.finished)


def _first_stop(text: str, stop: Sequence[str], since: int) -> int | None:
    """Return where the first stop string begins that ends after `since`."""
    found = [at for s in stop if (at := text.find(s, max(0, since - len(s)))) >= 0]
    return min(found) if found else None


def _held(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end may be the beginning of a stop string."""
    longest = 0
    for s in stop:
        for length in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:length]):
                longest = length
                break
    return longest


class Recorder:
    """A logits processor that changes nothing and remembers a step's log-probabilities until its tokens are known."""

    def __init__(self, tokenizer: Any, top: int) -> None:
        self.tokenizer, self.top = tokenizer, top
        self._logprobs = torch.empty(0)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """ids: (rows, tokens so far), logits: (rows, vocabulary); returns the logits."""
        self._logprobs = torch.log_softmax(logits.float(), dim=-1)
        return logits

    def scores(self, tokens: Sequence[int]) -> list[TokenScore]:
        """Return the last step's scores, one a row."""
        return token_scores(self._logprobs, tokens, self.tokenizer, self.top)


def token_scores(logprobs: Tensor, tokens: Sequence[int], tokenizer: Any, top: int) -> list[TokenScore]:
    """Return the scores of tokens[i] under logprobs[i], (places, vocabulary), with each place's `top` likeliest."""
    if not tokens:
        return []
    chosen = logprobs[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
    values, ids = logprobs.topk(top, dim=-1) if top else (torch.empty(len(tokens), 0),) * 2
    texts = tokenizer.batch_decode([[int(t)] for t in tokens], clean_up_tokenization_spaces=False)
    best = [
        tuple(
            (int(i), str(tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)), float(v))
            for i, v in zip(row_ids, row_values, strict=True)
        )
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return [TokenScore(int(t), text, lp, b) for t, text, lp, b in zip(tokens, texts, chosen, best, strict=True)]


class _Feed:
    """What transformers calls a streamer: gets the prompt's ids first, then each step's tokens, (rows,)."""

    def __init__(self, steps: "queue.SimpleQueue[Any]", recorder: Recorder | None) -> None:
        self.steps, self.recorder = steps, recorder
        self.begun = False

    def put(self, value: Tensor) -> None:
        if not self.begun:
            self.begun = True
            return
        tokens = value.tolist()
        self.steps.put((tokens, self.recorder.scores(tokens) if self.recorder else None))

    def end(self) -> None:
        """The worker says so itself, also when it fails."""


class _Left:
    """A stopping criterion: whoever reads has left. tell: called at every step, where it is asked for."""

    def __init__(self, tell: Callable[[], None] | None) -> None:
        self.event, self.tell = Event(), tell

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.tell is not None:
            self.tell()
        return torch.full((ids.shape[0],), self.event.is_set(), device=ids.device)


DONE = object()

Step = tuple[list[int], list[TokenScore] | None]
"""(rows,) tokens and, where a recorder is there, their scores"""
Steps = Generator[Step, None, Tensor]
"""Steps, and at the end all new tokens, (rows, tokens)"""


def steps(run: Callable[[Any, Any], Tensor], worker: Executor, recorder: Recorder | None, *, ticks: bool) -> Steps:
    """Yield each step's tokens, and their scores where a recorder is there, while `run(streamer, criterion)` works.

    run is called in the worker; what it raises is raised here, what it returns is returned. ticks: steps without tokens
    instead, for searches, which take no streamer. Closing the iterator ends the work after its current step.
    """
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    left = _Left((lambda: told.put(([], None))) if ticks else None)

    def work() -> Tensor:
        try:
            return run(_Feed(told, recorder), left) if not left.event.is_set() else torch.empty(0)
        finally:
            told.put(DONE)

    job = worker.submit(work)
    try:
        while (step := told.get()) is not DONE:
            yield step
        return job.result()
    finally:
        left.event.set()
        job.cancel()
