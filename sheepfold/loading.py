"""Between transformers' loaders and the terminal: silence while they work, one line when they fail."""

import contextlib
import pickle
import re
from collections.abc import Iterator

from safetensors import SafetensorError

from sheepfold.errors import ModelError

TROUBLE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    ImportError,
    AttributeError,
    TypeError,
    SafetensorError,
)
"""What transformers raises for bases that it cannot load."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and load reports off the terminal: what matters in them is raised instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def one_line(base: str) -> Iterator[None]:
    """Turn what transformers raises into a ModelError of one line that says what next."""
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"more than tensors ({found[1]})" if found else "something that is not tensors"
        raise ModelError(
            f"model.base {base!r}: its .bin weights hold {what}, and unpickling that could run code: "
            "refused; use a safetensors copy"
        ) from None
    except TROUBLE as error:
        raise ModelError(f"model.base {base!r}: {_explain(error, base)}") from None


def _explain(error: Exception, base: str) -> str:
    text, line = str(error), first_line(error)
    if "connect to" in text or "offline mode" in text or "LocalEntryNotFound" in type(error).__name__:
        return (
            "no such folder, and the hub cannot be reached to look for the id; "
            f"download it where there is a network (`hf download {base}`), or give a folder"
        )
    if isinstance(error, SafetensorError) or "PytorchStreamReader" in text:
        return f"the weights are damaged or cut short ({line}); download or copy them again"
    if "scaled_dot_product_attention" in text:
        return "the family has no sdpa attention; set model.attention to auto or eager"
    if "custom code" in text or "trust_remote_code" in text:
        return "it needs code from its repository, which is never run; choose a family that transformers knows"
    if "Reinit due to size mismatch" in text or "ignore_mismatched_sizes" in text:
        return "the weights do not have the shapes of config.json; use the configuration that came with them"
    if "no file named" in text:
        return "the folder has no weights (model.safetensors, pytorch_model.bin); download or copy it again"
    if "valid JSON" in text:
        return "its config.json is not valid JSON; download or copy the base again"
    return line


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
