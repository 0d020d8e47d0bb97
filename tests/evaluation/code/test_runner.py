"""Generated programs end, whatever they do, and leave nothing; with namespaces and without."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from sheepfold.evaluation.code import runner
from sheepfold.evaluation.code.limits import KIB, Job, Limits, Step
from tests.evaluation.code.programs import mark, needs_linux, private, python, survivors, wait_for

__all__ = ["private"]  # a fixture

both = pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "limits alone"])


def test_a_program_gives_its_output_and_its_exit_code():
    outcome = python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (outcome.stdout, outcome.stderr, outcome.exit_code, outcome.ok) == ("out\n", "err\n", 3, False)


def test_input_is_what_was_given_and_then_ends():
    assert python("import sys; print([sys.stdin.read()])", stdin="a token").stdout == "['a token']\n"
    assert "EOFError" in python("input()").stderr


@both
def test_a_program_that_loops_is_ended_by_its_processor_time(namespaces):
    outcome = python("while True: pass", timeout_s=20, namespaces=namespaces)
    assert outcome.killed == "time"
    assert outcome.seconds < 20


@both
def test_a_program_that_waits_is_ended_by_the_clock(namespaces):
    outcome = python("import time; time.sleep(60)", timeout_s=0.3, namespaces=namespaces)
    assert outcome.killed == "time"


@both
def test_a_program_that_ignores_every_signal_is_ended_all_the_same(namespaces):
    deaf = "import signal\nfor n in (1, 2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    assert python(deaf, timeout_s=0.5, namespaces=namespaces).killed == "time"


@both
def test_allocating_without_end_is_a_memory_error(namespaces):
    outcome = python(
        "kept = []\nwhile True: kept.append(bytearray(1 << 23))", namespaces=namespaces, timeout_s=8, cpu_s=4
    )
    assert "MemoryError" in outcome.stderr or outcome.killed == "memory"
    assert outcome.peak_mib < 260


@needs_linux
@both
def test_processes_that_share_out_their_memory_are_counted_together(namespaces):
    greedy = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        kept = b'1' * (60 << 20)
        time.sleep(9)
time.sleep(9)
"""
    assert python(greedy, namespaces=namespaces, timeout_s=5, cpu_s=2).killed == "memory"


@both
def test_output_without_end_keeps_its_end_and_no_more(namespaces):
    outcome = python("n = 0\nwhile True: print(n); n += 1", namespaces=namespaces, output_kib=4, timeout_s=0.5)
    assert outcome.killed == "time"
    assert 2 * KIB < len(outcome.stdout) <= 4 * KIB
    assert int(outcome.stdout.split()[-2]) > 2000


@both
def test_a_huge_file_is_refused(namespaces):
    source = "with open('big', 'wb') as f:\n    while True: f.write(bytes(1 << 20))"
    outcome = python(source, namespaces=namespaces, file_mib=2)
    assert outcome.signal == 25 or "File too large" in outcome.stderr


@both
def test_memory_that_no_process_would_answer_for_is_refused(namespaces):
    source = """
import ctypes, os
libc = ctypes.CDLL(None)
print(libc.shmget(0, 1 << 20, 0o1600), libc.syscall(425, 8, None))
try: os.memfd_create("hidden"); print("made")
except PermissionError: print("refused")
"""
    outcome = python(source, namespaces=namespaces)
    if "system calls" not in outcome.isolation.limits:
        pytest.skip("no system call filter here")
    assert outcome.stdout == "-1 -1\nrefused\n"


def test_many_files_fill_only_the_programs_own_folder(private):
    source = "import itertools\nfor n in itertools.count(): open(str(n), 'wb').write(bytes(1 << 20))"
    assert "No space left on device" in python(source, file_mib=2, folder_mib=8).stderr


@needs_linux
@both
def test_a_fork_bomb_ends_with_its_program(namespaces):
    # Stops by itself at 200 processes, and sleeps rather than spins, should every limit fail.
    bomb = """
import os, sys, time
started = 0
for generation in range(200):
    try:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        started += 1
    except OSError:
        print("refused at", started, flush=True)
        os._exit(0)
time.sleep(20)
"""
    word = mark()
    outcome = python(bomb, namespaces=namespaces, mark=word)
    if "processes" in outcome.isolation.limits:
        assert "refused at" in outcome.stdout
        assert int(outcome.stdout.split()[-1]) <= 16
    else:
        assert outcome.killed == "processes"
    assert survivors(word) == []


@needs_linux
@both
def test_a_daemon_does_not_survive(namespaces):
    daemon = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for n in (0, 1, 2): os.close(n)
        time.sleep(30)
    os._exit(0)
os.wait()
print("left behind")
"""
    word = mark()
    outcome = python(daemon, namespaces=namespaces, mark=word)
    assert outcome.stdout == "left behind\n"
    assert outcome.seconds < 8
    assert survivors(word) == []


@needs_linux
def test_a_program_dies_with_the_evaluation(tmp_path):
    word = mark()
    script = tmp_path / "evaluation.py"  # a file, so that the word is on the program's command line alone
    script.write_text(f"""
import os, sys, threading
from tests.evaluation.code.programs import python
sleeper = lambda: python("import time; time.sleep(60)", mark={word!r}, timeout_s=60)
threading.Thread(target=sleeper, daemon=True).start()
sys.stdin.read(1)
os.kill(os.getpid(), 9)
""")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, env=environment, cwd=tmp_path) as evaluation:
        started = wait_for(lambda: survivors(word) != [], seconds=20)
        evaluation.communicate(b"\n")
    assert started
    assert wait_for(lambda: survivors(word) == [], seconds=5)


def test_nothing_is_written_outside_the_programs_folder(private):
    places = [
        "/escaped",
        "/usr/escaped",
        "/etc/escaped",
        f"{sys.prefix}/escaped",
        "/proc/sys/kernel/hostname",
        "/dev/shm/escaped",
    ]
    source = f"""
for place in {places}:
    try:
        open(place, 'w').write('x'); print('wrote', place)
    except OSError: pass
open('mine', 'w').write('x'); print('done')
"""
    assert python(source).stdout == "done\n"


@both
def test_the_folder_is_gone_afterwards(namespaces, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hidden = "import os; os.makedirs('a/b'); open('a/b/c', 'w').close(); os.chmod('a', 0); print('made')"
    assert python(hidden, namespaces=namespaces).stdout == "made\n"
    assert list(tmp_path.iterdir()) == []


@both
def test_the_environment_has_no_secret(namespaces, monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "swordfish")
    outcome = python("import os; print(dict(os.environ))", namespaces=namespaces)
    assert "PATH" in outcome.stdout
    assert "swordfish" not in outcome.stdout


def test_neither_files_nor_processes_of_the_machine_can_be_seen(private, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("swordfish")
    source = f"""
import os, pathlib
print(os.path.exists({str(secret)!r}), os.path.exists({str(Path(__file__))!r}), os.path.exists('/etc/passwd'))
print(len([n for n in os.listdir('/proc') if n.isdigit()]), os.path.exists('/proc/{os.getpid()}/environ'))
try: print(pathlib.Path('/proc/1/environ').read_bytes())
except PermissionError: print('refused')
"""
    assert python(source).stdout == "False False False\n2 False\nrefused\n"


def test_a_server_on_loopback_cannot_be_reached_where_there_is_a_network_namespace(private):
    reached = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def accept():
            try:
                server.accept()[0].close()
                reached.set()
            except OSError:
                pass

        listener = threading.Thread(target=accept)
        listener.start()
        source = (
            f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1); print('reached')"
        )
        inside = python(source)
        assert not reached.is_set()
        assert inside.stdout == ""
        assert inside.isolation.network == "namespace"
        outside = python(source, namespaces=False)
        if outside.isolation.network == "filter":
            assert "PermissionError" in outside.stderr
            socket.create_connection(server.getsockname(), 1).close()  # and the server does answer
        listener.join()
    assert reached.is_set()


def test_without_namespaces_the_result_does_not_claim_isolation():
    found = python("pass", namespaces=False).isolation
    assert not found.complete
    assert found.network in ("filter", "none")
    assert found.files == "none"
    assert "WITHOUT isolation" in found.sentence()
    assert found.why
    assert "folder size" not in found.limits


def test_neither_the_guard_nor_anything_else_can_be_killed_or_traced(private):
    source = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
for target in (1, os.getppid(), -1):
    try: os.kill(target, signal.SIGKILL); print('signalled', target)
    except (PermissionError, ProcessLookupError): pass
if libc.ptrace(16, 1, 0, 0) == 0: print('traced')
print('alive', flush=True)
"""
    assert python(source).stdout == "alive\n"


@needs_linux
def test_a_program_that_ends_its_guard_is_an_outcome_and_not_an_error():
    # Without namespaces a program of the same user can do this; its own end is then the clock's or its own.
    outcome = python("import os; os.kill(os.getppid(), 9)", namespaces=False)
    assert outcome.killed == "guard" or outcome.isolation.user == "unused id"
    assert not outcome.ok


def test_a_guard_that_cannot_set_up_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(runner.RunnerError, match="could not be set up"):
        runner.run(Job({}, (Step(("/bin/true",)),)))
    assert list(tmp_path.iterdir()) == []


def test_a_program_gains_no_privilege(private):
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
status = dict(line.split(':\\t') for line in open('/proc/self/status').read().splitlines() if ':\\t' in line)
print(int(status['CapEff'], 16), int(status['CapPrm'], 16), status['NoNewPrivs'], os.getuid() != 0)
print(libc.unshare(0x10000000), libc.mount(b'none', b'/', None, 32 | 4096, None), libc.setuid(0))
"""
    assert python(source).stdout == "0 0 1 True\n-1 -1 -1\n"


def test_a_program_that_cannot_be_started_says_so():
    outcome = runner.run(Job({}, (Step(("/usr/bin/no-such-program",), Limits(timeout_s=1)),)))
    assert outcome.exit_code == 127
    assert "no-such-program could not be started" in outcome.stderr


def test_the_next_command_runs_only_after_the_last_ones_success():
    first = Step((sys.executable, "-I", "-S", "-c", "open('made', 'w').write('x')"), Limits(timeout_s=2))
    second = Step(
        (sys.executable, "-I", "-S", "-c", "print(open('made').read()); raise SystemExit(5)"), Limits(timeout_s=2)
    )
    outcome = runner.run(Job({}, (first, second, first), runner.python_folders()))
    assert (outcome.step, outcome.exit_code, outcome.stdout) == (1, 5, "x\n")


def test_outcomes_come_in_the_jobs_order():
    jobs = []
    for n in range(4):
        source = f"import time; time.sleep({0.2 if n == 0 else 0}); print({n})"
        step = Step((sys.executable, "-I", "-S", "p.py"), Limits(timeout_s=5))
        jobs.append(Job({"p.py": source}, (step,), runner.python_folders()))
    assert [outcome.stdout for outcome in runner.run_all(jobs, workers=2)] == ["0\n", "1\n", "2\n", "3\n"]
