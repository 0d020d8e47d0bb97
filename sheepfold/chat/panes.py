"""The two ways to ask, as the page lays them out: the same buttons, notes and prompt around different answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sheepfold.chat.controls import Controls
from sheepfold.chat.gradio import gr
from sheepfold.chat.handlers import Talk
from sheepfold.chat.session import Past, Reply
from sheepfold.data.rows import Record

INSTRUCTION, CHAT = "instruction", "chat"
HINT = "<p>Ask something, or write a question and open this again.</p>"


@dataclass(frozen=True, slots=True)
class Pane:
    """One tab's components. Pairs are left and right."""

    name: str
    """instruction or chat"""
    asks: Sequence[Any]
    """The text boxes that hold the question."""
    answer: Any
    stop: Any
    again: Any
    clear: Any
    problem: Any
    """What went wrong, in one line"""
    heads: tuple[Any, Any]
    answers: tuple[Any, Any]
    notes: tuple[Any, Any]
    columns: tuple[Any, Any]
    opened: Any
    """The accordion around the prompts"""
    prompts: tuple[Any, Any]
    examples: Any
    expected: Any
    talk: Any
    """The tab's Talk, kept by the server"""

    def busy(self, on: bool, note: str = "") -> dict[Any, Any]:
        """Return what changes when an answer begins or has ended."""
        changes: dict[Any, Any] = {b: gr.update(interactive=not on) for b in (self.answer, self.again, self.clear)}
        told = dict.fromkeys(self.notes, _paragraph(note)) | {self.problem: ""} if on else {}
        return changes | told | {self.stop: gr.update(interactive=on)}

    def failed(self, problem: Exception) -> dict[Any, Any]:
        """Return what is shown instead of an answer."""
        return dict.fromkeys(self.notes, "") | {self.problem: f'<p role="alert">{escape(str(problem))}</p>'}

    def shown(self, talk: Talk, controls: Controls) -> dict[Any, Any]:
        """Return what the pane shows of a talk."""
        changes: dict[Any, Any] = {self.talk: talk}
        for side, reply in enumerate(talk.replies):
            changes[self.heads[side]] = heading(reply.name)
            changes[self.answers[side]] = self._said(talk, side, reply.name)
            changes[self.notes[side]] = _paragraph(reply.note(controls))
        return changes | self.prompted(talk.replies)

    def prompted(self, replies: Sequence[Reply]) -> dict[Any, Any]:
        """Return the prompts as the model gets them; sides with one and the same share a box."""
        names = [words(reply.name) for reply in replies]
        if len({reply.prompt.text for reply in replies}) == 1:
            replies, names = replies[:1], [" and ".join(dict.fromkeys(names))]
        texts = [exact_prompt(name, reply) for name, reply in zip(names, replies, strict=True)]
        return dict(zip(self.prompts, [*texts, ""], strict=False))

    def emptied(self) -> dict[Any, Any]:
        """Return what a pane begins with."""
        told = (self.problem, self.expected, *self.notes, *self.answers)
        return (
            dict.fromkeys((*self.asks, *told), "")
            | {self.talk: Talk()}
            | dict(zip(self.prompts, (HINT, ""), strict=True))
        )

    def named(self, side: int, name: str, talk: Talk) -> dict[Any, Any]:
        """Return what changes where another adapter takes a side: an answer goes, a conversation says whose it is."""
        said = self._said(talk, side, name) if self.remembers else ""
        return {self.heads[side]: heading(name), self.answers[side]: said, self.notes[side]: ""}

    def filled(self, record: Record) -> dict[Any, Any]:
        """Return the question boxes with an example in them, and what the example's own answer is."""
        whole = "\n\n".join(filter(None, (record.instruction, record.input)))
        texts = (record.instruction, record.input) if len(self.asks) > 1 else (whole,)
        expected = f"<p>The held-out row's own answer: <b>{escape(record.output)}</b></p>"
        return dict(zip(self.asks, texts, strict=True)) | {self.expected: expected}

    @property
    def remembers(self) -> bool:
        """Whether earlier turns stay on the page."""
        return self.name == CHAT

    def _said(self, talk: Talk, side: int, name: str) -> str:
        growing = talk.replies[side : side + 1]
        if not self.remembers:
            return "".join(f'<p class="plain">{escape(reply.text)}</p>' for reply in growing)
        turns = tuple(reply.exchange(talk.question) for reply in growing) if talk.question else ()
        return conversation((*talk.pasts[side], *turns), name)


def words(name: str) -> str:
    """Return what readers know an adapter by."""
    return f"{name.removeprefix('client:')}'s own" if name.startswith("client:") else name


def heading(name: str) -> str:
    """Return the line above a side's answers, as HTML."""
    return f"<h2>{escape(words(name))}</h2>"


def conversation(past: Past, name: str) -> str:
    """Return a side's conversation as HTML that shows every text to the letter.

    name: whose heading is above it; an answer by somebody else says so. Gradio's own chat box would read marks and
    tags in an answer, and fetch the pictures that it links to.
    """
    turns = [
        f'<p class="asked">{escape(turn.question)}</p>{_by(turn.name) if turn.name != name else ""}'
        f'<p class="said">{escape(turn.answer) or "…"}</p>'
        for turn in past
    ]
    return "".join(turns)


def _by(name: str) -> str:
    return f'<p class="by">{escape(words(name))}</p>'


def exact_prompt(names: str, reply: Reply) -> str:
    """Return what the model gets for an answer, as HTML."""
    title = f"Prompt of {names}: {len(reply.prompt.ids):,} tokens"
    return f'<p>{escape(title)}</p><pre tabindex="0" aria-label="{escape(title)}">{escape(reply.prompt.text)}</pre>'


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def instruction_pane(examples: Sequence[Record], names: tuple[str, str], both: bool) -> Pane:
    """Lay out instruction and input above two answers."""
    box: dict[str, Any] = {"lines": 3, "max_lines": 12, "min_width": 240}
    with gr.Row(equal_height=True):
        instruction = gr.Textbox(label="Instruction", autofocus=True, placeholder="What should be done?", **box)
        given = gr.Textbox(label="Input (optional)", placeholder="The text that it should be done with", **box)
    chips, expected = _examples(INSTRUCTION, examples)
    buttons = _buttons(INSTRUCTION)
    sides = _sides(INSTRUCTION, names, both, (110, 480))
    return _pane(INSTRUCTION, (instruction, given), buttons, sides, chips, expected)


def chat_pane(examples: Sequence[Record], names: tuple[str, str], both: bool) -> Pane:
    """Lay out two conversations above one question."""
    sides = _sides(CHAT, names, both, (360, 360))
    hint = "Enter asks; Shift and Enter begin a new line"
    question = gr.Textbox(label="Question", lines=1, max_lines=8, placeholder=hint)
    buttons = _buttons(CHAT)
    return _pane(CHAT, (question,), buttons, sides, *_examples(CHAT, examples))


def _sides(pane: str, names: tuple[str, str], both: bool, pixels: tuple[int, int]) -> Any:
    """Return headings, answers, notes and the columns around them, each as (left, right); pixels: least, most high."""
    made, (low, high) = [], pixels
    with gr.Row():
        for side, name in enumerate(names):
            with gr.Column(min_width=280, visible=both or side == 0) as column:
                head = gr.HTML(heading(name), elem_classes="side")
                answer = gr.HTML(
                    "", container=True, autoscroll=True, min_height=low, max_height=high, elem_classes="talk"
                )
                made.append((head, answer, _note(pane, ("left", "right")[side]), column))
    return tuple(zip(*made, strict=True))


def _note(pane: str, what: str, text: str = "", **look: Any) -> Any:
    """Return a line that speaks up. Named by an id: Gradio writes a class on the block and again inside."""
    return gr.HTML(text, elem_id=f"note-{pane}-{what}", **look)


def _examples(pane: str, examples: Sequence[Record]) -> tuple[Any, Any]:
    chips = gr.Dataset(
        label="Held-out questions of this run",
        components=["textbox"],
        samples=[[record.instruction] for record in examples],
        layout="gallery",
        type="index",
        visible=bool(examples),
        elem_classes="examples",
    )
    return chips, _note(pane, "expected")


def _buttons(pane: str) -> tuple[Any, ...]:
    """Return answer, stop, again, clear, and the line for what goes wrong."""
    with gr.Row(elem_classes="buttons"):
        made = (
            gr.Button("Answer", variant="primary", min_width=0),
            gr.Button("Stop", interactive=False, min_width=0),
            gr.Button("Again", min_width=0),
            gr.Button("Clear", min_width=0),
        )
    return *made, _note(pane, "problem")


def _pane(name: str, asks: Sequence[Any], buttons: tuple[Any, ...], sides: Any, chips: Any, expected: Any) -> Pane:
    with gr.Accordion("The exact prompt", open=False) as opened, gr.Row():
        left, right = (_note(name, what, text, min_width=240) for what, text in (("prompt", HINT), ("prompt-2", "")))
    answer, stop, again, clear, problem = buttons
    heads, answers, notes, columns = sides
    return Pane(
        name=name,
        asks=asks,
        answer=answer,
        stop=stop,
        again=again,
        clear=clear,
        problem=problem,
        heads=heads,
        answers=answers,
        notes=notes,
        columns=columns,
        opened=opened,
        prompts=(left, right),
        examples=chips,
        expected=expected,
        talk=gr.State(Talk()),
    )
