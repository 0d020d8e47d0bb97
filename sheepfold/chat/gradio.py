"""Gradio, told before its import that it shall call nobody."""

import os

from sheepfold.errors import missing_extra

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import gradio as gr
except ModuleNotFoundError:
    raise missing_extra("the chat page", "gradio", "chat") from None

__all__ = ["gr"]
