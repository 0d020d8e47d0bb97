"""Which template a name means: a fixed wording, the tokenizer's chat template, or a user's function.

A template turns a record into (prompt, answer) texts, one pair a turn of the assistant. The two stay apart from here
on, so no tokenizer merges across the border between what is given and what is learned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sheepfold import plugins
from sheepfold.config import DataSettings
from sheepfold.data.rows import Record
from sheepfold.data.turns import Template, Turns, record_turns, text_digest
from sheepfold.data.wordings import WORDINGS, from_file
from sheepfold.errors import ConfigError, DataError, suggest


@dataclass(frozen=True, slots=True)
class Chat:
    """The tokenizer's own chat template; it writes BOS and the ends of turns itself."""

    tokenizer: Any
    system: str | None = None

    @property
    def name(self) -> str:
        return "chat"

    @property
    def adds_specials(self) -> bool:
        return False

    def turns(self, record: Record) -> Turns:
        """Render turn by turn, checking that each rendering continues the one before it to the letter."""
        messages, done, turns = self.messages(record), "", []
        for end in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            asked = self._render(messages[:end], ask=True)
            answered = self._render(messages[: end + 1], ask=False)
            if not (asked.startswith(done) and answered.startswith(asked)):
                raise DataError(
                    "data.template chat: the tokenizer's chat template rewrites earlier turns (turn "
                    f"{end // 2 + 1} does not continue the text before it), so its answers cannot be told from its "
                    "prompts; take another template, or give the tokenizer one that only appends"
                )
            turns.append((asked[len(done) :], answered[len(asked) :]))
            done = answered
        return turns

    def messages(self, record: Record) -> list[dict[str, str]]:
        """Return a record as chat messages: instruction and input are one user turn, a blank line between them."""
        if record.messages:
            messages = [{"role": message.role, "content": message.content} for message in record.messages]
        else:
            ask = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": record.output}]
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def prompt(self, record: Record) -> str:
        """Return the text that the record's last answer would follow."""
        return self._render(self.messages(record)[:-1], ask=True)

    def fingerprint(self, records: Sequence[Record]) -> str:
        # Rendering takes seconds, so what the texts follow from is taken instead.
        contents = [[(r.instruction, r.input), (r.output, "")] if not r.messages else _pairs(r) for r in records]
        return text_digest([[(str(self.tokenizer.chat_template), repr(self.system))], *contents])

    def _render(self, messages: list[dict[str, str]], ask: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
        except Exception as error:  # templates are programs; they raise what they like
            raise DataError(
                f"data.template chat: the tokenizer's chat template refuses a conversation ({error}), beginning "
                f"{messages[0]['role']}: {messages[0]['content'][:60]!r}; take another template, "
                "or leave out data.system"
            ) from None


@dataclass(frozen=True, slots=True)
class Own:
    """A user's function: record -> (prompt, answer), or a list of such pairs."""

    name: str
    function: Callable[[Record], tuple[str, str] | Turns]

    @property
    def adds_specials(self) -> bool:
        return True

    def turns(self, record: Record) -> Turns:
        made = self.function(record)
        pairs = [made] if isinstance(made, tuple) else made
        if not isinstance(pairs, list) or not pairs or not all(_is_pair(pair) for pair in pairs):
            raise DataError(
                f"data.template {self.name!r}: returned {made!r:.80}; expected (prompt, answer) texts or a list of them"
            )
        return pairs

    def fingerprint(self, records: Sequence[Record]) -> str:
        return text_digest(record_turns(self, records))  # its texts: its code may call on anything


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _pairs(record: Record) -> Turns:
    return [(message.role, message.content) for message in record.messages]


def find(data: DataSettings, tokenizer: Any) -> Template:
    """Return the template that the settings name.

    Raises ConfigError for a name that does not exist, for `chat` without a chat template, and for a system message that
    the template has no place for.
    """
    name = data.template
    if name == "auto":
        name = "chat" if getattr(tokenizer, "chat_template", None) else "alpaca"
    if name == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("data.template 'chat': this tokenizer has no chat template; take auto, alpaca or vicuna")
        return Chat(tokenizer, data.system)
    wording = WORDINGS.get(name) or from_file(name)
    if wording is None and ":" in name:
        if data.system is not None:
            raise ConfigError(f"data.system has no effect with data.template {name!r}; let the function write it")
        return Own(name, plugins.find({}, name, "data.template"))
    if wording is None:
        known = ["auto", "chat", *WORDINGS]
        raise ConfigError(f"data.template: no {name!r}; {suggest(name, known)}; or a .json file, or module:function")
    return wording.with_system(data.system)
