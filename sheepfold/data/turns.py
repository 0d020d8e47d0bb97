"""The texts of a record, turn by turn, before any tokenizer: what every template makes."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from sheepfold.data.rows import Record
from sheepfold.errors import DataError

Turns = list[tuple[str, str]]
"""(prompt, answer) of every assistant turn; each prompt continues after the answer before it."""


class Template(Protocol):
    """What turns records into texts."""

    @property
    def name(self) -> str:
        """The name that chose it."""

    @property
    def adds_specials(self) -> bool:
        """Whether BOS and EOS are still to be added: true unless the wording has its own."""

    def turns(self, record: Record) -> Turns:
        """Return the record's texts; raises DataError for a record that the wording has no place for."""

    def fingerprint(self, records: Sequence[Record]) -> str:
        """Return a digest of all texts, or of everything that they follow from."""


def record_turns(template: Template, records: Sequence[Record], first: int = 0) -> list[Turns]:
    """Return every record's turns; an error says which record it is about, `first` being the number of the first."""
    made = []
    for number, record in enumerate(records, start=first):
        try:
            made.append(template.turns(record))
        except DataError as error:
            raise DataError(f"record {number}: {error}") from None
    return made


def text_digest(all_turns: Sequence[Turns]) -> str:
    """Return a digest under which no two different lists of turns are equal: lengths go in beside the texts."""
    digest = hashlib.blake2b(digest_size=16)
    for turns in all_turns:
        digest.update(repr([(len(prompt), len(answer)) for prompt, answer in turns]).encode())
        digest.update("".join([text for turn in turns for text in turn]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
