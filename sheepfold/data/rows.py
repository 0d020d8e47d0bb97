"""The values that data preparation hands to training: records, token rows, and who holds which.

source -> [Record] -> partition -> {client: rows} -> split -> tokenize once -> TokenRows, memory-mapped
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # `sheepfold data show` needs no torch, and importing it takes over a second
    from torch import Tensor

IGNORED = -100
"""The label of a token that no loss looks at, as transformers and PEFT know it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user or assistant"""
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One example. `input` is '' where there is none; `messages` holds the conversation, where the data has one."""

    instruction: str
    output: str
    input: str = ""
    category: str = ""
    client: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRows:
    """All rows' tokens end to end, memory-mapped; row i is ids[offsets[i]:offsets[i + 1]]."""

    ids: np.ndarray
    """(tokens,) int32"""
    is_target: np.ndarray
    """(tokens,) bool: the tokens of answers, end-of-turn included"""
    offsets: np.ndarray
    """(rows + 1,) int64"""
    prompt_tokens: np.ndarray
    """(rows,) int32: tokens before the last answer; what generation starts from"""
    cut: np.ndarray
    """(rows,) bool: rows that were longer than max_tokens"""
    train_on_inputs: bool = False
    """Whether prompts are learned too."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def length(self, index: int) -> int:
        """Return one row's number of tokens."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def lengths(self) -> np.ndarray:
        """Return every row's number of tokens, (rows,) int64."""
        return np.diff(self.offsets)

    def target_tokens(self) -> np.ndarray:
        """Return, for every row, how many tokens the loss looks at: targets after the first token, (rows,) int64.

        The first token is never predicted, so it never counts.
        """
        learned = np.ones_like(self.is_target) if self.train_on_inputs else self.is_target.copy()
        learned[self.offsets[:-1][self.lengths() > 0]] = False
        total = np.concatenate([[0], np.cumsum(learned)])
        return np.asarray(total[self.offsets[1:]] - total[self.offsets[:-1]])

    def row(self, index: int) -> "tuple[Tensor, Tensor]":
        """Return one row's ids and labels, both (tokens,) int64; labels are IGNORED where nothing is learned."""
        import torch

        start, end = self.offsets[index], self.offsets[index + 1]
        ids = torch.from_numpy(self.ids[start:end].astype(np.int64))
        if self.train_on_inputs:
            return ids, ids.clone()
        return ids, torch.where(torch.from_numpy(self.is_target[start:end].astype(bool)), ids, IGNORED)

    def joined(self, rows: "Sequence[int] | np.ndarray") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return these rows' ids and labels end to end, both (tokens,) int64, and their lengths, (rows,) int64.

        What `row` gives for one after the other, in one go: labels are IGNORED where nothing is learned.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        starts = self.offsets[numbers]
        lengths = self.offsets[numbers + 1] - starts
        before = np.cumsum(lengths) - lengths
        at = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
        ids = self.ids[at].astype(np.int64)
        labels = ids.copy() if self.train_on_inputs else np.where(self.is_target[at].astype(bool), ids, IGNORED)
        return ids, labels, lengths

    def prompt(self, index: int) -> "Tensor":
        """Return the ids that generation of this row's answer starts from, (tokens,) int64."""
        import torch

        start = self.offsets[index]
        return torch.from_numpy(self.ids[start : start + self.prompt_tokens[index]].astype(np.int64))


@dataclass(frozen=True, slots=True)
class ClientRows:
    """One client's row numbers, split; its evaluation rows come from its own distribution."""

    train: np.ndarray
    eval: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, slots=True)
class PartitionedData:
    """Who holds which rows, before any tokenizer looked at them."""

    records: Sequence[Record]
    clients: Mapping[str, ClientRows]
    """Row numbers of every client, in client order."""
    holdout: np.ndarray
    """Rows that no client holds: the global test set."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Rows of the source that are not among the records, or that no client holds: {reason: how many}."""
    notes: tuple[str, ...] = ()
    """What a user should know, one line each."""
    public: np.ndarray = field(default_factory=lambda: np.array([], dtype=np.int64))
    """Rows that the server has, and no client."""


@dataclass(frozen=True, slots=True)
class FederatedData:
    """Everything a run trains and evaluates on."""

    records: Sequence[Record]
    clients: Mapping[str, ClientRows]
    """Row numbers of every client, in client order."""
    tokens: TokenRows
    """The tokens of all records, in record order."""
    holdout: np.ndarray = field(default_factory=lambda: np.array([], dtype=np.int64))
    """Rows that no client holds: the global test set."""
    public: np.ndarray = field(default_factory=lambda: np.array([], dtype=np.int64))
    """Rows that the server has, and no client."""
    fingerprint: str = ""
    """What records, partition, template and tokenizer together amount to."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Rows that no client trains or evaluates on: {reason: how many}."""
    without_target: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Rows that each client had, and that lost all their targets in the cut; they are in no split."""
    notes: tuple[str, ...] = ()
    """What a user should know, one line each."""
    tokens_from_cache: bool = False
    """Whether the tokens were found, so that nothing was tokenized."""
    labels: tuple[str, ...] = ()
    """Where targets are labels, their names by number: a row's last token is its label's, which no model reads."""

    def label_rows(self, client: str, split: str) -> np.ndarray:
        """Return one client's row numbers of 'train', 'eval' or 'test'."""
        return np.asarray(getattr(self.clients[client], split))
