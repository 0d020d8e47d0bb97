"""The page while a run goes on, from a real server."""

import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import uvicorn

from sheepfold.report import live
from tests.report.conftest import journal


@contextmanager
def served(*places):
    """Serve the runs at a free port; yield the address."""
    server = uvicorn.Server(
        uvicorn.Config(live.app(live.Watch(places), "127.0.0.1"), log_level="error", timeout_graceful_shutdown=1)
    )
    listening = live._listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def get(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
        return answer.read().decode()


def append(folder, line):
    with open(folder / "rounds.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def test_a_new_line_is_a_new_version_and_a_new_page(ran, copied):
    folder = copied(keep=2, federation__rounds=2)
    last = journal(ran)[2]
    with served(folder) as address:
        before = json.loads(get(address + "version"))
        assert before["status"][0].startswith("Round 1 of 2, running")
        assert json.loads(get(address + "version"))["version"] == before["version"]
        assert f'data-version="{before["version"]}"' in get(address)
        append(folder, last)
        after = json.loads(get(address + "version"))
        assert after["version"] != before["version"]
        assert f"{last['held_out']['loss']['weighted']:.3f}" in get(address + "content")


def test_a_run_without_a_line_and_a_half_written_one_are_served(copied):
    folder = copied(keep=0, federation__rounds=9)
    with served(folder) as address:
        assert "the journal has no line" in json.loads(get(address + "version"))["status"][0]
        (folder / "rounds.jsonl").write_text('{"round": 0, "hel')
        assert "Nothing is known yet" in get(address + "content")


def test_a_folder_caught_half_way_is_said_and_nothing_breaks(copied):
    folder = copied(federation__rounds=9)
    with served(folder) as address:
        time.sleep(0.01)
        (folder / "rounds.jsonl").write_text("{]\n")
        assert json.loads(get(address + "version"))["status"][0].startswith("Not readable just now")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(address + "content")


def test_another_sites_name_does_not_reach_the_page(copied):
    with served(copied()) as address, pytest.raises(urllib.error.HTTPError, match="400"):
        get(address, Host="evil.example")
