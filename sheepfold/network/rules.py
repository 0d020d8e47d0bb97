"""When a round between machines closes.

as many updates as wanted are in, or everybody has answered                        close
nobody who has not answered is there, and `quorum` of the wanted have answered     close
the deadline has passed, and `quorum` of the wanted have answered                  close
else                                                                               wait
"""

import math
from dataclasses import dataclass

from sheepfold.network.settings import NetworkSettings


@dataclass(frozen=True, slots=True)
class Rules:
    """What closes one round."""

    wanted: int
    """Updates, after which nobody else is waited for"""
    need: int
    """Answers, below which no deadline and no machine that left closes it"""
    deadline: float | None = None
    """Seconds since it began"""

    def close(self, *, updates: int, answers: int, outstanding: int, there: int, seconds: float) -> bool:
        """Return whether a round closes now.

        answers: clients that have answered at all, updates among them; outstanding: those that have not; there: those
        of them that are connected.
        """
        if updates >= self.wanted or not outstanding:
            return True
        return answers >= self.need and (not there or (self.deadline is not None and seconds >= self.deadline))


def rules(settings: NetworkSettings, wanted: int) -> Rules:
    """Return the rules of a round that wants this many updates."""
    return Rules(wanted, max(1, math.ceil(settings.quorum * wanted - 1e-9)), settings.deadline)
