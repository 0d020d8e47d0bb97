"""From a request to what the model is asked for, checked in full before it waits for the model.

An order has one prompt for each answer: prompts times n. Its `work` is what the model's thread goes through.
"""

import functools
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import tensor

from sheepfold.answering.model import Answering
from sheepfold.answering.prompts import Prompt
from sheepfold.answering.streaming import Piece, TokenScore
from sheepfold.config import GenerationSettings
from sheepfold.data.rows import Message
from sheepfold.errors import DataError
from sheepfold.serve.faults import bad_request, no_such_model, shown, too_long
from sheepfold.serve.limits import Limits
from sheepfold.serve.schema import ChatRequest, CompletionRequest, Request

COMPLETION_TOKENS = 16
"""New tokens of a plain completion that does not say how many, as OpenAI has it."""
SCORED_TOKENS = 4096
"""Prompt tokens scored in one pass: each has a row of the vocabulary's size."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt's own tokens, scored where log-probabilities were asked for."""

    row: int
    text: str
    tokens: tuple[TokenScore, ...] = ()
    """The first has no probability: its number is NaN."""
    finished: str | None = None


@dataclass(frozen=True, slots=True)
class End:
    """The token that ended an answer, scored; no part of its text, and not counted."""

    row: int
    tokens: tuple[TokenScore, ...]
    text: str = ""
    finished: str | None = "stop"


@dataclass(frozen=True, slots=True)
class Order:
    """What the model is asked for."""

    model: str
    prompts: Sequence[Prompt]
    """One for each answer."""
    settings: GenerationSettings | None
    """None: nothing is generated, the prompt is scored."""
    seed: int
    stop: tuple[str, ...] = ()
    top: int | None = None
    """Alternatives scored at each token; None: nothing is scored."""
    prompt_tokens: int = 0
    """Of all prompts, each counted once whatever n is."""
    echo: tuple[str, ...] = field(default=())
    """What is said of each prompt before its answer; empty: nothing."""
    scores_end: bool = False
    """Whether the end token is scored too: plain completions list it, and lm-eval drops the last token unseen."""

    def work(self, answering: Answering) -> Iterator[Piece | Echo | End]:
        """Yield the prompts, where they are echoed, and then the answers in pieces, always with their tokens."""
        if self.echo:
            yield from self._echoed(answering)
        if self.settings is None:
            yield from (Piece(row, "", (), "length") for row in range(len(self.prompts)))
            return
        pieces = answering.stream(
            self.prompts, [self.model], self.settings, seed=self.seed, stop=self.stop, top_logprobs=self.top or 0
        )
        yield from self._with_ends(pieces, answering) if self.scores_end else pieces

    def _with_ends(self, pieces: Iterator[Piece], answering: Answering) -> Iterator[Piece | End]:
        """Yield the pieces, and at last the end token of each answer that has one."""
        said: list[list[int]] = [[] for _ in self.prompts]
        ended = []
        for piece in pieces:
            said[piece.row] += [token.id for token in piece.tokens]
            if piece.finished != "stop":
                yield piece
                continue
            ended.append(piece.row)
            if piece.tokens or piece.text:
                yield replace(piece, finished=None)
        ends = answering.base.stop_ids
        for row in ended:  # after all of them: until then the model is taken
            before = torch.cat([self.prompts[row].ids, tensor(said[row], dtype=torch.long)])
            ids = [torch.cat([before, tensor([end])]) for end in ends]
            last = [scores[-1] for scores in answering.score(ids, [self.model], self.top or 0)]
            yield End(row, (max(last, key=lambda score: score.logprob),))

    def _echoed(self, answering: Answering) -> Iterator[Echo]:
        if self.top is None:
            yield from (Echo(row, text) for row, text in enumerate(self.echo))
            return
        for rows in _together([len(prompt.ids) for prompt in self.prompts]):
            ids = [self.prompts[row].ids for row in rows]
            for row, rest in zip(rows, answering.score(ids, [self.model], self.top), strict=True):
                first = TokenScore(int(self.prompts[row].ids[0]), "", math.nan)
                yield Echo(row, self.echo[row], (first, *rest))


def _together(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of rows to score in one pass, in order."""
    rows: list[int] = []
    for row in range(len(lengths)):
        most = max(lengths[r] for r in [*rows, row])
        if rows and most * (len(rows) + 1) > SCORED_TOKENS:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def chat_order(request: ChatRequest, answering: Answering, limits: Limits) -> Order:
    """Return the order for a conversation. Raises ApiError for what cannot be answered."""
    _check_model(request, answering)
    messages = [Message(message.role, message.content) for message in request.messages]
    _check_size(sum(len(message.content) for message in messages), answering, "messages")
    try:
        prompt = replace(answering.prompter, positions=None).of_messages(messages, 1)
    except DataError as error:
        raise bad_request(str(error), "messages") from None
    asked = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    new_tokens = _new_tokens(asked, [prompt], answering, limits, "messages", limits.new_tokens)
    top = request.top_logprobs or 0 if request.logprobs else None
    _check_rows(request, 1, limits)
    return _order(request, [prompt], new_tokens, top)


def completion_order(request: CompletionRequest, answering: Answering, limits: Limits) -> Order:
    """Return the order for plain prompts. Raises ApiError for what cannot be answered."""
    _check_model(request, answering)
    _check_rows(request, len(request.prompt), limits)
    prompts = [_prompt(i, prompt, answering) for i, prompt in enumerate(request.prompt)]
    new_tokens = _new_tokens(request.max_tokens, prompts, answering, limits, "prompt", COMPLETION_TOKENS)
    order = _order(request, prompts, new_tokens, request.logprobs)
    order = replace(order, scores_end=request.logprobs is not None and not request.stop)
    if not request.echo:
        return order
    given = [own if isinstance(own, str) else prompt.text for own, prompt in zip(request.prompt, prompts, strict=True)]
    return replace(order, echo=tuple(text for text in given for _ in range(request.n)))


def _order(request: Request, prompts: Sequence[Prompt], new_tokens: int, top: int | None) -> Order:
    settings = GenerationSettings(
        max_new_tokens=new_tokens or 1,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        beams=request.beams,
    )
    return Order(
        request.model,
        [prompt for prompt in prompts for _ in range(request.n)],
        settings if new_tokens else None,
        secrets.randbits(62) if request.seed is None else request.seed,
        request.stop,
        top,
        sum(len(prompt.ids) for prompt in prompts),
    )


def _check_model(request: Request, answering: Answering) -> None:
    if request.model not in answering.names:
        raise no_such_model(request.model, answering.names)


def _check_rows(request: Request, prompts: int, limits: Limits) -> None:
    rows = prompts * request.n * request.beams
    if rows > limits.rows:
        raise bad_request(
            f"n: prompts ({prompts}) times n ({request.n}) times beams ({request.beams}) is {shown(rows)} rows; "
            f"this server computes at most {limits.rows} (--rows)",
            "n",
        )


def _prompt(number: int, given: str | tuple[int, ...], answering: Answering) -> Prompt:
    if isinstance(given, str):
        _check_size(len(given), answering, "prompt")
        try:
            return replace(answering.prompter, positions=None).of_text(given, 1)
        except DataError as error:
            raise bad_request(f"prompt[{number}]: {error}", "prompt") from None
    tokenizer = answering.base.tokenizer
    rows = vocabulary_rows(answering)
    if odd := next((token for token in given if not 0 <= token < rows), None):
        raise bad_request(f"prompt[{number}]: token id {shown(odd)}; this model's ids are 0 to {rows - 1}", "prompt")
    text = tokenizer.decode(list(given), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Prompt(tensor(given), text)


def _check_size(characters: int, answering: Answering, param: str) -> None:
    """Raise ApiError for a text that no tokens could hold, before its seconds of tokenizing hold everybody up."""
    positions = answering.max_positions
    if positions is not None and characters > positions * _longest_token(answering.base.tokenizer):
        raise too_long(
            f"this model has {positions:,} positions, and the {param} {characters:,} characters, which no tokens of it "
            "could hold; shorten it",
            param,
        )


@functools.cache
def _longest_token(tokenizer: Any) -> int:
    """Return the characters of the longest token, as the vocabulary spells it: never fewer than it stands for."""
    return max(len(token) for token in tokenizer.get_vocab())


def vocabulary_rows(answering: Answering) -> int:
    """Return how many token ids the model takes."""
    model = answering.base.model
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def _new_tokens(
    asked: int | None, prompts: Sequence[Prompt], answering: Answering, limits: Limits, param: str, default: int
) -> int:
    """Return how many tokens an answer may have. Raises ApiError where they, or the prompts, are too many."""
    if asked is not None and asked > limits.new_tokens:
        raise bad_request(
            f"max_tokens: found {shown(asked)}; this server answers with at most {limits.new_tokens:,} (--new-tokens)",
            "max_tokens",
        )
    least = min(asked, 1) if asked is not None else 1
    longest, positions = max(len(prompt.ids) for prompt in prompts), answering.max_positions
    if positions is None:
        return min(default, limits.new_tokens) if asked is None else asked
    if longest + (asked if asked is not None else least) > positions:
        raise too_long(
            f"this model has {positions:,} positions; the {param} takes {longest:,}"
            + (f" and the answer {asked:,}" if asked else "")
            + "; shorten the prompt, or ask for fewer tokens",
            param,
        )
    return min(default, limits.new_tokens, positions - longest) if asked is None else asked
