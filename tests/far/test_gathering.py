"""When a round closes, who counts then, and in which order: over lives that nobody thought of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.network.gathering import MOST_SENDS, Gathering, Silence
from sheepfold.network.rules import Rules, rules
from sheepfold.network.settings import NetworkSettings
from sheepfold.network.spool import Spool
from sheepfold.network.transport import Lost
from tests.far.scripted import EVER, Clock, Life, Scripted, Stuck


class Notes:
    """A round's letters: each client is sent its own name."""

    kind = "train"

    def __init__(self, no_updates: frozenset[str] = frozenset()) -> None:
        self.no_updates = no_updates

    def blob(self, client):
        return client.encode()

    def most_bytes(self, client):
        return 1000

    def counts(self, client, blob):
        return client not in self.no_updates


def gathered(folder, lives, settings, wanted=None, letters=None, **more):
    """Return the gathering, what it yielded, and its transport, when it is over or stuck (None)."""
    clock = Clock()
    transport = Scripted(clock, lives)
    closing = rules(settings, wanted or len(lives))
    gathering = Gathering(
        transport, letters or Notes(), list(lives), closing, Spool(folder), clock=clock, sleep=clock.sleep, **more
    )
    try:
        return gathering, list(gathering.answers()), transport
    except Stuck:
        return gathering, None, transport


def moments(most):
    return st.integers(0, 2 * most).map(lambda n: n / 2)


@st.composite
def lives(draw):
    found = {}
    for n in range(draw(st.integers(1, 5))):
        ends = sorted(draw(st.sets(moments(40), max_size=4)))
        gone = list(zip(ends[::2], ends[1::2], strict=False))
        gone += [(ends[-1], EVER)] if len(ends) % 2 else []
        found[f"ward-{n}"] = Life(
            takes=draw(moments(20)) + 0.25,
            gone=tuple(gone),
            told_lost=draw(st.booleans()),
            too_much=draw(st.booleans()),
        )
    return found


@st.composite
def choices(draw):
    quorum = draw(st.sampled_from([0.1, 0.34, 0.5, 0.7, 1.0]))
    deadline = draw(st.none() | moments(30).map(lambda s: s + 0.5)) if quorum < 1 else None
    return NetworkSettings(quorum=quorum, deadline=deadline)


def heard(transport, client):
    """Return when a client answered first."""
    return min(
        (
            at
            for ticket, at in transport.yielded.items()
            if transport.letters[ticket].client == client
            and transport.due(transport.letters[ticket]) < EVER
            and not _died(transport, ticket)
        ),
        default=EVER,
    )


def _died(transport, ticket):
    letter = transport.letters[ticket]
    life = transport.lives[letter.client]
    return life.session(letter.sent + letter.takes) != letter.session


@given(lives(), choices())
def test_a_round_closes_as_soon_as_its_rules_let_it_and_not_before(tmp_path_factory, lives, settings):
    folder = tmp_path_factory.mktemp("round") / "spool"
    gathering, answers, transport = gathered(folder, lives, settings)
    need = max(1, math.ceil(round(settings.quorum * len(lives), 6)))
    when = {client: heard(transport, client) for client in lives}

    def may_close(now, there):
        outstanding = [client for client in lives if when[client] > now]
        if not outstanding:
            return True
        if len(lives) - len(outstanding) < need:
            return False
        return not set(there) & set(outstanding) or (settings.deadline is not None and now >= settings.deadline)

    sent = [letter.client for letter in transport.letters.values()]
    if any(sent.count(client) == MOST_SENDS for client in lives):
        return  # it was given up, which has a test of its own
    *before, last = transport.looked if answers is not None else [*transport.looked, (EVER, {})]
    assert not any(may_close(*look) for look in before)
    if answers is None:
        return
    assert may_close(*last)
    assert [client for client, _ in answers] == list(lives)
    for client, answer in answers:
        counts = when[client] <= last[0] and not lives[client].too_much
        assert answer == (b"from " + client.encode() + b" to " + client.encode() if counts else answer)
        assert isinstance(answer, Silence) != counts
    wanted_no_more = {*transport.forgotten, *gathering.left, *(t for t in transport.yielded)}
    assert wanted_no_more == transport.letters.keys()
    assert not folder.exists()


@given(lives(), st.integers(1, 5), st.data())
def test_with_over_selection_the_first_updates_count_and_no_more(tmp_path_factory, lives, wanted, data):
    lives = {client: Life(life.takes) for client, life in lives.items()}
    wanted = min(wanted, len(lives))
    idle = frozenset(data.draw(st.sets(st.sampled_from(sorted(lives)))))
    folder = tmp_path_factory.mktemp("round") / "spool"
    _, answers, _ = gathered(folder, lives, NetworkSettings(over_selection=9), wanted, Notes(idle))
    assert [client for client, _ in answers] == list(lives)
    counted = [c for c, answer in answers if isinstance(answer, bytes) and c not in idle]
    updates = sorted((c for c in lives if c not in idle), key=lambda c: (lives[c].takes, c))
    assert len(counted) == min(wanted, len(updates))
    slowest = max((lives[c].takes for c in counted), default=0.0)
    assert all(lives[c].takes >= slowest for c in updates if c not in counted)
    if len(lives) == wanted:
        return
    missing = {answer.reason for c, answer in answers if isinstance(answer, Silence)}
    assert missing <= {f"left out: {wanted} others had answered"}


def test_an_answer_goes_on_as_soon_as_its_turn_has_come(tmp_path):
    clock = Clock()
    transport = Scripted(clock, {"a": Life(1.0), "b": Life(9.0), "c": Life(2.0)})
    gathering = Gathering(
        transport, Notes(), ["a", "b", "c"], Rules(3, 3), Spool(tmp_path / "spool"), clock=clock, sleep=clock.sleep
    )
    at = {client: clock.now for client, _ in gathering.answers()}
    assert at == pytest.approx({"a": 1.0, "b": 9.0, "c": 9.0}, abs=0.2)


def test_a_client_that_died_and_is_back_is_asked_again(tmp_path):
    back = {"a": Life(1.0), "b": Life(10.0, gone=((5.0, 8.0),))}
    _, answers, transport = gathered(tmp_path / "spool", back, NetworkSettings())
    assert answers == [("a", b"from a to a"), ("b", b"from b to b")]
    assert [(x.client, round(x.sent)) for x in transport.letters.values()] == [("a", 0), ("b", 0), ("b", 8)]


def test_a_client_that_comes_while_the_round_is_open_takes_part(tmp_path):
    _, answers, _ = gathered(tmp_path / "spool", {"a": Life(1.0, gone=((0.0, 30.0),))}, NetworkSettings())
    assert answers == [("a", b"from a to a")]


def test_the_reasons_say_who_did_not_answer_and_why(tmp_path):
    there = {
        "a": Life(1.0),
        "b": Life(50.0, gone=((12.25, EVER),)),
        "c": Life(900.0),
        "d": Life(gone=((0.0, EVER),)),
        "e": Life(2.0, too_much=True),
    }
    settings = NetworkSettings(quorum=0.3, deadline=60)
    gathering, answers, _ = gathered(tmp_path / "spool", there, settings)
    reasons = {client: answer.reason for client, answer in answers if isinstance(answer, Silence)}
    assert reasons == {
        "b": "left at 12.3 s",
        "c": "no answer within 60 s",
        "d": "not connected",
        "e": "rejected: too many bytes",
    }
    assert sorted(gathering.left.values()) == ["b", "c"]


def test_a_message_that_kills_its_machine_each_time_is_given_up(tmp_path):
    short = Life(2.0, gone=tuple((1.0 + 4 * n, 3.0 + 4 * n) for n in range(100)))
    _, answers, transport = gathered(tmp_path / "spool", {"a": short, "b": Life(1.0)}, NetworkSettings())
    assert answers[0] == ("a", Silence(f"its machine died {MOST_SENDS} times over this message"))
    assert len(transport.letters) == MOST_SENDS + 1


def test_what_comes_for_an_earlier_round_goes_where_it_was_said_to_go(tmp_path):
    clock = Clock()
    transport = Scripted(clock, {"a": Life(5.0), "b": Life(3.0)})
    old, came = transport.send("b", "train", b"old", 10), []
    gathering = Gathering(
        transport,
        Notes(),
        ["a"],
        Rules(1, 1),
        Spool(tmp_path / "spool"),
        others={old: came.append},
        clock=clock,
        sleep=clock.sleep,
    )
    assert list(gathering.answers()) == [("a", b"from a to a")]
    assert came == [b"from b to old"]


def test_a_round_that_its_caller_leaves_wants_nothing_more(tmp_path):
    clock = Clock()
    transport = Scripted(clock, {"a": Life(1.0), "b": Life(2.0)})
    gathering = Gathering(
        transport, Notes(), ["a", "b"], Rules(2, 2), Spool(tmp_path / "spool"), clock=clock, sleep=clock.sleep
    )
    answers = gathering.answers()
    assert next(answers)[0] == "a"
    answers.close()
    assert set(transport.forgotten) | transport.yielded.keys() == transport.letters.keys()


def test_one_blob_is_in_memory_at_a_time(tmp_path):
    """Clients that answer in the wrong order wait on disk: 60 answers of 1 MB take no 60 MB."""
    import tracemalloc

    many = {f"ward-{n:02d}": Life(60.0 - n) for n in range(60)}
    clock = Clock()
    transport = Scripted(clock, many, reply=lambda client, kind, blob: bytes(2**20))
    gathering = Gathering(
        transport, Notes(), list(many), Rules(60, 60), Spool(tmp_path / "spool"), clock=clock, sleep=clock.sleep
    )
    tracemalloc.start()
    size = sum(len(answer) for _, answer in gathering.answers())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 60 * 2**20
    assert peak < 8 * 2**20


@pytest.mark.parametrize(
    ("quorum", "wanted", "need"), [(1.0, 3, 3), (0.7, 10, 7), (0.5, 3, 2), (0.01, 3, 1), (2 / 3, 3, 2), (0.1, 30, 3)]
)
def test_a_quorum_is_a_share_of_those_wanted_rounded_up(quorum, wanted, need):
    assert rules(NetworkSettings(quorum=quorum), wanted).need == need


def test_a_lost_message_is_sent_again_though_the_session_looks_the_same(tmp_path):
    clock = Clock()
    transport = Scripted(clock, {"a": Life(1.0)})
    lost = iter([Lost("the executor died", again=True)])
    arrived = transport.arrived

    def losing(tickets):
        for ticket, found in arrived(tickets):
            yield ticket, next(lost, found)

    transport.arrived = losing
    gathering = Gathering(
        transport, Notes(), ["a"], Rules(1, 1), Spool(tmp_path / "spool"), clock=clock, sleep=clock.sleep
    )
    assert list(gathering.answers()) == [("a", b"from a to a")]
    assert len(transport.letters) == 2
