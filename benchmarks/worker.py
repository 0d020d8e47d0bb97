"""A way of training in a process of its own, which trains when it is asked to: so its peak memory is its own, and ways
can take turns, so that what else the machine does hits all of them alike.

    ready ─▶ train ─▶ Lap ─▶ train ─▶ Lap ... ─▶ end
"""

import gc
import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.ways import STAGES, WAYS, Trained
from benchmarks.workloads import NotHere, Setting, workload
from sheepfold import memory
from sheepfold.errors import SheepfoldError

MIB = 2**20

PRELOADED = ["benchmarks.worker", "transformers.models.llama.modeling_llama", "transformers.trainer", "peft"]
"""What every process has imported before it begins, so that each starts in no time and none is larger for it"""


@dataclass(frozen=True, slots=True)
class Lap:
    """What training all clients once took."""

    seconds: float
    cpu_seconds: float
    """Of all threads"""
    stages: Mapping[str, float]
    peak_mib: float
    """The most that the process held, of the device's memory or on a CPU of the resident one"""

    @property
    def share(self) -> float | None:
        """Share of all seconds in forward, backward and step; None where the way counts no stages."""
        if not any(self.stages.get(stage) for stage in STAGES):
            return None
        return sum(self.stages.get(stage, 0.0) for stage in STAGES[1:]) / self.seconds


@dataclass(frozen=True, slots=True)
class Ready:
    """What is known of a way before it trains."""

    base_mib: float
    """What its process holds with the base and nothing else"""
    load_seconds: float
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a way has no figures."""

    why: str


@dataclass(slots=True)
class Worker:
    """One way on one setting, in its process."""

    way: str
    setting: Setting
    threads: int = 0
    """Of torch; 0: as many as it takes by itself"""
    laps: list[Lap] = field(default_factory=list)
    ready: Ready | None = None
    failed: str = ""
    _pipe: Any = None
    _process: Any = None

    def begin(self) -> None:
        """Start the process and wait until it could train."""
        # importing bitsandbytes asks CUDA for its devices, and a process forked after that has none
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.way, self.setting, self.threads), daemon=True)
        self._process.start()
        theirs.close()
        self.ready = self._heard()

    def train(self, save: Path | None = None) -> Lap | None:
        """Train once; None where that failed, see `failed`. save: where to put the adapters."""
        if self.failed:
            return None
        self._pipe.send(save or True)
        lap = self._heard()
        if lap is not None:
            self.laps.append(lap)
        return lap

    def end(self) -> None:
        """Let the process end."""
        if self._process is not None:
            if self._process.is_alive():
                self._pipe.send(None)
            self._process.join()
            self._pipe.close()

    def _heard(self) -> Any:
        try:
            told = self._pipe.recv()
        except EOFError:
            self._process.join()
            told = Failed(f"its process died ({self._process.exitcode}); out of memory?")
        if isinstance(told, Failed):
            self.failed = told.why
            return None
        return told


def _serve(pipe: Any, way: str, setting: Setting, threads: int) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads:
        torch.set_num_threads(threads)
    work = None
    try:
        began = time.perf_counter()
        work = workload(setting)
        train, base = WAYS[way](work)
        gc.collect()
        took = time.perf_counter() - began
        pipe.send(
            Ready(memory.in_use(base.device) / MIB, took, str(base.device), str(base.dtype).removeprefix("torch."))
        )
        while (order := pipe.recv()) is not None:
            lap, done = _lap(train, base.device)
            if isinstance(order, Path):
                save({client: adapter.tensors() for client, adapter in done.adapters.items()}, order)
            del done
            pipe.send(lap)
    except (NotHere, SheepfoldError, RuntimeError) as error:  # out of memory is a RuntimeError
        pipe.send(Failed(str(error).splitlines()[0]))
        pipe.recv()
    finally:
        if work is not None:
            work.remove()


def _lap(train: Any, device: torch.device) -> tuple[Lap, Trained]:
    gc.collect()
    memory.forget_peak(device)
    machine.wait(device)
    began, began_cpu = time.perf_counter(), time.process_time()
    done = train()
    machine.wait(device)
    lap = Lap(
        time.perf_counter() - began, time.process_time() - began_cpu, dict(done.seconds), memory.peak(device) / MIB
    )
    return lap, done


def save(updates: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Write every client's tensors into a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for client, tensors in updates.items():
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / f"{client}.safetensors")


def read(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return what `save` wrote: {client: {flat name: tensor}}."""
    from safetensors.torch import load_file

    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
