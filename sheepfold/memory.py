"""A machine's memory: how much there is, how much a process has needed, and what running out of it looks like.

On a CPU that is the resident memory of the process, libraries and all; on a GPU what torch allocated there.
"""

import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from sheepfold.devices import group

BYTES_PER_NUMBER = 16
"""An adapter number in training: itself, its gradient, and two moments, in float32."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FULL = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's allocators and the libraries below them say in a RuntimeError where a CPU has no memory left"""


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory that the device has; of a machine's own, each of its processes' equal part."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // group.local_world()


def in_use(device: torch.device) -> int:
    """Return the bytes that this process has in use on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS") or _largest()


def peak(device: torch.device) -> int:
    """Return the largest number of bytes in use since `forget_peak`, or, where a system cannot forget, ever."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM") or _largest()


def forget_peak(device: torch.device) -> None:
    """Let `peak` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        with suppress(OSError):  # a system that forbids it goes on counting from the start
            CLEAR.write_text("5")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the machine, or its device, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)


def free() -> None:
    """Give back what nobody refers to any more; for after an error, whose frames hold on to tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _status(name: str) -> int:
    """Return a figure of Linux's, in bytes; 0 where there is none."""
    if not STATUS.exists():
        return 0
    lines = STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _largest() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
