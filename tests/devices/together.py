"""One of several processes that share runs: python -m tests.devices.together FOLDER runs FOLDER/*.yaml, in order.

Started with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them; `start` does so.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(command: Sequence[str], world: int, **over: Mapping[int, str] | str | Path) -> list[subprocess.Popen[str]]:
    """Start a command as so many processes of one run; over: more of the environment, and cwd (by rank)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    more |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    places = over.get("cwd", {})
    assert isinstance(places, Mapping)
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | more | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=places.get(rank, ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def ended(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 120) -> list[tuple[int, str, str]]:
    """Return exit code, output and errors of each, by rank; ends those that do not end by themselves."""
    try:
        said = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *told) for process, told in zip(processes, said, strict=True)]


def main(folder: Path) -> None:
    """Take part in all runs."""
    from sheepfold import simulation
    from sheepfold.config import load
    from sheepfold.devices import group
    from sheepfold.devices.place import Shared
    from sheepfold.devices.team import Team
    from sheepfold.devices.worker import Worker
    from tests import small

    with small.quick(), group.joined() as talking:
        for file in sorted(folder.glob("*.yaml")):
            if group.is_main():
                simulation.run(load(file), place=Shared(Team(talking)))
            else:
                worker = Worker(Team(talking))
                worker.work()
                worker.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
