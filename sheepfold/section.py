"""What every part of the experiment file is made of, for settings that live in files of their own."""

from collections.abc import Mapping
from types import MappingProxyType, NoneType
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sheepfold.errors import suggest

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A frozen part of the experiment file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def first_problem(
    error: ValidationError, section: type[BaseModel], expected: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return the first validation error as one line: key, value found, what was expected.

    section: what was validated; expected: what to say of a key, instead of what pydantic says.
    """
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("tuple[", "literal[")))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {suggest(key.rpartition('.')[2], _keys_beside(problem['loc'], section))}"
    if problem["type"] == "missing":
        return f"{key} is missing; {expected.get(key, 'set it')}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: found {problem['input']!r}; {expected.get(key, message[:1].lower() + message[1:])}"


def _keys_beside(location: tuple[int | str, ...], section: type[BaseModel]) -> list[str]:
    for part in location[:-1]:
        found: Any = section.model_fields[str(part)].annotation
        section = next((kind for kind in get_args(found) if kind is not NoneType), found)  # of an optional section
    return list(section.model_fields)
