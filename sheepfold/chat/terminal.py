"""The conversation in a terminal, or from a pipe: one question a line, answers as they come.

At a keyboard an error is one line and the conversation goes on; in a pipe it ends the command, since the lines after it
may count on what failed.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, TextIO

from sheepfold.chat import about, session
from sheepfold.chat.controls import NAMES, Controls, idle
from sheepfold.chat.session import Past, Reply
from sheepfold.errors import ConfigError, SheepfoldError, suggest

if TYPE_CHECKING:
    from sheepfold.answering.model import Answering

HELP = """\
/adapter NAME    who answers; by itself: who there is
/both            the base and the adapter answer, one below the other
/set NAME VALUE  temperature, top_p, top_k, beams, new_tokens, seed, turns; by itself: how they stand
/prompt          what the model was given for the last answer, to the letter
/clear           forget the conversation
/quit            leave (or Ctrl-D); Ctrl-C stops an answer"""
COMMANDS = [line.split()[0][1:] for line in HELP.splitlines()] + ["help"]


def talk(answering: "Answering", lines: TextIO | None = None, out: TextIO | None = None) -> None:
    """Answer line by line until /quit or the end of the input. Raises SheepfoldError where nobody is at a keyboard."""
    source, screen = lines or sys.stdin, out or sys.stdout
    here = Terminal(answering, screen)
    if not source.isatty():
        for line in source:
            if not here.take(line.strip()):
                return
        return
    here.say(f"{answering.source.name}: {about.loaded(answering)}\n/help says what else can be typed")
    for line in _typed(here.say):
        try:
            if not here.take(line.strip()):
                return
        except SheepfoldError as error:
            here.say(str(error))


def _typed(say: Callable[[str], None]) -> Iterator[str]:
    """Yield the lines typed at the keyboard, until Ctrl-D; Ctrl-C drops a line."""
    import readline  # noqa: F401  gives input() its editing and its history

    while True:
        try:
            yield input("> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\nCtrl-D or /quit leaves")


class Terminal:
    """One conversation: who answers, what each of them remembers, and how they are asked."""

    def __init__(self, answering: "Answering", out: TextIO) -> None:
        self.answering, self.out = answering, out
        self.names = [answering.default]
        self.controls = Controls()
        room = (answering.max_positions or 2 * self.controls.new_tokens) // 2
        self.controls = self.controls.with_text("new_tokens", str(min(self.controls.new_tokens, max(room, 1))))
        self.pasts: dict[str, Past] = {}
        self.last: list[Reply] = []

    def say(self, text: str, end: str = "\n") -> None:
        """Write at once, control characters made visible: an answer must not steer the terminal."""
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        self.out.write(shown + end)
        self.out.flush()

    def take(self, line: str) -> bool:
        """Do what a line asks for; return whether the conversation goes on. Raises SheepfoldError."""
        if not line:
            return True
        if not line.startswith("/"):
            self.ask(line)
            return True
        command, *words = line[1:].split() or [""]
        match command:
            case "adapter":
                self.adapter(words)
            case "both":
                self.both()
            case "set":
                self.set(words)
            case "prompt":
                self.prompt()
            case "clear":
                self.pasts, self.last = {}, []
            case "help":
                self.say(HELP)
            case "quit":
                return False
            case _:
                raise ConfigError(f"/{command[:40]}: no such command; {suggest(command[:40], COMMANDS)}")
        return True

    def ask(self, question: str) -> None:
        """Answer under every name; Ctrl-C stops the answers and keeps what was said."""
        pasts = [self.pasts.get(name, ()) for name in self.names]
        prompts = [session.chat_prompt(self.answering, past, question, self.controls) for past in pasts]
        self.last = [Reply(name, prompt) for name, prompt in zip(self.names, prompts, strict=True)]
        answers = session.replies(self.answering, prompts, self.names, self.controls)
        with closing(answers):
            try:
                self._show(answers)
            except KeyboardInterrupt:
                self.say(" (stopped)")
        for reply in self.last:
            self.pasts[reply.name] = (*self.pasts.get(reply.name, ()), reply.exchange(question))
            if notes := reply.remarks(self.controls):
                sys.stderr.write(f"{reply.name}: {notes}\n" if len(self.names) > 1 else f"{notes}\n")

    def _show(self, answers: Iterator[list[Reply]]) -> None:
        """Write the first answer as it grows, then the next: what has come of it, and its growth."""
        at = said = 0
        self._begin(at)
        for self.last in answers:
            while True:
                self.say(self.last[at].text[said:], end="")
                said = len(self.last[at].text)
                if self.last[at].end is None or at + 1 == len(self.last):
                    break
                at, said = at + 1, 0
                self.say("")
                self._begin(at)
        self.say("")

    def _begin(self, at: int) -> None:
        if len(self.names) > 1:
            self.say(f"{self.names[at]}: ", end="")

    def adapter(self, words: list[str]) -> None:
        """Let one adapter answer from now on, or say which there are."""
        if not words:
            self.say("\n".join(f"{'*' if name in self.names else ' '} {name}" for name in self.answering.names))
            return
        self.names = [self.answering.check(" ".join(words))]

    def both(self) -> None:
        """Let the base answer beside the adapter."""
        if len(self.answering.names) == 1:
            raise ConfigError("/both: there is only the base; start with a run or an adapter to compare it with")
        if "base" not in self.names:
            self.names = ["base", *self.names]
        elif len(self.names) == 1:
            self.names = ["base", self.answering.default]

    def set(self, words: list[str]) -> None:
        """Turn a control, or say how they stand."""
        if not words:
            off = idle(self.controls.temperature, self.controls.beams)
            for name in NAMES:
                self.say(f"{name} {getattr(self.controls, name):g}{' (without effect now)' if name in off else ''}")
            return
        if len(words) != 2:
            raise ConfigError(f"/set {' '.join(words)}: expected a name and a value, such as /set temperature 0.7")
        self.controls = self.controls.with_text(*words)
        if words[0] in idle(self.controls.temperature, self.controls.beams):
            self.say(
                f"{words[0]} has no effect now: temperature {self.controls.temperature:g}, beams {self.controls.beams}"
            )

    def prompt(self) -> None:
        """Say what the model was given for the last answers."""
        if not self.last:
            raise ConfigError("/prompt: nothing was asked yet")
        for reply in self.last:
            self.say(f"{reply.name}, {len(reply.prompt.ids):,} tokens:\n{reply.prompt.text}")
