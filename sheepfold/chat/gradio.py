"""Gradio, told before its import that it shall call nobody."""

import os

from sheepfold.errors import missing_extra

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import gradio as gr
except ModuleNotFoundError:
    raise missing_extra("the chat page", "gradio", "chat") from None

for kind in (gr.Slider, gr.Number):
    # As typed, for `controls.from_values` to check: Gradio's own check ends in a traceback. On the classes, since
    # Gradio makes components anew when they change, and writes a file beside the source of a class of one's own.
    kind.preprocess = lambda self, payload: payload

__all__ = ["gr"]
