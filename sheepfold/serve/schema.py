"""Requests as OpenAI's clients send them: every option honoured, neutral, or refused by name.

    bytes ─ JSON ─ null options left out ─ neutral ones left out, others refused ─ typed fields ─▶ a request

Parsing is pydantic's own: nesting deeper than 200, NaN, lone surrogates and numbers of thousands of digits are errors
of the parser, before any of it is looked at.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from sheepfold.errors import suggest
from sheepfold.serve.faults import ApiError, bad_request, shown

MOST_STOPS = 16
"""Stop strings of one request; OpenAI takes four, but code benchmarks name six."""
MOST_TOP = 20
"""Alternatives that log-probabilities are given for at each token."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Options that exist elsewhere -> the values with which they change nothing; any other value is refused."""


def _content(value: Any) -> Any:
    """Return a message's text: a string, or the texts of its parts end to end."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "expected a string or a list of text parts")
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError(
                "content", "expected text alone; part {i} is not of the form type: text, text: ...", {"i": i}
            )
        texts.append(part["text"])
    return "".join(texts)


def _role(value: Any) -> Any:
    if value == "developer":  # what newer OpenAI models call the system
        return "system"
    if value not in ("system", "user", "assistant"):
        raise PydanticCustomError("role", "expected system, user or assistant")
    return value


def _stop(value: Any) -> Any:
    """Return the stop strings, as a tuple."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise PydanticCustomError("stop", "expected a string or a list of strings, none of them empty")
    if len(stops) > MOST_STOPS:
        raise PydanticCustomError("stop", "expected at most {most} stop strings", {"most": MOST_STOPS})
    return tuple(stops)


def _prompts(value: Any) -> Any:
    """Return the prompts, as a tuple of texts and tuples of token ids."""
    wrong = PydanticCustomError(
        "prompt", "expected a string, a list of strings, a list of token ids, or a list of such lists"
    )
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise wrong
    if all(isinstance(prompt, str) for prompt in value):
        return tuple(value)
    if _are_ids(value):
        return (tuple(value),)
    if all(isinstance(prompt, list) and prompt and _are_ids(prompt) for prompt in value):
        return tuple(tuple(prompt) for prompt in value)
    raise wrong


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _top_k(value: Any) -> Any:
    return 0 if type(value) is int and value == -1 else value  # elsewhere -1 is no limit


Fraction = Annotated[float, Field(allow_inf_nan=False)]


class Message(BaseModel):
    """One turn of a conversation, also one as this server sent it."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Drop what is null: clients hand answers back whole, with `refusal` and `tool_calls` of null."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if key == "content" or value is not None}

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)]


class StreamOptions(BaseModel):
    """What a stream says beside the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    """A served adapter's name."""
    max_tokens: Annotated[int | None, Field(ge=0)] = None
    temperature: Annotated[Fraction, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Fraction, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop)] = ()
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str | None, Field(max_length=512)] = None
    """Who asks. Nothing is kept of it, nor of the next two."""
    prompt_cache_key: Annotated[str | None, Field(max_length=512)] = None
    safety_identifier: Annotated[str | None, Field(max_length=512)] = None
    top_k: Annotated[int, BeforeValidator(_top_k), Field(ge=0)] = 0
    """Ours: sample from this many likeliest tokens; 0: no limit."""
    beams: Annotated[int, Field(ge=1, le=32)] = 1
    """Ours: search this many beams; needs temperature 0."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Leave out what is null or neutral; refuse, by name, what cannot be honoured."""
        if not isinstance(values, dict):
            raise bad_request(f"the body is {shown(values)}; expected a JSON object", code="invalid_json")
        kept = {}
        for name, value in values.items():
            if value is None:
                continue
            if name in NEUTRAL:
                _refuse_unless_neutral(name, value, NEUTRAL[name])
                continue
            if name == "best_of":
                _refuse_unless_neutral(name, value, _harmless_best_of(values, value))
                continue
            if name not in cls.model_fields:
                raise bad_request(
                    f"{shown(name)}: not an option of this server; {suggest(name[:80], cls.model_fields)}",
                    name[:80],
                    "unknown_parameter",
                )
            kept[name] = value
        return kept

    @model_validator(mode="after")
    def _agree(self) -> "Request":
        if self.beams > 1 and self.temperature > 0:
            raise bad_request(
                f"beams: {self.beams} beams search for the likeliest answer; set temperature to 0", "beams"
            )
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options: has no effect without stream: true", "stream_options")
        return self


class ChatRequest(Request):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP)] = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "ChatRequest":
        if not self.messages:
            raise bad_request("messages: found []; expected one message or more", "messages")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise bad_request(
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one",
                "max_tokens",
            )
        if self.max_tokens == 0:
            raise bad_request("max_tokens: found 0; an answer needs at least 1", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs: has no effect without logprobs: true", "top_logprobs")
        return self


class CompletionRequest(Request):
    """POST /v1/completions"""

    prompt: Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_prompts)]
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP)] = None

    @model_validator(mode="after")
    def _something_to_do(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens: found 0; without echo, an answer needs at least 1", "max_tokens")
        return self


Asked = TypeVar("Asked", bound=Request)


def parse(body: bytes, kind: type[Asked]) -> Asked:
    """Return the request that a body holds. Raises ApiError (400) naming the option, what it is, what is expected."""
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}", code="invalid_json") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    where = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return bad_request(f"{where}: missing", where, "missing_required_parameter")
    wanted = first["msg"].replace("Input should be", "expected")
    if first["type"] == "extra_forbidden":
        wanted = "not an option of this server"
    return bad_request(f"{where}: found {shown(first['input'])}; {wanted}", where, "invalid_value")


def _refuse_unless_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if any(_same(value, harmless) for harmless in neutral):
        return
    allowed = f"leave it out, or send {' or '.join(shown(v) for v in neutral)}" if neutral else "leave it out"
    raise bad_request(
        f"{name}: found {shown(value)}, which this server cannot honour; {allowed}", name, "unsupported_parameter"
    )


def _harmless_best_of(values: dict[str, Any], best_of: Any) -> tuple[Any, ...]:
    """Return what best_of may be: the best n of n are all of them, and at temperature 0 all are the same."""
    greedy = _same(values.get("temperature"), 0) and type(best_of) is int and best_of > 0
    return (1, values.get("n") or 1, *([best_of] if greedy else []))


def _same(left: Any, right: Any) -> bool:
    """Equal as JSON is: 1 and 1.0 are, 1 and true are not."""
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)
