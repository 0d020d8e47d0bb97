"""What the proxy holds for one client; its fence is tested with real servers, in tests/network/test_fence.py."""

import contextlib

import pytest

from sheepfold.flower.fold import Fold
from sheepfold.flower.gate import Refusal
from sheepfold.flower.proxy import MOST_CALLS, Proxy
from sheepfold.flower.superlink import Superlink
from tests.flower.test_jobs import fold as fold  # a fixture


def test_a_client_with_many_calls_open_leaves_room_for_the_others(fold: Fold) -> None:
    proxy = Proxy(fold, Superlink(fold, 1))
    with contextlib.ExitStack() as calls:
        for _ in range(MOST_CALLS):
            calls.enter_context(proxy._one_more("mallory"))
        with pytest.raises(Refusal, match="mallory has 40 calls open"), proxy._one_more("mallory"):
            pass
        with proxy._one_more("ann"):
            pass
    with proxy._one_more("mallory"):
        pass
    assert not any(proxy.calls.values())


def test_what_a_power_cut_left_does_not_keep_the_door_shut(fold: Fold) -> None:
    fold.seen.mkdir()
    for path in (fold.seen / "ann.json", fold.traffic):
        path.write_text("")
    proxy = Proxy(fold, Superlink(fold, 1))
    assert (proxy.last, proxy.traffic) == ({"ann": 0.0}, {})
