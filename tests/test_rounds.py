"""The loop: who is asked, what is counted, what stops it."""

import pytest

from sheepfold.config import FederationSettings, TrainSettings
from sheepfold.errors import ConfigError, TrainingError
from sheepfold.messages import Absence
from sheepfold.rounds import rounds
from sheepfold.sampler import sampler
from sheepfold.state import ServerState
from sheepfold.strategies.fedavg import fedavg
from tests import small


def a_run(engine, base, size: int, until: int = 3, state: ServerState | None = None):
    chosen = sampler(FederationSettings(clients_per_round=size), list(small.CLIENTS), seed=3)
    start = state or ServerState(0, small.adapter(base, 4, 0), engine.plan)
    return list(rounds(start, until, sampler=chosen, strategy=fedavg(), engine=engine, lr=lambda r: 1e-3))


def test_each_round_reports_what_its_cohort_did():
    base = small.model()
    engine = small.cohort_engine(base, TrainSettings(steps=3, batch_rows=4))
    states = a_run(engine, base, size=2)
    engine.close()
    for state, report in states:
        assert report.round == state.round
        assert list(report.clients) == report.cohort
        assert len(report.cohort) == 2
        for counted in (report.uplink_bytes, report.downlink_bytes):  # numbers, names and what else is in a head
            assert 0 < counted - 2 * state.adapter.nbytes() < 2 * 4096
        assert report.loss.count == sum(m.loss.count for m in report.clients.values())
    last = states[-1][0]
    assert last.round == 3
    sampled = [client for _, report in states for client in report.cohort]
    assert last.drawn == {client: 3 * sampled.count(client) for client in set(sampled)}


def test_a_run_taken_up_from_a_state_repeats_the_uninterrupted_one():
    base = small.model()
    engine = small.cohort_engine(base, TrainSettings(steps=3, batch_rows=4), dropout=0.1)
    whole = a_run(engine, base, size=3)
    resumed = a_run(engine, base, size=3, state=whole[0][0])
    engine.close()
    assert resumed[-1][0].adapter.hash() == whole[-1][0].adapter.hash()
    assert resumed[-1][0].drawn == whole[-1][0].drawn


class Halfhearted:
    """An engine whose clients stay away, some or all."""

    def __init__(self, engine, absent):
        self.engine, self.absent, self.plan = engine, absent, engine.plan

    def train(self, assignments):
        for answer in self.engine.train(assignments):
            yield Absence(answer.client, "gone", 3) if answer.client in self.absent else answer


def test_an_absent_client_takes_no_part_in_the_fold_and_is_named():
    base = small.model()
    engine = small.cohort_engine(base, TrainSettings(steps=3, batch_rows=4))
    [(state, report)] = a_run(Halfhearted(engine, {"bob"}), base, size=4, until=1)
    assert report.absences == {"bob": "gone"}
    assert state.drawn["bob"] == 3
    start = small.adapter(base, 4, 0)
    work = small.assignments({c: start for c in small.CLIENTS if c != "bob"})
    others = fedavg().fold(ServerState(0, start, engine.plan), engine.train(work))
    engine.close()
    assert small.gap(state.adapter, others.adapter) < 1e-12


def test_a_round_without_a_single_update_stops_with_the_reasons():
    base = small.model()
    engine = small.cohort_engine(base, TrainSettings(steps=1, batch_rows=4))
    with pytest.raises(TrainingError, match=r"round 1: no client took a good step .*gone"):
        a_run(Halfhearted(engine, set(small.CLIENTS)), base, size=4)
    engine.close()


def test_a_cohort_of_one_that_stays_away_leaves_the_adapter_and_the_run_goes_on():
    base = small.model()
    engine = small.cohort_engine(base, TrainSettings(steps=1, batch_rows=4))
    states = a_run(Halfhearted(engine, set(small.CLIENTS)), base, size=1, until=3)
    engine.close()
    assert [state.round for state, _ in states] == [1, 2, 3]
    assert len({state.adapter.hash() for state, _ in states}) == 1
    assert all(report.absences and not report.clients for _, report in states)


def test_a_cohort_is_drawn_without_replacement_by_seed_and_round():
    names = [f"c{i}" for i in range(50)]
    draw = lambda seed, round: sampler(FederationSettings(fraction=0.2), names, seed).sample(round)  # noqa: E731
    assert draw(0, 3) == draw(0, 3)
    assert len(set(draw(0, 3))) == 10
    assert draw(0, 3) == sorted(draw(0, 3), key=names.index)
    assert draw(0, 3) not in (draw(1, 3), draw(0, 4))


def test_shepherds_tenth_of_ten_is_one_client():
    names = [f"c{i}" for i in range(10)]
    assert sampler(FederationSettings(fraction=0.1), names, 0).size == 1
    assert sampler(FederationSettings(fraction=0.05), names, 0).size == 1
    assert sampler(FederationSettings(), names, 0).size == 10
    with pytest.raises(ConfigError, match="the data has 10 clients"):
        sampler(FederationSettings(clients_per_round=11), names, 0)
