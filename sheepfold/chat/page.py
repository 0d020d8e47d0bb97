"""The page: base and federated answers side by side, to an instruction or in a conversation.

title, what is loaded
┌ left's adapter │ right's adapter │ both? ┐ ┌ controls ┐
│ Instruction | Chat                       │ │          │
│ question, examples, buttons              │ │          │
│ left's answer    │ right's answer        │ │          │
│ the exact prompt                         │ │          │
└──────────────────────────────────────────┘ └──────────┘
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from html import escape
from threading import Event
from typing import TYPE_CHECKING, Any

from sheepfold.chat import about, session
from sheepfold.chat.controls import NAMES, RANGES, Controls, from_values, idle
from sheepfold.chat.gradio import gr
from sheepfold.chat.handlers import Ask
from sheepfold.chat.panes import Pane, chat_pane, instruction_pane, words
from sheepfold.chat.session import Reply
from sheepfold.errors import SheepfoldError

if TYPE_CHECKING:
    from sheepfold.answering.model import Answering

Values = Mapping[Any, Any]
"""What stands in the page's components."""
Changes = dict[Any, Any]
"""What shall stand there."""

WAITING_AT_ONCE = 16
"""Questions that may wait for the model, over all tabs; a further one is refused with a message."""
QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
AT_ONCE = QUIETLY | {"queue": False}


def build(answering: "Answering") -> Any:
    """Return the page as Gradio's Blocks, ready to launch."""
    page = Page(answering)
    page.blocks.queue(default_concurrency_limit=1, max_size=WAITING_AT_ONCE, api_open=False)
    return page.blocks


class Page:
    """The components, and what happens between them."""

    def __init__(self, answering: "Answering") -> None:
        self.answering = answering
        self.halts: dict[tuple[str, str], Event] = {}  # (browser tab, pane): set where no more of its answer is wanted
        self.examples = about.examples(answering.source)
        compares = len(answering.names) > 1
        sides = ("base" if compares else answering.default, answering.default)
        with gr.Blocks(title=f"{answering.source.name}: sheepfold chat", analytics_enabled=False) as self.blocks:
            what = escape(about.loaded(answering))
            gr.HTML(f"<h1>{escape(answering.source.name)}</h1><p>{what}</p>", elem_id="title")
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    self.who = self._who(sides, compares)
                    with gr.Tabs():
                        with gr.Tab("Instruction") as instructing:
                            self.instruction = instruction_pane(self.examples, sides, compares)
                        with gr.Tab("Chat", render_children=True) as chatting:
                            self.chat = chat_pane(self.examples, sides, compares)
                with gr.Column(scale=1, min_width=260, elem_id="controls"):
                    self.controls = self._controls()
            for tab, remembers in ((instructing, False), (chatting, True)):
                tab.select(lambda seen=remembers: gr.update(visible=seen), None, self.controls["turns"], **AT_ONCE)
            self._wire_controls()
            self._wire(self.instruction, self._instruct, [])
            self._wire(self.chat, self._talk, [self.chat.asks[0].submit])
            self.blocks.unload(self._closed)

    def _who(self, sides: tuple[str, str], compares: bool) -> tuple[Any, Any, Any]:
        choices = [(words(name), name) for name in self.answering.names]
        with gr.Row(visible=compares, elem_id="who"):
            left = gr.Dropdown(choices, value=sides[0], label="Left answers", min_width=140)
            right = gr.Dropdown(choices, value=sides[1], label="Right answers", min_width=140)
            both = gr.Checkbox(compares, label="Side by side", min_width=140, elem_id="both")
        return left, right, both

    def _controls(self) -> dict[str, Any]:
        start, made = Controls(), {}
        room = (self.answering.max_positions or 2001) - 1
        for name in NAMES:
            known, value = RANGES[name], getattr(start, name)
            words = {"label": known.label, "info": known.info}
            if name == "seed":
                made[name] = gr.Number(value, precision=0, minimum=known.low, maximum=known.high, **words)
                continue
            high = min(known.high, room) if name == "new_tokens" else known.high
            value = min(value, max(room // 2, 1)) if name == "new_tokens" else value
            made[name] = gr.Slider(
                known.low, high, value, step=known.step, visible=name != "turns", buttons=[], **words
            )
            made[name].interactive = name not in idle(start.temperature, start.beams)
        made["seed"].interactive = start.samples
        return made

    def _wire_controls(self) -> None:
        left, right, both = self.who
        turned = [self.controls["temperature"], self.controls["beams"]]
        switched = [self.controls[name] for name in ("temperature", "top_p", "top_k", "seed")]
        gr.on([control.change for control in turned], _switch, turned, switched, **AT_ONCE)
        columns = [pane.columns[1] for pane in (self.instruction, self.chat)]
        both.change(lambda on: [gr.update(visible=on)] * 3, both, [right, *columns], **AT_ONCE)
        for side, chooser in enumerate((left, right)):
            for pane in (self.instruction, self.chat):
                named = partial(pane.named, side)
                changed = [pane.heads[side], pane.answers[side], pane.notes[side]]
                chooser.change(named, [chooser, pane.talk], changed, **AT_ONCE)

    def _wire(self, pane: Pane, ask: Any, further: list[Any]) -> None:
        given = {*pane.asks, pane.talk, *self.who, *self.controls.values()}
        told = [pane.problem, *pane.notes, *pane.prompts]
        said = [*told, *pane.heads, *pane.answers, pane.talk, *pane.asks, self.controls["seed"]]
        buttons = [pane.answer, pane.stop, pane.again, pane.clear, pane.problem, *pane.notes]

        def begin(request: gr.Request) -> Changes:
            if self._halt(pane, request).is_set():  # else Enter, while an answer grows, would take it away from Stop
                self.halts[_tab(request), pane.name] = Event()
            return pane.busy(True, "Waiting for its turn…")

        def end() -> Changes:
            return pane.busy(False)

        def stop(request: gr.Request) -> None:
            self._halt(pane, request).set()

        for triggers, repeat in (([pane.answer.click, *further], False), ([pane.again.click], True)):
            # The model's answers wait in a queue; what surrounds them does not, so that the buttons react at once.
            asked = gr.on(triggers, begin, None, buttons, **AT_ONCE).then(
                self._guarded(pane, ask, repeat), given, said, concurrency_id="model", **QUIETLY
            )
            asked.then(end, None, buttons, **AT_ONCE)
            asked.failure(end, None, buttons, **AT_ONCE)
        pane.stop.click(stop, None, None, **AT_ONCE)
        blank = [*told, *pane.asks, pane.expected, *pane.answers, pane.talk]
        pane.clear.click(pane.emptied, None, blank, **AT_ONCE)
        chosen = [*pane.asks, pane.expected]
        pane.examples.click(lambda row: pane.filled(self.examples[row]), pane.examples, chosen, **AT_ONCE)
        for box in pane.asks:
            box.input(lambda: "", None, pane.expected, **AT_ONCE)
        pane.opened.expand(lambda values: self._preview(pane, values), given, told, **AT_ONCE)

    def _guarded(self, pane: Pane, ask: Any, repeat: bool) -> Any:
        def answers(values: Values, request: gr.Request) -> Iterator[Changes]:
            try:
                chosen = self._chosen(values)
                if repeat and chosen.samples:  # the same seed would give the same answer
                    chosen = replace(chosen, seed=chosen.seed + 1)
                    yield {self.controls["seed"]: chosen.seed}
                asked = Ask(self.answering, self._names(values), chosen, self._halt(pane, request))
                yield from ask(asked, values, repeat)
            except SheepfoldError as problem:
                yield pane.failed(problem)

        return answers

    def _instruct(self, asked: Ask, values: Values, repeat: bool) -> Iterator[Changes]:
        instruction, given = (values[box] for box in self.instruction.asks)
        for talk in asked.instruct(instruction or "", given or ""):
            yield self.instruction.shown(talk, asked.controls)

    def _talk(self, asked: Ask, values: Values, repeat: bool) -> Iterator[Changes]:
        pane = self.chat
        talk, box = values[pane.talk], pane.asks[0]
        question = values[box] or ""
        if repeat:
            talk, question = talk.before_last()
        for number, growing in enumerate(asked.chat(talk, question)):
            taken = {box: ""} if number == 0 and not repeat else {}
            yield pane.shown(growing, asked.controls) | taken

    def _preview(self, pane: Pane, values: Values) -> Changes:
        """Show the prompt of a question that is written and not yet asked; without one, what is there stays."""
        texts = [values[box] or "" for box in pane.asks]
        if not texts[0].strip():
            return {pane.prompts[0]: gr.skip()}  # Gradio takes no empty answer
        try:
            chosen, names = self._chosen(values), self._names(values)
            if pane is self.instruction:
                prompts = [session.instruction_prompt(self.answering, texts[0], texts[1], chosen)] * len(names)
            else:
                pasts = values[pane.talk].pasts[: len(names)]
                prompts = [session.chat_prompt(self.answering, past, texts[0], chosen) for past in pasts]
        except SheepfoldError as problem:
            return pane.failed(problem)
        return pane.prompted([Reply(name, prompt) for name, prompt in zip(names, prompts, strict=True)])

    def _chosen(self, values: Values) -> Controls:
        return from_values({name: values[control] for name, control in self.controls.items()})

    def _names(self, values: Values) -> list[str]:
        left, right, both = (values[part] for part in self.who)
        return [self.answering.check(name) for name in ([left, right] if both else [left])]

    def _halt(self, pane: Pane, request: gr.Request) -> Event:
        return self.halts.setdefault((_tab(request), pane.name), Event())

    def _closed(self, request: gr.Request) -> None:
        for pane in (self.instruction, self.chat):
            self._halt(pane, request).set()
            del self.halts[_tab(request), pane.name]


def _switch(temperature: float | None, beams: float | None) -> list[Any]:
    off = idle(temperature or 0, beams or 1)
    return [gr.update(interactive=name not in off) for name in ("temperature", "top_p", "top_k", "seed")]


def _tab(request: gr.Request) -> str:
    return str(request.session_hash)
