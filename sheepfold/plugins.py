"""Own parts by name: `module:attribute`, found on the import path or in the current folder."""

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sheepfold.errors import ConfigError, suggest


def find(known: Mapping[str, Any], name: str, key: str) -> Any:
    """Return the part of this name from `known`, or the attribute that `module:attribute` names.

    key is the option that named it. Raises ConfigError for a name, module or attribute that is not there.
    """
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigError(f"{key}: no {name!r}; {suggest(name, known)}; or module:attribute for your own")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        part = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0] and error.name != module:
            raise  # the module is there, and one of its own imports is not: its traceback says more than we could
        raise ConfigError(f"{key} {name!r}: no module {module!r} on the import path or in this folder") from None
    except AttributeError:
        raise ConfigError(f"{key} {name!r}: module {module!r} has no {attribute!r}") from None
    if not callable(part):
        raise ConfigError(f"{key} {name!r}: found a {type(part).__name__}, expected something to call")
    return part


def resolve(known: Mapping[str, Any], name: str, key: str, arguments: Mapping[str, Any]) -> Any:
    """Return `find(...)(**arguments)`; raise ConfigError, naming them, for arguments that it does not take."""
    part = find(known, name, key)
    try:
        inspect.signature(part).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{key} {name!r}: {error}; it takes {inspect.signature(part)}") from None
    return part(**arguments)
