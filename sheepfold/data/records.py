"""One row as written in, one record out: what a cell, a blank and a conversation mean."""

import json
import math
from collections.abc import Mapping
from typing import Any

from sheepfold.data.rows import Message, Record
from sheepfold.errors import DataError

Columns = dict[str, tuple[str, ...]]
COLUMNS: Columns = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "category": ("category",),
    "client": ("client",),
    "messages": ("messages", "conversations"),
}
"""Where each field is looked for, in this order, when no map names its column (Alpaca's, Dolly's and chat names)."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
ROLES |= {"bing": "assistant", "bard": "assistant", "system": "system"}  # ShareGPT's names beside the usual ones


def record(row: Mapping[str, Any], columns: Mapping[str, str], client: str, where: str) -> Record | str:
    """Return one row as a record, or the reason why it cannot be one."""
    cell = {name: row.get(column) for name, column in columns.items()}
    category, client = text(cell.get("category")).strip(), text(cell.get("client")).strip() or client
    if cell.get("messages"):
        return _conversation(cell["messages"], category, client, where)
    instruction, given, output = (text(cell.get(name)) for name in ("instruction", "input", "output"))
    if not output:
        return "without output"
    if not instruction and not given and "instruction" in columns:
        return "without instruction"
    return Record(instruction, output, given, category, client)


def text(value: Any) -> str:
    """Return a cell as text; '' for null, NaN and blanks. Lists of tokens are joined by spaces."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        value = " ".join(map(text, value))
    elif isinstance(value, Mapping):
        value = json.dumps(value, ensure_ascii=False)
    value = str(value)
    if not value.isascii():  # half of a surrogate pair, which no tokenizer takes, becomes the replacement character
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "" if value.isspace() else value


def _conversation(turns: Any, category: str, client: str, where: str) -> Record | str:
    """Return a conversation that ends with an answer; raises DataError where `turns` is no list of messages."""
    if not isinstance(turns, list | tuple):
        raise DataError(f"{where}: messages is a {type(turns).__name__}; expected a list of {{role, content}} objects")
    messages = [turn if isinstance(turn, Message) else _message(turn, where) for turn in turns]
    while messages and messages[-1].role != "assistant":
        messages.pop()  # no answer follows
    opening = messages[0].content if messages and messages[0].role == "system" else None
    dialogue = messages[1:] if opening is not None else messages
    if not dialogue or not all(message.content for message in dialogue):
        return "without output"
    if [message.role for message in dialogue] != ["user", "assistant"] * (len(dialogue) // 2):
        return "whose turns do not alternate between user and assistant"
    return Record(dialogue[0].content, dialogue[-1].content, "", category, client, tuple(messages))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: a message is a {type(turn).__name__}; expected {{role, content}} or {{from, value}}")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    return Message(ROLES.get(str(role).lower(), str(role)), text(content))
