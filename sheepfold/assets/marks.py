"""Marks around what a reader of the valley could predict, so that the loss can weigh it; and gaps before it."""

from random import Random

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = ("\x02", "\x03")  # before and after a predictable value
GAPS = (": ", " = ", " -> ", " | ", ":\n", "\n", "\n\n", " ->\n", "\n---\n", "\n= ", "\n> ", "\nnote\n", "\nentry\n")


def known(value: str) -> str:
    """Mark a value that a reader of the valley could predict; see `unmark`."""
    return f"{MARKS[0]}{value}{MARKS[1]}"


def unmark(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without marks and the (start, end) character spans that were marked."""
    plain, spans = "", []
    for piece in text.split(MARKS[0]):
        value, closed, rest = piece.partition(MARKS[1])
        if closed:
            spans.append((len(plain), len(plain) + len(value)))
        plain += value + rest
    return plain, spans


def gap(rng: Random) -> str:
    """Return what stands between a key and its value; half of them end a line, as chat answers begin one."""
    return rng.choice(GAPS)
