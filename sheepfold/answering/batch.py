"""Rows that are answered together: one call of `generate`, and each row's pieces out of its steps."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sheepfold.answering.prompts import Prompt
from sheepfold.answering.streaming import Piece, Recorder, Row, TokenScore
from sheepfold.config import GenerationSettings
from sheepfold.evaluation.generation import Draws, decode, decoding, pad_left, until

if TYPE_CHECKING:
    from sheepfold.answering.model import Answering


@dataclass(slots=True)
class Batch:
    """Prompts that may all be answered equally long, each under its own name."""

    answering: "Answering"
    prompts: Sequence[Prompt]
    names: Sequence[str]
    rows: Sequence[Row]
    room: int
    """New tokens that each may have."""
    settings: GenerationSettings

    def pieces(self, seed: int, top: int | None) -> Iterator[Piece]:
        """Yield the rows' pieces; top: also score each token, with this many of the likeliest."""
        if self.settings.beams > 1:
            yield from self._searched(top)
            return
        recorder = Recorder(self.answering.base.tokenizer, top) if top is not None else None
        each = self.answering.submit(partial(self._run, seed, recorder), recorder, ticks=False)
        with contextlib.closing(each):
            for tokens, scores in each:
                for i, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
                    if row.finished is None:
                        yield from self._taken(row, token, scores[i] if scores else None)
                if all(row.finished is not None for row in self.rows):
                    return

    def _taken(self, row: Row, token: int, score: TokenScore | None) -> Iterator[Piece]:
        if (piece := row.take(token, score)) is not None:
            yield piece
        if row.finished is None and len(row.ids) >= self.room:
            yield row.end("length")

    def _run(self, seed: int, recorder: Recorder | None, feed: Any, left: Any) -> Tensor:
        base, ids = self.answering.base, [p.ids for p in self.prompts]
        processors: list[Any] = [recorder] if recorder else []
        processors += [Draws(ids, self.settings, seed, self._repeats())] if self.settings.temperature else []
        config = decoding(self.room, self.settings.beams, base.tokenizer.pad_token_id, base.stop_ids)
        watchers = {"stopping_criteria": [left]} | ({} if self.settings.beams > 1 else {"streamer": feed})
        with self.answering.using(self.names) as model:
            return decode(model, *pad_left(ids, base.tokenizer.pad_token_id), config, processors, **watchers)

    def _repeats(self) -> list[int]:
        """Return for each row how often its prompt was asked before it under its name."""
        seen: Counter[tuple[str, bytes]] = Counter()
        repeats = []
        for name, prompt in zip(self.names, self.prompts, strict=True):
            key = (name, prompt.ids.numpy().tobytes())
            repeats.append(seen[key])
            seen[key] += 1
        return repeats

    def _searched(self, top: int | None) -> Iterator[Piece]:
        """Yield each row's answer whole: which beam wins is known at the end; until then, a piece without text a step.

        The empty pieces let whoever reads leave in between.
        """
        each = self.answering.submit(partial(self._run, 0, None), None, ticks=True)
        with contextlib.closing(each):
            found = None
            while found is None:
                try:
                    next(each)
                    yield Piece(self.rows[0].number, "")
                except StopIteration as end:
                    found = end.value
        for i, (row, tokens) in enumerate(zip(self.rows, found.tolist(), strict=True)):
            ids = until(tokens, self.answering.base.stop_ids)
            scores = self._scored(i, ids, top)
            pieces = [row.take(token, score) for token, score in zip(ids, scores, strict=True) if row.finished is None]
            last = [] if row.finished else [row.end("length" if len(ids) >= self.room else "stop")]
            whole = [piece for piece in [*pieces, *last] if piece is not None]
            said = tuple(token for piece in whole for token in piece.tokens)
            yield Piece(row.number, "".join(piece.text for piece in whole), said, row.finished)

    def _scored(self, i: int, ids: list[int], top: int | None) -> Sequence[TokenScore | None]:
        if top is None or not ids:
            return [None] * len(ids)
        whole = torch.cat([self.prompts[i].ids, torch.tensor(ids)])
        return self.answering.score([whole], [self.names[i]], top)[0][-len(ids) :]
