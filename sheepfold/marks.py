"""Held-out rows: which ones are asked, and what adapters come to on them by everything that is measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sheepfold.adapter import Adapter
from sheepfold.assembly import Parts
from sheepfold.engines.common import Work, score_of
from sheepfold.evaluation.labels import MEASURES
from sheepfold.metrics import Mean, Score
from sheepfold.rng import stream


@dataclass(frozen=True, slots=True)
class Marks:
    """What an adapter came to on some rows, by everything that is measured."""

    score: Score = field(default_factory=Score)
    metrics: Mapping[str, Mean] = field(default_factory=dict)
    """Metric of generated answers -> mean"""

    def figure(self, measure: str) -> float:
        """Return one measure's figure: 'loss', the task's, or a metric."""
        if measure in self.metrics:
            return self.metrics[measure].value
        if measure == "loss":
            return self.score.loss.value
        assert self.score.confusion is not None, f"{measure} is of rows with labels"
        return MEASURES[measure](self.score.confusion)

    def __add__(self, other: "Marks") -> "Marks":
        return Marks(self.score + other.score, {m: mean + other.metrics[m] for m, mean in self.metrics.items()})


def evaluation_rows(parts: Parts) -> dict[str, np.ndarray]:
    """Return each client's held-out rows as the experiment asks for them; at most rows_per_client, always the same."""
    settings, seed = parts.experiment.evaluation, parts.experiment.data.seed
    most = settings.rows_per_client

    def chosen(client: str) -> np.ndarray:
        rows = parts.data.label_rows(client, settings.split)
        if most is None or len(rows) <= most:
            return rows
        return np.sort(stream(seed, "evaluation", client).permutation(rows)[:most])

    return {client: chosen(client) for client in parts.data.clients}


def shared_rows(parts: Parts, own: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return everybody's rows: the global test set, else all clients' held-out rows together."""
    if len(parts.data.holdout):
        return parts.data.holdout
    return np.concatenate([np.array([], dtype=np.int64), *own.values()])


def marks(parts: Parts, adapters: Sequence[Callable[[], Adapter]], work: Work, measures: Sequence[str]) -> list[Marks]:
    """Return what adapters[a]() come to on the given rows, for each (a, row numbers) of the work."""
    generated = {m: score(parts, adapters, work, m) for m in parts.metrics if m in measures}
    held = held_out(parts, adapters, work)
    return [Marks(one, {m: means[i] for m, means in generated.items()}) for i, one in enumerate(held)]


def score(parts: Parts, adapters: Sequence[Callable[[], Adapter]], work: Work, measure: str) -> list[Mean]:
    """Return the loss, or a metric of generated answers, of adapters[a]() for each (a, row numbers) of the work."""
    if measure == "loss":
        return [score.loss for score in held_out(parts, adapters, work)]
    means, metric, records = [Mean()] * len(work), parts.metrics[measure], parts.data.records
    for mine, made, part in _a_few(parts, adapters, work):
        for i, (_, numbers), texts in zip(mine, part, answer(parts, made, part), strict=True):
            total = sum(metric(records[int(n)], text) for n, text in zip(numbers, texts, strict=True))
            means[i] = Mean(total, len(numbers))
    return means


def held_out(parts: Parts, adapters: Sequence[Callable[[], Adapter]], work: Work) -> list[Score]:
    """Return what adapters[a]() come to without generating, for each (a, row numbers) of the work."""
    scores = [Score()] * len(work)
    for mine, made, part in _a_few(parts, adapters, work):
        found = parts.engine.scores(made, part, parts.experiment.evaluation.batch_rows)
        for i, one in zip(mine, found, strict=True):
            scores[i] = one
    return scores


def judged(parts: Parts, model: Any, rows: np.ndarray) -> dict[str, float]:
    """Return what a plain model comes to on rows by number: the loss, and the task's other measures by name."""
    at_once = parts.experiment.evaluation.batch_rows
    score = score_of(parts.task, model, parts.data.tokens, rows, at_once, parts.base.device)
    found = {"loss": score.loss.value}
    return found | {m: MEASURES[m](score.confusion) for m in parts.task.measures if score.confusion is not None}


def _a_few(
    parts: Parts, adapters: Sequence[Callable[[], Adapter]], work: Work
) -> Iterator[tuple[list[int], list[Adapter], Work]]:
    """Yield the work in parts of a few adapters: (its places in the work, the adapters, the part).

    They are made when their turn comes, as many on the device as a pass has, or a few.
    """
    size = max(8, parts.engine.plan.clients_per_pass)
    for first in range(0, len(adapters), size):
        mine = [i for i, (a, _) in enumerate(work) if first <= a < first + size]
        part = [(work[i][0] - first, work[i][1]) for i in mine]
        yield mine, [make() for make in adapters[first : first + size]], part


def answer(parts: Parts, adapters: Sequence[Adapter], work: Work) -> list[list[str]]:
    """Return the generated answer for each row of each (adapter, row numbers) of the work, as text."""
    tokenizer = parts.base.tokenizer
    stop = parts.base.stop_ids
    generated = parts.engine.generate(
        adapters, work, parts.experiment.evaluation.generation, tokenizer.pad_token_id, stop
    )
    return [[tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in part] for part in generated]
