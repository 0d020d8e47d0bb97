"""How the page looks: calm colours that keep text readable (WCAG AA) in light and dark, and the system's own fonts."""

from typing import Any

from sheepfold.chat.gradio import gr

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

CSS = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important; }
footer { display: none !important; }
#title .html-container, [id^=note-] .html-container, .side .html-container { padding: 0; }
#title h1 { font-size: 1.5rem; margin: 0; line-height: 1.2; }
#title p, [id^=note-] p { color: var(--body-text-color-subdued); margin: 0; font-size: .9rem; overflow-wrap: anywhere; }
#title p { margin-top: .25rem; }
.block[id^=note-]:not(:has(p)) { display: none; }
.block.side { margin-bottom: -.5rem; }
.side h2 { font-size: .95rem; font-weight: 500; margin: 0; color: var(--block-title-text-color); }
#both { display: flex; align-items: center; }
#controls { position: sticky; top: 1rem; align-self: flex-start; }
.block:has(input:disabled) :is(label span, .info-text) { color: var(--body-text-color-subdued); opacity: .75; }
.block input:disabled { opacity: .55; }
[id^=note-] p[role=alert] { color: var(--problem); font-weight: 500; }
[id^=note-] pre { font-family: var(--font-mono); font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: .375rem 0 0; padding: .75rem; max-height: 20rem; overflow: auto; border-radius: var(--radius-md);
  color: var(--body-text-color); background: var(--background-fill-secondary); }
.talk .plain { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; margin: 0; }
.buttons { justify-content: flex-start; gap: .5rem; }
.buttons button { flex: 0 1 auto; font-weight: 500; padding: .5rem 1.1rem; font-size: .95rem; }
.buttons button.primary { padding: .5rem 2rem; }
.examples .gallery-item:focus-visible { outline: 2px solid var(--color-accent); outline-offset: -2px; }
.examples .gallery-item { white-space: normal; text-align: left; }
.talk .asked, .talk .said { width: fit-content; max-width: 92%; margin: 0; padding: .5rem .75rem; border-radius: 10px;
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.talk .asked { margin: .75rem 0 .5rem auto; background: var(--asked); }
.talk .asked:first-child { margin-top: 0; }
.talk .said { border: 1px solid var(--border-color-primary); }
.talk .by { margin: 0 0 .15rem .15rem; font-size: .85rem; color: var(--body-text-color-subdued); }
:root { --asked: #ccfbf1; --problem: #b91c1c; }
.dark { --asked: #134e4a; --problem: #fca5a5; --color-accent: var(--primary-400); }
@media (max-width: 700px) {
  #who { flex-wrap: wrap; }
  #both { flex-basis: 100%; }
  #controls { position: static; }
  .buttons button { padding: .5rem .8rem; }
  .buttons button.primary { padding: .5rem 1.2rem; }
  .examples .gallery { flex-wrap: nowrap; overflow-x: auto; max-width: calc(100vw - 4rem); padding-bottom: .5rem; }
  .examples .gallery-item { flex: 0 0 auto; max-width: 75%; }
}
"""

SCRIPT = """() => {
  for (const part of document.querySelectorAll(".block[id^=note-]")) part.setAttribute("role", "status");
  for (const part of document.querySelectorAll(".block.talk")) { part.setAttribute("role", "log"); part.tabIndex = 0; }
}"""
"""Tells screen readers which parts speak up when they change, and lets the keyboard scroll conversations.

Gradio writes a part's class on its block and again inside; a role belongs to one of them.
"""


def theme() -> Any:
    """Return the page's Gradio theme."""
    hues = {"primary_hue": gr.themes.colors.teal, "neutral_hue": gr.themes.colors.slate}
    made = gr.themes.Default(font=FONT, font_mono=MONO, **hues)
    return made.set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        color_accent="*primary_700",
        checkbox_background_color_selected="*primary_700",
        checkbox_border_color_selected="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_secondary_text_color="*neutral_800",
        slider_color="*primary_700",
        slider_color_dark="*primary_400",
    )
