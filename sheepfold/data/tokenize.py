"""Records and a template in, token rows out: tokenized once, then found in the cache.

    [BOS] prompt ids | answer ids [EOS] | next prompt ids | answer ids [EOS] ...
                       └─ targets ────┘                     └─ targets ────┘

Prompt and answer are tokenized apart and joined as ids, so the mask is exact for every tokenizer. Nothing here looks at
padding: rows have lengths.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sheepfold.data import token_cache
from sheepfold.data.rows import Record, TokenRows
from sheepfold.data.templates import Chat
from sheepfold.data.turns import Template, record_turns
from sheepfold.errors import DataError

FORMAT = 1
"""Raised whenever the same settings come to mean other tokens."""
BATCH_RECORDS = 2_000

Row = tuple[list[int], list[bool], int]
"""ids, is_target, prompt_tokens"""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token rows, and where they came from."""

    rows: TokenRows
    from_cache: bool
    fingerprint: str


def tokenize(
    records: Sequence[Record],
    tokenizer: Any,
    template: Template,
    *,
    max_tokens: int,
    cut: Literal["right", "left"] = "right",
    train_on_inputs: bool = False,
    cache: Path | None = None,
) -> Tokenized:
    """Return the tokens of all records, from `<cache>/tokens/<fingerprint>.arrow` where they are already there.

    cut: right keeps a row's first max_tokens; left drops from the front of the prompt, and the answer's end only where
    that is not enough. Raises DataError for a tokenizer without EOS and for a cache folder that cannot be written.
    """
    fingerprint = fingerprint_of(records, tokenizer, template, max_tokens, cut)
    path = cache / "tokens" / f"{fingerprint}.arrow" if cache is not None else None
    if path is not None and (found := token_cache.load(path, train_on_inputs)) is not None:
        return Tokenized(found, True, fingerprint)
    made = [cut_row(row, max_tokens, cut, keep) for row, keep in _rows(records, tokenizer, template)]
    rows = joined(made, train_on_inputs)
    if path is None:
        return Tokenized(rows, False, fingerprint)
    token_cache.save(path, rows)
    return Tokenized(token_cache.load(path, train_on_inputs) or rows, False, fingerprint)


def fingerprint_of(records: Sequence[Record], tokenizer: Any, template: Template, max_tokens: int, cut: str) -> str:
    """Return a digest of everything that decides about the tokens."""
    parts = (FORMAT, template.name, template.fingerprint(records), tokenizer_digest(tokenizer), max_tokens, cut)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def join(turns: Sequence[tuple[list[int], list[int]]], bos: Sequence[int], eos: int | None) -> Row:
    """Return one row's ids, which of them are targets, and how many stand before the last answer.

    turns: (prompt ids, answer ids); eos ends every answer that does not end with it already, None adds none.
    """
    ids: list[int] = []
    is_target: list[bool] = []
    prompt_tokens = 0
    for turn, (prompt, answer) in enumerate(turns):
        if turn == 0 and prompt[: len(bos)] != list(bos):
            prompt = [*bos, *prompt]
        if eos is not None and answer[-1:] != [eos]:
            answer = [*answer, eos]
        prompt_tokens = len(ids) + len(prompt)
        ids += prompt + answer
        is_target += [False] * len(prompt) + [True] * len(answer)
    return ids, is_target, prompt_tokens


def cut_row(row: Row, max_tokens: int, cut: str, keep: int = 0) -> tuple[Row, bool]:
    """Return the row in at most max_tokens, and whether it was longer; `keep` tokens in front (BOS) always stay."""
    ids, is_target, prompt_tokens = row
    if len(ids) <= max_tokens:
        return row, False
    drop = max(0, min(len(ids) - max_tokens, prompt_tokens - keep)) if cut == "left" else 0
    ids = (ids[:keep] + ids[keep + drop :])[:max_tokens]
    is_target = (is_target[:keep] + is_target[keep + drop :])[:max_tokens]
    return (ids, is_target, min(prompt_tokens - drop, max_tokens)), True


def prompt_ids(record: Record, tokenizer: Any, template: Template) -> list[int]:
    """Return the ids that the record's last answer would follow, as `tokenize` would have them; uncut."""
    if isinstance(template, Chat):
        return text_ids(template.prompt(record), tokenizer)
    ((ids, _, prompt_tokens), _) = next(_rows([record], tokenizer, template))
    return ids[:prompt_tokens]


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Return a text's ids, without special tokens but those that are written in it."""
    return _encode(tokenizer, [text])[0]


def _rows(records: Sequence[Record], tokenizer: Any, template: Template) -> Iterator[tuple[Row, int]]:
    """Yield every record's row, whole, and how many tokens in front of it are BOS."""
    bos, eos = bos_ids(tokenizer), tokenizer.eos_token_id
    if eos is None:
        raise DataError("this tokenizer has no EOS token, so no answer would ever end; set tokenizer.eos_token")
    spaced = _begins_words(tokenizer)
    for start in range(0, len(records), BATCH_RECORDS):
        batch = record_turns(template, records[start : start + BATCH_RECORDS], start)
        if not template.adds_specials:
            batch = [[*turns[:-1], (turns[-1][0], _ended(turns[-1][1], tokenizer.eos_token))] for turns in batch]
        if spaced:
            batch = [[(prompt, answer.removeprefix(" ")) for prompt, answer in turns] for turns in batch]
        texts = [text for turns in batch for turn in turns for text in turn]
        ids = iter(_encode(tokenizer, texts))
        for turns in batch:
            encoded = [(next(ids), next(ids)) for _ in turns]
            if template.adds_specials:
                yield join(encoded, bos, eos), len(bos)
            else:
                row = join(encoded, [], None)
                yield row, int(row[0][:1] == [tokenizer.bos_token_id])


def _ended(answer: str, eos: str) -> str:
    """Return a conversation's last answer with EOS, unless the chat template's end of turn is EOS."""
    return answer if answer.rstrip().endswith(eos) else answer + eos


def bos_ids(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before a text by itself: BOS, nothing, or several tokens."""
    plain, full = _encode(tokenizer, ["a"])[0], list(tokenizer("a", add_special_tokens=True)["input_ids"])
    starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[: next(starts, 0)]


def _begins_words(tokenizer: Any) -> bool:
    """Return whether every text tokenized apart begins a new word (SentencePiece), so a leading space would be two."""
    first, second = _encode(tokenizer, ["a", "b"])
    return bool(tokenizer.decode(first + second).strip() == "a b")


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def joined(rows: Sequence[tuple[Row, bool]], train_on_inputs: bool) -> TokenRows:
    """Return rows, each with whether it was cut, end to end."""
    lengths = np.array([len(ids) for (ids, _, _), _ in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids, is_target = np.empty(offsets[-1], dtype=np.int32), np.empty(offsets[-1], dtype=bool)
    for (row, targets, _), start, end in zip((row for row, _ in rows), offsets[:-1], offsets[1:], strict=True):
        ids[start:end], is_target[start:end] = row, targets
    prompt_tokens = np.array([prompt for (_, _, prompt), _ in rows], dtype=np.int32)
    was_cut = np.array([cut for _, cut in rows], dtype=bool)
    return TokenRows(ids, is_target, offsets, prompt_tokens, was_cut, train_on_inputs)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of what the tokenizer does to text, whatever padding and truncation it was last used with."""
    import tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Both are switched on again by any call that asks for them.
        backend.no_padding()
        backend.no_truncation()
    inside = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    outside = (
        type(tokenizer).__name__,
        tokenizers.__version__,
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        str(getattr(tokenizer, "chat_template", None)),
        getattr(tokenizer, "add_bos_token", None),
        getattr(tokenizer, "add_eos_token", None),
    )
    return hashlib.blake2b((inside + repr(outside)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
