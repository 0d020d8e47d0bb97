"""The processes that torchrun started together: which of them this is, and the group in which they talk.

Everything before `joined` reads the environment alone (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, as torchrun sets
them) and imports no torch. A process is told by its rank here; everywhere else a rank is LoRA's.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sheepfold.errors import ConfigError, TrainingError

START_TIMEOUT_S = 300.0
"""How long processes wait for each other at the start: imports from a slow disk take a minute."""
WAIT_TIMEOUT_S = 86_400.0
"""How long one waits for another's answer. A process that died is noticed at once, since its connection closes; this is
for a machine that vanished."""


def rank() -> int:
    """Return this process's number; 0 where there is one."""
    return _number("RANK", 0)


def world() -> int:
    """Return how many processes there are; 1 without torchrun."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return this process's number on its machine, which is its GPU's."""
    return _number("LOCAL_RANK", rank())


def local_world() -> int:
    """Return how many processes there are on this machine."""
    return _number("LOCAL_WORLD_SIZE", world())


def is_main() -> bool:
    """Return whether this is the process that runs the loop, writes and prints; the others work for it."""
    return rank() == 0


def several() -> bool:
    """Return whether there is more than one process."""
    return world() > 1


def under_torchrun() -> bool:
    """Return whether torchrun, and not somebody's own script, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def threads_asked() -> int:
    """Return how many threads the environment asks for; 0: it says nothing."""
    return _number("OMP_NUM_THREADS", 0)


def cores() -> int:
    """Return how many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def joined(backend: str | None = None, timeout_s: float = WAIT_TIMEOUT_S) -> Iterator[Any]:
    """Let this process join the others; gives a gloo group in which they wait for each other up to `timeout_s`.

    The default group of torch.distributed is made with it, and given up at the end of the block. backend: what carries
    tensors in that one, as torch names it; None: gloo those of the CPU and, where there are GPUs, nccl theirs. Raises
    ConfigError where the others cannot be found.
    """
    import torch
    import torch.distributed as dist

    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=START_TIMEOUT_S))
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"process {rank()} of {world()}: cannot join the others ({said}); start all with torchrun, such as "
            "torchrun --nproc-per-node 2 -m sheepfold run experiment.yaml"
        ) from None
    try:
        yield group
    finally:
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Return whether an error says that another process has ended, or does not answer."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def lost(who: str = "another process") -> TrainingError:
    """Return the error of a run of which a process has ended."""
    return TrainingError(f"{who} has ended (killed, or out of memory?); finished rounds are saved, go on with --resume")


def _number(name: str, default: int) -> int:
    """Return a number of the environment. Raises ConfigError for what is none."""
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"${name} is {text!r}, expected a number, as torchrun sets it") from None
