"""Aligning an emulator: what it keeps of the middle learns to do what the whole middle does.

    hidden state ──┬── whole middle (teacher, frozen) ──▶ t        kd = mean(((t - s) / rms(t))^2) over real tokens
                   └── kept layers (student, trained) ──▶ s        loss = kd_weight * kd + lm_weight * lm

Everything outside the middle is the same in both models and frozen, so both middles start from the same hidden state.
Source: Offsite-Tuning, arXiv:2302.04870, section 3.3; the distance as FederatedScope-LLM takes it, but without the
padding, and with the data and the optimizer that it was given.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sheepfold.config import DataSettings, Experiment, TrainSettings
from sheepfold.data.rows import IGNORED, Record, TokenRows
from sheepfold.errors import ConfigError, DataError, SheepfoldError, TrainingError
from sheepfold.local import optimizers
from sheepfold.local.steps import lr_factor, step_rows
from sheepfold.offsite.cut import Cut
from sheepfold.offsite.settings import AlignSettings

if TYPE_CHECKING:
    from sheepfold.data.rows import FederatedData


@dataclass(frozen=True, slots=True)
class AlignRows:
    """The server's own rows."""

    records: Sequence[Record]
    tokens: TokenRows
    numbers: np.ndarray
    """Those with something to learn"""


def check(settings: AlignSettings) -> None:
    """Raise ConfigError for an optimizer that does not exist or refuses its arguments."""
    _optimizer(settings)


def read_rows(experiment: Experiment, tokenizer: Any) -> AlignRows | None:
    """Return the rows to align on, as tokens; None where nothing is to be aligned. Raises ConfigError or DataError."""
    from sheepfold.data import sources, token_cache
    from sheepfold.tasks import task

    if experiment.offsite is None or experiment.offsite.align is None:
        return None
    own = experiment.offsite.align.data.model_dump()
    clients = {name: getattr(experiment.data, name) for name in ("template", "system", "train_on_inputs", "cut")}
    data = DataSettings(**own, **clients, max_tokens=experiment.data.max_tokens)
    try:
        records = sources.read(data).records
        cache = token_cache.folder(experiment.cache)
        rows = task(experiment).tokenize(records, tokenizer, data, cache).rows
    except (ConfigError, DataError) as error:
        raise type(error)(f"offsite.align: {error}") from None
    numbers = np.flatnonzero(rows.target_tokens() > 0)
    if not len(numbers):
        raise DataError("offsite.align.data: no row has an answer left after the cut; raise data.max_tokens")
    return AlignRows(records, rows, numbers)


def check_apart(rows: AlignRows, data: "FederatedData") -> None:
    """Raise DataError where a row to align on is also a client's, or one of the test set's."""
    held = [n for own in data.clients.values() for split in (own.train, own.eval, own.test) for n in split]
    known = {_text(data.records[int(n)]) for n in [*held, *data.holdout]}
    if shared := [record for record in rows.records if _text(record) in known]:
        raise DataError(
            f"offsite.align.data: {len(shared):,} of its {len(rows.records):,} rows are held by clients or the test "
            f"set too, such as {shared[0].instruction[:40]!r}; name rows that only the server has"
        )


def _text(record: Record) -> tuple[object, ...]:
    return record.instruction, record.input, record.output, record.messages


@dataclass(frozen=True, slots=True)
class Losses:
    """What one batch comes to."""

    kd: Tensor
    lm: Tensor

    def total(self, settings: AlignSettings) -> Tensor:
        """Return what is minimised."""
        return settings.kd_weight * self.kd + settings.lm_weight * self.lm

    def as_dict(self) -> dict[str, float]:
        """Return both figures."""
        return {"kd": float(self.kd), "lm": float(self.lm)}


def align(full: Any, small: Any, cut: Cut, rows: AlignRows, settings: AlignSettings) -> dict[str, Any]:
    """Train the emulator's middle in place and return what it came to, ready for JSON.

    full, small: the model and its emulator, in float32 or wider; all but the emulator's middle stays as it is. The
    losses before and after are of the same rows, those of the first step. Raises TrainingError for a loss that is not
    finite.
    """
    middle = _middle(small, cut, cut.bottom, len(cut.source) - cut.top)
    params = [p for block in middle for p in block.requires_grad_(True).parameters()]
    train, build = _optimizer(settings)
    optimizer = build(params, settings.lr)
    probe = step_rows(settings.seed, "align", rows.numbers, settings.batch_rows, 0)
    with torch.no_grad():
        before = losses(full, small, cut, rows.tokens, probe).as_dict()
    for step in range(settings.steps):
        numbers = step_rows(settings.seed, "align", rows.numbers, settings.batch_rows, step)
        loss = losses(full, small, cut, rows.tokens, numbers).total(settings)
        if not torch.isfinite(loss):
            raise TrainingError(f"offsite.align, step {step + 1}: the loss is {loss.item()}; lower offsite.align.lr")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if settings.grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, settings.grad_norm)
        optimizer.param_groups[0]["lr"] = settings.lr * lr_factor(train, step, settings.steps)
        optimizer.step()
    for block in middle:
        block.requires_grad_(False)
    with torch.no_grad():
        after = losses(full, small, cut, rows.tokens, probe).as_dict()
    if not all(np.isfinite(value) for value in after.values()):
        raise TrainingError(f"offsite.align: the last step left a loss of {after}; lower offsite.align.lr")
    return {"steps": settings.steps, "rows": len(rows.numbers), "before": before, "after": after}


def losses(full: Any, small: Any, cut: Cut, tokens: TokenRows, numbers: Sequence[int] | np.ndarray) -> Losses:
    """Return the emulator's distance from the full model behind the middle, and its loss on these rows' targets."""
    device = next(small.parameters()).device
    pairs = [tokens.row(int(n)) for n in numbers]
    ids = nn.utils.rnn.pad_sequence([i for i, _ in pairs], batch_first=True).to(device)
    labels = nn.utils.rnn.pad_sequence([t for _, t in pairs], batch_first=True, padding_value=IGNORED).to(device)
    lengths = torch.tensor([len(i) for i, _ in pairs], device=device)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    given = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
    (last_whole,) = _middle(full, cut, cut.total - cut.top - 1, cut.total - cut.top)
    (last_kept,) = _middle(small, cut, len(cut.source) - cut.top - 1, len(cut.source) - cut.top)
    with torch.no_grad(), _watched(last_whole, stop=True) as teacher:
        _until_stopped(full, given)
    with _watched(last_kept) as student:
        logits = small(**given).logits
    t, s = teacher["hidden"][real].detach(), student["hidden"][real]
    kd = (t - s).square().mean() / t.square().mean()
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    return Losses(kd, lm)


class _Stop(Exception):
    """The layers behind the middle are not needed."""


def _until_stopped(model: Any, given: Mapping[str, Any]) -> None:
    try:
        model(**given)
    except _Stop:
        return


@contextmanager
def _watched(block: nn.Module, *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Yield a place for the hidden state that a layer gives; stop: go no further than this layer."""
    seen: dict[str, Tensor] = {}

    def keep(_block: nn.Module, _args: Any, out: Any) -> None:
        seen["hidden"] = out[0] if isinstance(out, tuple) else out
        if stop:
            raise _Stop

    hook = block.register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def _middle(model: Any, cut: Cut, start: int, end: int) -> Sequence[nn.Module]:
    return list(model.get_submodule(cut.layers))[start:end]


def _optimizer(settings: AlignSettings) -> tuple[TrainSettings, optimizers.Build]:
    named = ("steps", "batch_rows", "optimizer", "optimizer_args", "lr", "schedule")
    train = TrainSettings(**{name: getattr(settings, name) for name in named})
    try:
        return train, optimizers.build(train, elementwise=False)
    except SheepfoldError as error:
        raise type(error)(str(error).replace("train.optimizer", "offsite.align.optimizer", 1)) from None
