"""The same run with a wire and without: values that never become bytes, and bytes, come to the same bits."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest

from sheepfold.config import FederationSettings, PersonalSettings, TrainSettings, build
from sheepfold.errors import ConfigError
from sheepfold.local.store import ClientStore
from sheepfold.messages import Absence, Assignment, Update
from sheepfold.personal import keeping_local
from sheepfold.rounds import rounds
from sheepfold.sampler import sampler
from sheepfold.state import ServerState, Setting
from sheepfold.strategies import strategy
from sheepfold.transforms.wire_dtype import KEPT
from sheepfold.wire.desk import Desk
from sheepfold.wire.ends import over_the_wire, reply, terms
from sheepfold.wire.link import Link
from sheepfold.wire.packing import Letter, pack, pack_absence
from sheepfold.wire.unpacking import unpack_assignment
from tests import small

TRAIN = TrainSettings(steps=2, batch_rows=3)
TOKENS = small.tokens(longest=16)
NARROW = {"up": "int8", "down": "int8"}
RANKS = {"ann": 2, "bob": 4, "cleo": 4, "dora": 3}
MIXED = ("flora", "flexlora", "hetlora", "heterolora")


class Far:
    """An engine behind a real wire: all that goes out and comes back is bytes; clients know the experiment alone."""

    def __init__(self, engine, terms, made, first: ServerState) -> None:
        self.engine, self.terms, self.made, self.first = engine, terms, made, first
        self.sent = 0

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        desk = Desk(assignments, self.terms)
        received = []
        for client in (a.client for a in assignments):
            mine = self.made.assign(self.first, client, 0.0).adapter
            received.append(unpack_assignment(desk.blob(client), mine))
        for a in received:
            [answer] = self.engine.train([a])
            said = reply(answer, a, self.terms, self.engine.store)
            data = pack(said) if isinstance(said, Letter) else pack_absence(said, a.round)
            assert len(data) <= desk.most_bytes(a.client)
            self.sent += len(data)
            yield desk.take(a.client, data)


class Spoils:
    """An engine of which one client's update of one round cannot be counted; or that client does not train in it."""

    def __init__(self, engine, client: str, round: int, trains: bool) -> None:
        self.engine, self.store, self.client, self.round, self.trains = engine, engine.store, client, round, trains

    def train(self, assignments: Sequence[Assignment]) -> Iterator[Update | Absence]:
        for a in assignments:
            if (a.client, a.round) != (self.client, self.round):
                yield from self.engine.train([a])
            elif not self.trains:
                yield Absence(a.client, "away")
            else:
                [answer] = self.engine.train([a])
                yield replace(answer, measurements=replace(answer.measurements, rows=0))


def as_it_is(engine):
    return engine


def a_run(kind, names, federation, *, far=False, until=3, store=None, state=None, keep=(), around=as_it_is):
    """Return the last state, its reports and the engine."""
    base = small.model()
    experiment = build({
        "federation": {"strategy": names, "rounds": 3, **federation},
        "personal": PersonalSettings(keep_local=keep).model_dump(),
        "train": {"engine": kind},
    })  # fmt: skip
    made = strategy(experiment.federation)
    made = over_the_wire(keeping_local(made, experiment), experiment)
    agreed = terms(experiment, made)
    mixed = names[-1] in MIXED
    engine = (small.cohort_engine if kind == "cohort" else small.peft_engine)(
        base, TRAIN, tokens=TOKENS, rule=made.local, private=made.private, store=store or ClientStore(),
        **({"beyond_peft": made.beyond_peft} if kind == "peft_model" else {}),
    )  # fmt: skip
    weight = lambda path: getattr(m := base.get_submodule(path), "layer", m).weight.float()  # noqa: E731
    adapter = small.adapter(base, 4, 0)
    ranks = {c: dict.fromkeys(adapter.pairs, r) for c, r in RANKS.items()} if mixed else {}
    setting = Setting(1, list(small.CLIENTS), ranks, dict.fromkeys(adapter.pairs, 4), 16.0, weight)
    first = made.begin(ServerState(0, adapter, engine.plan, setting=setting))
    chosen = sampler(FederationSettings(clients_per_round=3), list(small.CLIENTS), seed=3)
    wired = Far(engine, agreed, made, first) if far else Link(around(engine), agreed)
    lr = lambda r: 1e-3  # noqa: E731
    told = list(rounds(state or first, until, sampler=chosen, strategy=made, engine=wired, lr=lr))
    engine.close()
    return told[-1][0], [report for _, report in told], engine


METHODS = [
    ("fedavg",), ("flora",), ("fedex",), ("flexlora",), ("hetlora",), ("ffa_lora",), ("rolora",), ("fedsa",),
    ("fed_sb",), ("scaffold", "fedavg"), ("fedadam", "fedavg"), ("slora", "fedavg"),
]  # fmt: skip
QUICK = [("flora",), ("hetlora",), ("fedsa",), ("scaffold", "fedavg"), ("slora", "fedavg")]
NAMED = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow, id="+".join(n)) for n in METHODS]
ARGUMENTS = {"slora": {"stage_rounds": 1, "density": 0.5}}


def over(names, wire, **further):
    return {"wire": wire, "strategy_args": ARGUMENTS.get(names[0], {}), **further}


@pytest.mark.parametrize("wire", [{}, NARROW], ids=["exact", "narrow"])
@pytest.mark.parametrize("names", NAMED)
def test_bytes_come_to_what_values_come_to(names, wire):
    """One client at a time in both: floating-point sums depend on who shares a pass."""
    ours, reports, _ = a_run("peft_model", names, over(names, wire))
    theirs, there, _ = a_run("peft_model", names, over(names, wire), far=True)
    assert theirs.hash() == ours.hash()
    assert [r.uplink_bytes for r in there] == [r.uplink_bytes for r in reports]
    assert [r.downlink_bytes for r in there] == [r.downlink_bytes for r in reports]
    assert not any(r.absences for r in reports)


def test_what_stays_at_home_stays_there_over_bytes_too():
    keep = ("v_proj",)
    ours, _, _ = a_run("peft_model", ("fedavg",), over(("fedavg",), NARROW), keep=keep)
    theirs, _, _ = a_run("peft_model", ("fedavg",), over(("fedavg",), NARROW), far=True, keep=keep)
    assert theirs.hash() == ours.hash()


@pytest.mark.parametrize("names", [("fedavg",), ("scaffold", "fedavg")], ids="+".join)
def test_the_cohort_engine_answers_over_a_wire_and_resumes_to_the_same_bits(names, tmp_path):
    federation = over(names, NARROW)
    whole, reports, _ = a_run("cohort", names, federation, store=ClientStore(tmp_path / "a"))
    half, _, engine = a_run("cohort", names, federation, store=ClientStore(tmp_path / "b"), until=2)
    kept = engine.store.get("bob", 2)
    assert any(name.startswith(KEPT) for name in kept), "what int8 lost is the client's own"
    resumed, _, _ = a_run("cohort", names, federation, store=ClientStore(tmp_path / "b"), state=half)
    assert resumed.hash() == whole.hash()
    exact, plain, _ = a_run("cohort", names, over(names, {}))
    assert exact.hash() != whole.hash()
    assert small.gap(exact.adapter, whole.adapter) < 0.02
    assert reports[0].uplink_bytes < plain[0].uplink_bytes


def test_methods_whose_factors_change_coordinates_keep_no_errors():
    _, _, engine = a_run("cohort", ("flora",), over(("flora",), NARROW))
    assert not any(engine.store.get(c, 3) for c in small.CLIENTS)


def test_a_bound_holds_over_a_whole_round():
    loose, _, _ = a_run("cohort", ("fedavg",), over(("fedavg",), {}), until=1)
    tight, _, _ = a_run("cohort", ("fedavg",), over(("fedavg",), {}, norm_bound=1e-3), until=1)
    start = small.adapter(small.model(), 4, 0).tensors()
    moved = [
        sum(float((t - start[n]).square().sum()) for n, t in s.adapter.tensors().items()) ** 0.5 for s in (loose, tight)
    ]
    assert moved[1] <= 1e-3 * (1 + 1e-6) < moved[0]


def test_scaffold_and_a_bound_do_not_go_together():
    experiment = build({"federation": {"strategy": ["scaffold", "fedavg"], "norm_bound": 1.0}})
    with pytest.raises(ConfigError, match=r"norm_bound with federation.strategy scaffold: .*set it to null"):
        terms(experiment, strategy(experiment.federation))


@pytest.mark.parametrize("names", [("scaffold", "fedavg"), ("fedavg",), ("fedsa",)], ids="+".join)
def test_a_rejected_update_leaves_the_client_as_if_it_had_not_trained(names):
    """What it kept of that round, its variate or what int8 lost, and the rows it drew: none of it is gone on from."""
    found = []
    for trains in (True, False):
        spoil = partial(Spoils, client="ann", round=1, trains=trains)
        state, reports, _ = a_run("peft_model", names, over(names, NARROW), around=spoil, until=4)
        assert reports[1].absences == {"ann": "rejected: an update after 2 steps on 0 rows" if trains else "away"}
        assert any("ann" in report.cohort for report in reports[2:])
        found.append((state.hash(), state.drawn, state.counted))
    assert found[0] == found[1]
