"""Trackers after a run, or beside one that another process runs."""

import time
from collections.abc import Mapping
from pathlib import Path

from sheepfold.errors import CheckpointError, ConfigError, SheepfoldError
from sheepfold.journal import RunFolder
from sheepfold.loading import first_line
from sheepfold.tracking import check_arguments
from sheepfold.tracking.base import Follower, check_installed

PAUSE_S = 2.0


def track(path: Path, name: str, arguments: Mapping[str, str], *, follow: bool = False) -> tuple[int, str | None]:
    """Send what is new in a run's folder to a tracker; return how many rounds, and the tracker's name for the run.

    arguments: over the run's own tracker_args. follow: go on until the run has ended. Raises SheepfoldError, in one
    line, where the run, its tracker or the tracker's library is not there, or the tracker fails.
    """
    check_installed([name])
    run = RunFolder(path)
    own = {**run.experiment().tracker_args.get(name, {}), **arguments}
    try:
        check_arguments([name], {name: own})
    except ValueError as error:
        raise ConfigError(f"--to {name}: {error}") from None
    if not (path / "rounds.jsonl").is_file() and not follow:
        raise CheckpointError(f"{path}: the run has no round yet; wait, or stay with --follow")
    try:
        with Follower(run, name, own) as follower:
            sent = follower.catch_up()
            while follow and not ended(path):
                time.sleep(PAUSE_S)
                sent += follower.catch_up()
            return sent, follower.memory.id
    except (SheepfoldError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a tracker's library raises
        raise ConfigError(f"--to {name}: {first_line(error)[:200]}; what was sent is remembered, try again") from None


def ended(path: Path) -> bool:
    """Return whether a run has come to its end: its card is written last."""
    card, journal = path / "model_card.md", path / "rounds.jsonl"
    return card.is_file() and journal.is_file() and card.stat().st_mtime >= journal.stat().st_mtime
