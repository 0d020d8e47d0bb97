"""The options of a run between machines: who takes part, when a round closes, and what becomes of what comes later."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sheepfold.section import Fraction, Section

Name = Annotated[str, Field(min_length=1)]


class NetworkSettings(Section):
    """Rounds between machines (docs/network.md); a run in one process has no use for these."""

    deadline: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which a round closes as soon as `quorum` of it has answered; null: it waits for everybody who is
    there."""
    quorum: Fraction = 1.0
    """Share of a round's clients that must have answered before it closes, with an update or with a reason for none."""
    over_selection: Annotated[float, Field(ge=0)] = 0.0
    """Ask this share more clients in each round; it closes as soon as as many updates as without are in, and the rest
    is left out."""
    late: Literal["drop", "next"] = "drop"
    """An update that comes after its round has closed: drop; next: its change counts in the next round (fedavg, fedit,
    fedprox, ffa_lora)."""
    clients: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Names of the clients that take part; null: all that are enrolled."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.deadline is not None and self.quorum == 1:
            raise ValueError(
                f"deadline {self.deadline:g} has no effect with quorum 1, which waits for everybody; set quorum, such "
                "as 0.7"
            )
        if self.late == "next" and self.quorum == 1 and not self.over_selection:
            raise ValueError("late next has no effect with quorum 1, since nobody is late; set quorum, such as 0.7")
        if self.clients is not None and len(set(self.clients)) < len(self.clients):
            twice = next(name for name in self.clients if self.clients.count(name) > 1)
            raise ValueError(f"clients names {twice!r} twice; remove one")
        return self
