"""Trackers after a run, or beside one that another process runs."""

import time
from collections.abc import Mapping
from pathlib import Path

from sheepfold.errors import CheckpointError, ConfigError, SheepfoldError
from sheepfold.journal import RunFolder
from sheepfold.loading import first_line
from sheepfold.tracking import check_arguments
from sheepfold.tracking.base import Follower, check_installed
from sheepfold.tracking.running import status

PAUSE_S = 2.0


def track(path: Path, name: str, arguments: Mapping[str, str], *, follow: bool = False) -> tuple[int, str | None]:
    """Send what is new in a run's folder to a tracker; return how many rounds, and the tracker's name for the run.

    arguments: over the run's own tracker_args. follow: go on until no process is at the run. Raises SheepfoldError, in
    one line, where the run, its tracker or the tracker's library is not there, or the tracker fails.
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
            before, stood = "open", status(path)  # asked before reading: what was written until then is read
            sent = follower.catch_up()
            while follow and (stood == "open" or before != stood == "failed"):  # one that begins has no lock yet
                time.sleep(PAUSE_S)
                before, stood = stood, status(path)
                sent += follower.catch_up()
            follower.status = stood
            return sent, follower.memory.id
    except (SheepfoldError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a tracker's library raises
        raise ConfigError(f"--to {name}: {first_line(error)[:200]}; what was sent is remembered, try again") from None
