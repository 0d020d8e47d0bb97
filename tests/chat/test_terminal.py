"""The conversation from a pipe and at a keyboard, in processes of their own."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from sheepfold import cli
from sheepfold.chat.controls import Controls
from sheepfold.chat.session import chat_prompt

COMMAND = [sys.executable, "-m", "sheepfold.cli", "chat"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def piped(run, text: str) -> subprocess.CompletedProcess:
    command = [*COMMAND, str(run), "--terminal", "--device", "cpu"]
    return subprocess.run(command, input=text, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def test_a_pipe_gets_an_answer_a_question_and_stops_at_a_line_that_fails(run, answering):
    text = "/set new_tokens 8\nName three animals.\n\n/both\n/clear\nName three animals.\n/prompt\n/nope\nNever asked\n"
    done = piped(run, text)
    controls = Controls(new_tokens=8)
    prompt = chat_prompt(answering, (), "Name three animals.", controls)
    base, federated = (
        answering.answer([prompt], [name], controls.generation(), seed=0)[0].text for name in ("base", "federated")
    )
    expected = f"{federated}\nbase: {base}\nfederated: {federated}\n"
    assert done.stdout.startswith(expected), done.stdout
    assert done.stdout.count(prompt.text) == 2
    assert f"base, {len(prompt.ids)} tokens:" in done.stdout
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "sheepfold: /nope: no such command; known: adapter, both, clear, help, prompt, quit, set"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--host", "127.0.0.1"], ["--port", "7860"], ["--token-file", "t"], ["--open"]])
def test_an_option_of_the_page_is_refused_in_the_terminal(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["sheepfold", "chat", "builtin:tiny", "--terminal", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    said = f"{words[0]} has no effect with --terminal"
    assert said in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


@pytest.mark.slow
def test_at_a_keyboard_ctrl_c_stops_the_answer_and_ctrl_d_leaves(run):
    master, slave = pty.openpty()
    command = [*COMMAND, str(run), "--terminal", "--device", "cpu"]
    environment = ENVIRONMENT | {"TERM": "dumb"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True, close_fds=True
    )
    os.close(slave)
    try:
        assert "/help says" in until(master, r"/help says.*> ")
        os.write(master, b"/nope\n")
        assert "no such command" in until(master, r"no such command.*> ")
        os.write(master, b"/set new_tokens 900\n/set temperature 1\n/adapter base\n")
        until(master, r"(> .*){3}")
        os.write(master, b"Tell me a long story about the goose and the town.\n")
        until(master, r"town\.\s+\S.*\S.*\S")
        os.kill(process.pid, signal.SIGINT)
        after = until(master, r"> $")
        assert "Traceback" not in after
        os.write(master, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def until(master: int, pattern: str, timeout_s: float = 60) -> str:
    """Return what the terminal shows up to a match. Fails where it does not come."""
    seen, end = "", time.monotonic() + timeout_s
    while time.monotonic() < end:
        if select.select([master], [], [], 0.2)[0]:
            seen += os.read(master, 4096).decode(errors="replace")
            if re.search(pattern, seen, re.DOTALL):
                return seen
    raise AssertionError(f"no {pattern!r} in {seen!r}")
