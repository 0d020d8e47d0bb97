"""Processes that are kept alive, and gone when their supervisor is."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sheepfold.flower import supervise
from sheepfold.flower.supervise import Child, flower_environment, stop_all

FOREVER = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
SUPERVISOR = """
import sys, time
from pathlib import Path
from sheepfold.flower.supervise import Child
import os
child = Child(name="x", command=lambda: sys.argv[2:], log=Path(sys.argv[1]), environment=dict(os.environ))
child.start()
print(child.pid, flush=True)
time.sleep(60)
"""


def child(tmp_path: Path, command: list[str]) -> Child:
    return Child(name="x", command=lambda: command, log=tmp_path / "x.log", environment=flower_environment(tmp_path))


def wait(true: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_child_that_ends_is_started_again_with_a_growing_pause(tmp_path: Path) -> None:
    made, said = child(tmp_path, [sys.executable, "-c", "raise SystemExit(3)"]), []
    began = time.monotonic()
    while made.starts < 4:
        made.step(said.append)
        time.sleep(0.02)
    assert time.monotonic() - began >= supervise.FIRST_PAUSE_S * (1 + 2 + 4)
    assert "exit code 3" in said[0]
    assert "1 s" in said[2]
    made.stop()


def test_a_child_that_is_killed_is_back_at_once(tmp_path: Path) -> None:
    made, said = child(tmp_path, FOREVER), []
    made.start()
    first = made.pid
    assert made.process is not None
    made.process.kill()
    wait(lambda: (made.step(said.append), made.pid not in (None, first))[1])
    assert "SIGKILL" in said[0]
    stop_all([made])
    assert made.pid is None


def test_stopping_ends_a_childs_own_children_and_one_that_will_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "GRACE_S", 0.5)
    script = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(inner.pid, flush=True)\n"
        "time.sleep(60)"
    )
    made = child(tmp_path, [sys.executable, "-c", script])
    made.start()
    wait(lambda: made.log.read_text().strip())
    outer, inner = made.pid, int(made.log.read_text())
    assert outer is not None
    stop_all([made])
    wait(lambda: gone(inner))
    assert gone(outer)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own doing, on Linux")
def test_children_end_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SUPERVISOR, str(tmp_path / "x.log"), *FOREVER]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    wait(lambda: gone(pid))


def test_a_long_log_is_turned_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LARGEST_LOG", 1000)
    made = child(tmp_path, [sys.executable, "-uc", "import time\nfor _ in range(3): print('x' * 900); time.sleep(0.4)"])
    made.start()
    wait(lambda: (made.step(lambda line: None), (tmp_path / "x.log.1").exists())[1])
    wait(lambda: made.process is None or made.process.poll() is not None)
    assert made.log.stat().st_size <= 1810
    made.stop()


def test_flowers_environment_sends_nothing_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_FLEET_API", "1")
    made = flower_environment(tmp_path, SHEEPFOLD_FOLD="here")
    assert made["FLWR_TELEMETRY_ENABLED"] == "0"
    assert made["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert made["SHEEPFOLD_FOLD"] == "here"
    assert "FLWR_INTERNAL_GRPC_FLEET_API" not in made
    assert made["PATH"].startswith(str(Path(sys.executable).parent))
