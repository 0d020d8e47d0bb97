"""How much one client may ask of the server, and for how long."""

from dataclasses import dataclass, fields

from sheepfold.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may cost; each field is an option of `sheepfold serve`."""

    body_bytes: int = 4 * 2**20
    """A request's body, counted while it is read."""
    new_tokens: int = 2048
    """Tokens that one answer may have."""
    rows: int = 64
    """Answers of one request: prompts times n."""
    waiting: int = 32
    """Requests that wait for the model, the one that it works on aside."""
    seconds: float = 300
    """From a request's arrival to the end of its answer, waiting included."""
    body_seconds: float = 20
    """To receive a request's headers, its body, or to take what was sent."""
    connections: int = 256
    """Connections open at once."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "waiting" else 1
            if not value >= least:
                raise ConfigError(f"--{field.name.replace('_', '-')} {value}: expected {least} or more")
