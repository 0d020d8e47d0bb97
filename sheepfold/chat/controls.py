"""What a user may turn while talking: one table for the page's sliders and the terminal's /set.

Where several beams are searched nothing is drawn, and at temperature 0 there is nothing to cut, so `idle` names the
controls that have no effect at the moment: the page switches them off, the terminal says so.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from sheepfold.config import GenerationSettings
from sheepfold.errors import ConfigError, suggest


@dataclass(frozen=True, slots=True)
class Range:
    """One control: its words, its bounds and its step."""

    label: str
    low: float
    high: float
    step: float
    info: str = ""

    @property
    def whole(self) -> bool:
        """Whether it counts in whole numbers."""
        return self.step == int(self.step)


RANGES = {
    "temperature": Range("Temperature", 0, 1, 0.05, "0 takes the likeliest token"),
    "top_p": Range("Top-p", 0.05, 1, 0.05, "Draw from this share of the probability"),
    "top_k": Range("Top-k", 0, 100, 1, "Draw from this many tokens; 0: all"),
    "beams": Range("Beams", 1, 4, 1, "Search for the likeliest answer; shown whole"),
    "new_tokens": Range("New tokens", 1, 2000, 1, "The longest answer"),
    "seed": Range("Seed", 0, 2**31 - 1, 1, "Names the draws"),
    "turns": Range("Turns remembered", 0, 20, 1, "Earlier turns that the model is shown"),
}
"""Temperature to new tokens have the bounds of Shepherd's page, but for top-p 0, which leaves nothing to draw from."""


@dataclass(frozen=True, slots=True)
class Controls:
    """The controls' values. The first answers are greedy: what the model holds likeliest, the same every time."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    beams: int = 1
    new_tokens: int = 128
    seed: int = 0
    turns: int = 4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            known = RANGES[name]
            if not known.low <= value <= known.high or (known.whole and value != int(value)):  # nan is in no range
                kind = "a whole number" if known.whole else "a number"
                found, low, high = (f"{v:,.10g}" for v in (value, known.low, known.high))
                raise ConfigError(f"{name}: found {found}; expected {kind} from {low} to {high}")

    def generation(self) -> GenerationSettings:
        """Return the decoding that these controls mean; idle ones are left out of it."""
        off = idle(self.temperature, self.beams)
        return GenerationSettings(
            max_new_tokens=self.new_tokens,
            temperature=0.0 if "temperature" in off else self.temperature,
            top_p=1.0 if "top_p" in off else self.top_p,
            top_k=0 if "top_k" in off else self.top_k,
            beams=self.beams,
        )

    @property
    def samples(self) -> bool:
        """Whether another seed gives another answer."""
        return "seed" not in idle(self.temperature, self.beams)

    def with_text(self, name: str, text: str) -> "Controls":
        """Return the controls with one of them set from its text. Raises ConfigError."""
        if name not in RANGES:
            raise ConfigError(f"/set: no control {name!r}; {suggest(name, RANGES)}")
        try:
            return from_values(asdict(self) | {name: float(text)})
        except ValueError:
            raise ConfigError(f"/set {name}: found {text!r}; expected a number") from None


def from_values(values: Mapping[str, float | None]) -> Controls:
    """Return the controls from numbers as a page has them: 8.0 and 8 are the same count. Raises ConfigError."""
    for name, value in values.items():
        if value is None:
            raise ConfigError(f"{RANGES[name].label}: is empty; give it a number")
    return Controls(**{name: number(name, value) for name, value in values.items()})  # type: ignore[arg-type]


def number(name: str, value: float | None) -> float | None:
    """Return the value as this control counts: an int where it is a whole one."""
    return int(value) if value is not None and RANGES[name].whole and float(value).is_integer() else value


def idle(temperature: float, beams: float) -> frozenset[str]:
    """Return the controls without effect at this temperature and this many beams."""
    if beams > 1:
        return frozenset({"temperature", "top_p", "top_k", "seed"})
    return frozenset({"top_p", "top_k", "seed"}) if temperature == 0 else frozenset()


NAMES = tuple(field.name for field in fields(Controls))
