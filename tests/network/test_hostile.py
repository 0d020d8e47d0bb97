"""A client that attacks: each message is rejected with its reason, and the others' rounds go on as without it."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sheepfold.assets import corpus
from tests.network import evil
from tests.network.federation import Federation, below
from tests.runs import experiment

pytestmark = pytest.mark.network

WHY = {
    "wrong shapes": "shape",
    "not finite": "finite",
    "huge norm": "norm",
    "wrong rank": "rank",
    "truncated": "bytes",
    "a header of 10 GB": "head",
    "another's name": "ann",
    "replayed": "round",
    "too long": "too many",
    "no message": "bytes",
}
"""Attack -> a word of the reason in the journal"""
HONEST = ("ann", "bob")
ROOM = 120 * 2**20
"""Bytes that the coordinator may grow by while it is attacked, with messages of up to 256 MB"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server with two honest clients and one that is not."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = list(corpus.rows(36, seed=4))
    with Federation(folder, [*HONEST, "eve"]) as made:
        made.server.start()
        for i, name in enumerate(made.names):
            made.node(name, rows[i::3])
        for name in HONEST:
            made.join(name)
        made.join("eve", [sys.executable, str(Path(evil.__file__))])
        made.there()
        yield made


def test_each_attack_is_rejected_with_its_reason_and_the_round_goes_on(federation: Federation) -> None:
    options = {
        "federation.rounds": len(evil.ATTACKS) + 1, "federation.norm_bound": 5.0, "evaluation.every": 0,
        "data.rows": None, "data.partition": {"by": "files"},
    }  # fmt: skip
    run = federation.run(experiment(federation.folder, **options).model_dump(mode="json"))
    run.reach(1)
    coordinator = next(below(federation.server.process, "serverapp"))
    before = coordinator.memory_info().rss
    most = before
    while run.process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            most = max(most, coordinator.memory_info().rss)
        time.sleep(0.2)
    lines = run.finish()
    assert lines[1]["absent"] == {}
    for line, attack in zip(lines[2:], evil.ATTACKS, strict=True):
        assert set(line["clients"]) == set(HONEST), attack
        assert line["absent"]["eve"].startswith("rejected: "), attack
        assert WHY[attack] in line["absent"]["eve"], (attack, line["absent"]["eve"])
    assert most - before < ROOM
