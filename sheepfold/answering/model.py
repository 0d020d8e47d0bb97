"""One base in memory, and everything that can be asked of it: answers, streams of answers, log-probabilities.

open_source(find("runs/demo")) ─▶ Answering ─ prompt ─ answer | stream | score ─ under any of its adapters
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any, Self

import torch
from torch import Tensor

from sheepfold.answering.batch import Batch
from sheepfold.answering.carriers import Carrier, carrier
from sheepfold.answering.prompts import Prompt, Prompter
from sheepfold.answering.source import Source
from sheepfold.answering.streaming import Piece, Recorder, Row, Steps, TokenScore, steps, token_scores
from sheepfold.config import GenerationSettings
from sheepfold.data import templates
from sheepfold.data.rows import Message, Record
from sheepfold.errors import ConfigError
from sheepfold.evaluation import soft_prompts
from sheepfold.evaluation.generation import room_for
from sheepfold.models import Base, load_base, max_positions


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    ids: tuple[int, ...]
    """Without the end token."""
    finished: str
    """'stop': an end token or a stop string; 'length': no room for more."""


def open_source(source: Source, device: str = "auto", bits: int | None = None) -> "Answering":
    """Load a source's base, and make its adapters ready to be asked by name.

    bits: 8 or 4 load the base quantised by bitsandbytes, 0 as it is; None: as the run was trained. Raises ModelError,
    AdapterMismatch or ConfigError.
    """
    if source.task.labels:
        raise ConfigError(f"{source.name}: a run of task classification gives labels, and has no answers to write")
    base = load_base(source.model, device, bits=bits)
    return Answering(source, base, carrier(source, base))


class Answering:
    """A base and its adapters, ready to answer; one request is computed at a time."""

    def __init__(self, source: Source, base: Base, carried: Carrier) -> None:
        self.source, self.base, self.bits = source, base, base.bits
        self.names, self.default = source.names, source.default
        self.template = templates.find(source.data, base.tokenizer)
        with carried.using([source.default]) as model:
            taken, self._alike = soft_prompts.virtual_tokens(model), soft_prompts.needs_equal_lengths(model)
            limit = max_positions(model.config)
        self.max_positions = None if limit is None else limit - taken
        self.prompter = Prompter(self.template, base.tokenizer, self.max_positions)
        self._carrier = carried
        self._lock = Lock()  # not reentrant, so that it can be freed by another thread than took it
        self._holder: int | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="answering")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker, and give the base back as it was."""
        self._worker.shutdown()
        self._carrier.close()

    def check(self, name: str) -> str:
        """Return the name, if there is one like it; raises ConfigError with the nearest ones."""
        return self.source.check(name)

    @contextlib.contextmanager
    def using(self, names: Sequence[str]) -> Iterator[Any]:
        """Yield the transformers model in which row i of a batch answers under names[i]; one name: every row.

        One thread at a time: others wait. Raises ConfigError for names that the method cannot mix in a batch, and
        RuntimeError where this thread holds the model already: to answer or score inside the block would wait forever.
        """
        self.check_free()
        kinds = {self.check(name) for name in names}
        if len(kinds) > 1 and not self._carrier.mixes:
            raise ConfigError(f"{self.source.name}: only LoRA adapters share a batch; ask {sorted(kinds)} one by one")
        with self._lock, self._carrier.using(names) as model:
            self._holder = get_ident()
            try:
                yield model
            finally:
                self._holder = None

    def check_free(self) -> None:
        """Raise RuntimeError where this thread is inside a `using` block."""
        if self._holder == get_ident():
            raise RuntimeError("this thread holds the model: leave the `using` block before asking for more")

    def submit(self, run: Callable[[Any, Any], Tensor], recorder: Recorder | None, *, ticks: bool) -> Steps:
        """Return the steps of a generation that the worker computes: see streaming.steps."""
        self.check_free()
        return steps(run, self._worker, recorder, ticks=ticks)

    def prompt(self, messages: Sequence[Message], max_new_tokens: int, turns: int | None = None) -> Prompt:
        """Return the prompt for a conversation: see Prompter.of_messages."""
        return self.prompter.of_messages(messages, max_new_tokens, turns)

    def prompt_of(self, record: Record, max_new_tokens: int) -> Prompt:
        """Return the prompt that training put before the record's answer."""
        return self.prompter.of_record(record, max_new_tokens)

    def raw_prompt(self, text: str, max_new_tokens: int) -> Prompt:
        """Return plain text as a prompt."""
        return self.prompter.of_text(text, max_new_tokens)

    def stream(
        self,
        prompts: Sequence[Prompt],
        names: Sequence[str],
        settings: GenerationSettings,
        *,
        seed: int,
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
    ) -> Iterator[Piece]:
        """Yield every prompt's answer in pieces, all rows together; names: one for each prompt, or one for all.

        With more than one beam a row's answer comes whole, after pieces without text, one a step. top_logprobs: also
        score each token, with this many of the likeliest. One seed gives one answer to a prompt; the same prompt twice
        under one name gets different draws. Raises ConfigError for an unknown name.
        Closing the iterator stops the model after its current step.
        """
        each = self._each(names, prompts)
        rows = [
            Row(i, self.base.tokenizer, frozenset(self.base.stop_ids), tuple(stop), prompt.lead)
            for i, prompt in enumerate(prompts)
        ]
        # Rows of one batch may all answer equally long: a row goes on until the last one ends, in positions too.
        room = [room_for(len(p.ids), settings.max_new_tokens, self.max_positions) for p in prompts]
        alike = [(r, len(p.ids) if self._alike else 0) for r, p in zip(room, prompts, strict=True)]
        for group in self._groups(each, alike):
            mine = [prompts[i] for i in group], [each[i] for i in group], [rows[i] for i in group]
            one = Batch(self, *mine, room[group[0]], settings)
            yield from one.pieces(seed, top_logprobs)

    def answer(
        self,
        prompts: Sequence[Prompt],
        names: Sequence[str],
        settings: GenerationSettings,
        *,
        seed: int,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """Return every prompt's whole answer, settings.batch_rows at a time: see stream."""
        each = self._each(names, prompts)
        answers: list[Answer] = []
        for first in range(0, len(prompts), settings.batch_rows):
            part = slice(first, first + settings.batch_rows)
            answers += self._whole(prompts[part], each[part], settings, seed, stop)
        return answers

    def _whole(
        self, prompts: Sequence[Prompt], names: list[str], settings: GenerationSettings, seed: int, stop: Sequence[str]
    ) -> list[Answer]:
        texts, ids = [""] * len(prompts), [list[int]() for _ in prompts]
        why = ["length"] * len(prompts)
        for piece in self.stream(prompts, names, settings, seed=seed, stop=stop, top_logprobs=0):
            texts[piece.row] += piece.text
            ids[piece.row] += [token.id for token in piece.tokens]
            why[piece.row] = piece.finished or why[piece.row]
        return [Answer(t, tuple(i), w) for t, i, w in zip(texts, ids, why, strict=True)]

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Tensor], names: Sequence[str], top: int = 0, batch_rows: int = 16
    ) -> list[list[TokenScore]]:
        """Return the scores of every token after the first of each row, (tokens,) int64, under its name.

        Log-probabilities are in nats, from float32 logits; `top` likeliest tokens stand beside each.
        """
        each = self._each(names, prompts)
        scores: list[list[TokenScore]] = [[] for _ in prompts]
        for group in self._groups(each):
            for first in range(0, len(group), batch_rows):
                part = group[first : first + batch_rows]
                found = self._logits([prompts[i] for i in part], [each[i] for i in part])
                for i, logits in zip(part, found, strict=True):
                    logprobs = torch.log_softmax(logits[:-1].float(), dim=-1).cpu()
                    scores[i] = token_scores(logprobs, prompts[i][1:].tolist(), self.base.tokenizer, top)
        return scores

    def _each(self, names: Sequence[str], rows: Sequence[object]) -> list[str]:
        """Return one checked name for each row; a single one is for all. Raises ConfigError for an unknown name."""
        return [self.check(name) for name in names] * (len(rows) if len(names) == 1 else 1)

    def _logits(self, rows: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """Return each row's logits, (tokens, vocabulary)."""
        ids = torch.nn.utils.rnn.pad_sequence(
            list(rows), batch_first=True, padding_value=self.base.tokenizer.pad_token_id
        )
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        with self.using(names) as model:
            out = model(input_ids=ids.to(self.base.device), attention_mask=mask.to(self.base.device)).logits
        own = out[:, -ids.shape[1] :]  # soft prompts come before the row's own tokens
        return [own[i, : len(row)] for i, row in enumerate(rows)]

    def _groups(self, names: Sequence[str], alike: Sequence[object] = ()) -> list[list[int]]:
        """Return the rows that may share a batch: those that are alike, and where the method asks it, of one name."""
        own = [""] * len(names) if self._carrier.mixes else names
        kinds = list(zip(own, alike or [None] * len(names), strict=True))
        return [[i for i, kind in enumerate(kinds) if kind == one] for one in dict.fromkeys(kinds)]
