"""What a client is told when something is wrong, in the shape that OpenAI's clients read."""

import json
from typing import Any

from sheepfold.errors import suggest


class ApiError(Exception):
    """An answer other than 200: a status, and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return {"error": {message, type, param, code}}."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def encoded(self) -> bytes:
        """Return the body as JSON."""
        return json.dumps(self.body()).encode()

    @property
    def type(self) -> str:
        """OpenAI's kind of error; its clients raise by status, people read this."""
        if self.status in (401, 403):
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the 400 for a request that cannot be answered as it stands."""
    return ApiError(400, message, param=param, code=code)


def no_such_model(name: str, known: tuple[str, ...]) -> ApiError:
    """Return the 404 for a model that is not served, with the nearest that are."""
    asked = shown(name)
    return ApiError(404, f"model: no {asked}; {suggest(name[:80], known)}", param="model", code="model_not_found")


def too_long(message: str, param: str) -> ApiError:
    """Return the 400 for a prompt, or a prompt and its answer, beyond the model's positions."""
    return bad_request(message, param, "context_length_exceeded")


def timed_out(seconds: float) -> ApiError:
    """Return the 504 for an answer that took longer than the server allows, waiting included."""
    return ApiError(
        504,
        f"no answer within {seconds:g} seconds, waiting included; ask for fewer tokens, or start the server with a "
        "larger --seconds",
        code="timeout",
    )


def internal(id: str) -> ApiError:
    """Return the 500 that names the line in the server's log and nothing else."""
    return ApiError(500, f"the server failed; its log says why under {id}", code="internal_error")


def shown(value: Any, most: int = 60) -> str:
    """Return a value as a client may be told of it: short, on one line."""
    if isinstance(value, str):
        text = repr(value[:most] + "..." if len(value) > most else value)
    elif isinstance(value, (list, tuple)):
        text = f"a list of {len(value)}" if len(value) > 4 else _compact(value, most)
    elif isinstance(value, dict):
        text = f"an object of {len(value)} keys" if len(value) > 4 else _compact(value, most)
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        text = f"an integer of {value.bit_length()} bits"
    else:
        text = _compact(value, most)
    return text


def _compact(value: Any, most: int) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= most else f"{text[:most]}..."
