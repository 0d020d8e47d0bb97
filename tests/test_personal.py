"""Adapters of clients' own: modules that stay at home, Ditto, fine-tuning at the end; and who goes home with what."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sheepfold import joining, marks, simulation
from sheepfold import state as states
from sheepfold.adapter import Adapter, combined, kind
from sheepfold.assembly import Parts, assemble
from sheepfold.config import Experiment, TrainSettings
from sheepfold.engines.common import DITTO, OWN
from sheepfold.errors import CheckpointError, ConfigError
from sheepfold.export import export
from sheepfold.journal import RunFolder
from sheepfold.local.rules import LocalRule
from sheepfold.local.store import ClientStore, folder_name
from sheepfold.messages import Absence, Assignment, Update
from sheepfold.peft_io import read_peft
from tests import small
from tests.test_stateful import (
    MIXED,
    as_a_side_travels,
    by_plain_peft,
    in_rounds,
    journal,
    kept,
    method,
    payload,
    tiny,
)

KEEP = "v_proj"
"""The modules that stay at home in these tests."""
LAMBDA = 4.0


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with small.quick():
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    small.saved(folder / "base")
    return folder


def ready(outcome: simulation.Outcome, made: Experiment) -> tuple[Parts, states.ServerState]:
    """Return a finished run's parts, with its clients' store, and its last state."""
    parts = assemble(made)
    folder = RunFolder(outcome.folder)
    parts.engine.store = ClientStore(folder.clients)
    return parts, states.load(folder.latest, parts.setting)


def own_loss(made: Experiment, outcome: simulation.Outcome, client: str) -> float:
    """Return a client's held-out loss with its own exported folder, by plain PEFT on the plain base."""
    return by_plain_peft(made, outcome.folder / "personal" / folder_name(client))[client]


# what stays at home


@pytest.mark.parametrize("make", [small.cohort_engine, small.peft_engine])
def test_what_stays_at_home_is_in_no_update_and_each_client_goes_on_with_its_own(make):
    base, store = small.model(), ClientStore()
    train = TrainSettings(steps=2, batch_rows=4, lr=1e-2)
    private = lambda name: KEEP in name  # noqa: E731
    engine = make(base, train, private=private, store=store)
    shared = small.adapter(base, 4, 0)
    first = {u.client: u for u in engine.train(small.assignments(dict.fromkeys(small.CLIENTS, shared), lr=1e-2))}
    mine = {c: {n.removeprefix(OWN): t for n, t in store.get(c, 1).items()} for c in small.CLIENTS}
    engine.close()
    handed = shared.tensors()
    for client, update in first.items():
        assert mine[client].keys() == update.unsent == {n for n in handed if private(n)}
        for name, tensor in update.adapter.tensors().items():
            assert torch.equal(tensor, handed[name]) == private(name), "the server must not see what stays"
        assert all(not torch.equal(t, handed[n]) for n, t in mine[client].items())
    for name in mine["ann"]:
        assert len({t[name].numpy().tobytes() for t in mine.values()}) == len(small.CLIENTS)

    moved = small.adapter(base, 4, 1) if make is small.cohort_engine else first["ann"].adapter
    base = small.model()
    whole = {c: moved.holding(mine[c]) for c in small.CLIENTS}
    engine = make(base, train, private=private, store=store)
    second = {u.client: u for u in engine.train(small.assignments(dict.fromkeys(small.CLIENTS, moved), 1, 1e-2))}
    engine.close()
    reference = make(small.model(), train)
    expected = {u.client: u.adapter.tensors() for u in reference.train(small.assignments(whole, 1, 1e-2))}
    for client, update in second.items():
        kept_now = store.get(client, 2)
        for name, tensor in expected[client].items():
            found = kept_now[OWN + name] if private(name) else update.adapter.tensors()[name]
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-12)
        assert store.get(client, 1).keys() == kept_now.keys()


PATTERNS = [
    (("v_proj",), lambda path: path.endswith("v_proj")),
    (("layers.1",), lambda path: ".layers.1." in path),
    (("*.q_proj", "layers.0.self_attn.v_proj"), lambda path: path.endswith("q_proj") or "layers.0" in path),
    (("self_attn",), lambda path: True),
]


@pytest.mark.parametrize(("patterns", "stays"), PATTERNS, ids=lambda x: "+".join(x) if isinstance(x, tuple) else "")
def test_patterns_name_modules_or_what_holds_them(patterns, stays, tmp_path, shared):
    made = tiny(tmp_path, shared, **{"personal.keep_local": list(patterns), "federation.clients_per_round": 4})
    outcome = simulation.run(made)
    parts, state = ready(outcome, made)
    fresh = parts.start().adapter.tensors()
    numbers = sum(t.numel() for n, t in fresh.items() if not stays(n.rpartition("/")[0]))
    for line in journal(outcome)[1:]:
        assert 0 < line["uplink_bytes"] - 4 * 4 * numbers < 4 * 4096, "numbers and heads"
    for name, tensor in state.adapter.tensors().items():
        assert torch.equal(tensor, fresh[name]) == stays(name.rpartition("/")[0]), name
    own = {client: parts.engine.store.get(client, state.round) for client in parts.data.clients}
    for tensors in own.values():
        assert tensors.keys() == {OWN + n for n in fresh if stays(n.rpartition("/")[0])}
    assert len({Adapter(extra=tensors).hash() for tensors in own.values()}) == 4, "each client has its own"
    parts.engine.close()


def test_a_pattern_that_keeps_nothing_is_one_line_that_shows_a_name(tmp_path, shared):
    for pattern in ("mlp", "layers.2", "v_pro", "q_proj/B", "*"):
        made = tiny(tmp_path, shared, **{"personal.keep_local": ["q_proj", pattern]})
        if pattern == "*":
            simulation.run(made)
            continue
        with pytest.raises(ConfigError, match=r"personal.keep_local .*matches no adapted module.*self_attn") as raised:
            simulation.run(made)
        assert "\n" not in str(raised.value)
        assert repr(pattern) in str(raised.value)


@pytest.mark.parametrize(
    "over",
    [
        method("fedsa"),
        method("fedadam", "fedsa", server_lr=0.01),
        {"personal.keep_local": [KEEP]},
        method("flora", over=MIXED) | {"personal.keep_local": [KEEP]},
        method("flexlora", over=MIXED) | {"personal.keep_local": [KEEP]},
        method("fedex") | {"personal.keep_local": [KEEP]},
        method("fedsa") | {"train.engine": "peft_model"},
        method("fedex") | {"personal.keep_local": [KEEP], "train.engine": "peft_model"},
    ],
    ids=["fedsa", "fedadam x fedsa", "keep_local", "flora", "flexlora", "fedex", "fedsa, peft", "fedex, peft"],
)
def test_everybody_is_evaluated_with_what_it_has_of_its_own(over, tmp_path, shared):
    """Held-out losses of the last round, the closing table's, and those of the exported folders are one number."""
    made = tiny(tmp_path, shared, **over)
    outcome = simulation.run(made)
    parts, state = ready(outcome, made)
    last, everybody = journal(outcome)[-1]["held_out"]["clients"], by_plain_peft(made, outcome.folder / "adapter")
    mine = {client for client in parts.data.clients if parts.engine.store.get(client, state.round)}
    assert mine == state.drawn.keys()
    for client in parts.data.clients:
        personal = outcome.closing.scores["loss"][client]["personal"]
        assert personal == pytest.approx(last[client], abs=1e-6)
        if client in mine:
            assert own_loss(made, outcome, client) == pytest.approx(last[client], abs=1e-4)
            assert abs(everybody[client] - last[client]) > 1e-4, "its own must differ from everybody's"
        else:
            assert not (outcome.folder / "personal" / folder_name(client)).exists()
            assert everybody[client] == pytest.approx(last[client], abs=1e-4)
    parts.engine.close()


def test_fedsa_resumes_with_each_clients_own_B(tmp_path, shared):
    over = method("fedsa") | {"federation.clients_per_round": 2, "federation.rounds": 5}
    whole = simulation.run(tiny(tmp_path, shared, name="whole", **over))
    lines, files = journal(whole), kept(whole)
    resumed = simulation.run(tiny(tmp_path, shared, name="whole", **over), resume_from=3)
    assert (journal(resumed), kept(resumed)) == (lines, files)
    assert resumed.closing.scores == whole.closing.scores
    for name in files:  # B alone, and only of those who took part
        if name.startswith("clients/"):
            tensors = ClientStore(whole.folder / "clients").get(Path(name).parent.name, int(Path(name).stem))
            assert {kind(n) for n in tensors} == {"B"}


def test_a_run_that_goes_back_forgets_what_clients_kept_since(tmp_path, shared):
    over = method("fedsa") | {"federation.clients_per_round": 1, "federation.rounds": 2}
    fresh = simulation.run(tiny(tmp_path, shared, name="fresh", **over))
    longer = simulation.run(tiny(tmp_path, shared, **over | {"federation.rounds": 4}))
    assert longer.state.drawn.keys() > fresh.state.drawn.keys()
    back = simulation.run(tiny(tmp_path, shared, **over), resume_from=1)
    assert back.closing.scores == fresh.closing.scores
    theirs = {name: content for name, content in kept(fresh).items() if name.startswith("clients/")}
    assert {name: content for name, content in kept(back).items() if name.startswith("clients/")} == theirs


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (method("hetlora") | {"personal.keep_local": [KEEP]}, "it prunes ranks"),
        (method("hetlora") | {"personal.ditto": 1.0}, "it prunes ranks"),
        (method("fedsa") | {"personal.ditto": 1.0}, "two adapters of its own"),
        ({"personal.keep_local": [KEEP], "personal.ditto": 1.0}, "two adapters of its own"),
        ({"personal.finetune_steps": 1, "personal.ditto": 1.0}, "keep one of them"),
        (method("slora", stage_rounds=1) | {"personal.keep_local": [KEEP]}, "cannot stay behind"),
    ],
)
def test_what_could_not_be_kept_or_would_not_count_is_refused(own, why, tmp_path, shared):
    with pytest.raises(ConfigError, match=why) as raised:
        simulation.run(tiny(tmp_path, shared, **own))
    assert "\n" not in str(raised.value)


KEEPING = {
    "fedavg": {},
    "fedex": method("fedex"),
    "rolora": method("rolora"),
    "fedadam": method("fedadam", server_lr=0.01),
    "flexlora": method("flexlora", over=MIXED),
    "heterolora": method("heterolora", over=MIXED),
    "heterolora, raw": method("heterolora", handle_alpha=False, over=MIXED),
    "hetlora, not pruning": method("hetlora", gamma=None, over=MIXED),
    "flora": method("flora", over=MIXED),
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_stays_at_home_never_travels_and_is_handed_out_as_it_began(name, tmp_path, shared):
    """The server hears nothing of it, so what it hands out of it, and hangs beside the base, never changes."""
    parts = assemble(tiny(tmp_path, shared, **KEEPING[name], **{"personal.keep_local": [KEEP]}))
    first = parts.start()
    *early, _late = parts.data.clients
    for state, assignments, updates in in_rounds(parts, 3, early):
        for a, u in zip(assignments, updates, strict=True):
            rest = {n: t for n, t in a.adapter.tensors().items() if KEEP not in n}
            assert a.nbytes == payload(rest | as_a_side_travels(a.side))
            assert not any(KEEP in path for path in a.side.pairs)
            assert u.nbytes == payload({n: t for n, t in rest.items() if kind(n) not in a.frozen})
        for client in parts.data.clients:
            before, now = (parts.strategy.assign(s, client, 1e-3).adapter.tensors() for s in (first, state))
            for tensor in (n for n in before if KEEP in n):
                torch.testing.assert_close(now[tensor], before[tensor], rtol=0, atol=1e-6, msg=tensor)
    assert state.round == 2
    parts.engine.close()


# Ditto


@pytest.mark.parametrize("make", [small.cohort_engine, small.peft_engine])
def test_ditto_is_a_second_training_near_the_global_adapter(make):
    """v_k descends F_k(v) + lambda/2 ||v - w||^2 from where it was; arXiv:2012.04221, Algorithm 1."""
    train = TrainSettings(epochs=1, batch_rows=4, lr=1e-2, weight_decay=0.1)
    store, base = ClientStore(), small.model()
    engine = make(base, train, ditto=LAMBDA, store=store)
    plain = make(small.model(), train)
    own: dict[str, Adapter] = {}
    for round, seed in enumerate((0, 1, 2)):
        w = small.adapter(small.model(), 4, seed)
        work = small.assignments(dict.fromkeys(small.CLIENTS, w), round, 1e-2)
        updates = {u.client: u for u in engine.train(work)}
        for update in plain.train(work):
            assert update.adapter.hash() == updates[update.client].adapter.hash(), "the global part is left alone"
            assert updates[update.client].unsent == frozenset()
        for client in small.CLIENTS:
            mine = store.get(client, round + 1)
            assert mine.keys() == {DITTO + n for n in w.tensors()}
            found = w.holding({n.removeprefix(DITTO): t for n, t in mine.items()})
            assert small.gap(found, near(w, own.get(client, w), client, round, train)) < 1e-10
            own[client] = found
    engine.close()
    plain.close()


def near(w: Adapter, start: Adapter, client: str, round: int, train: TrainSettings) -> Adapter:
    """Return an adapter trained from `start` near `w`, by an engine that knows a penalty and nothing of Ditto."""
    centre = w.tensors()

    def distance(factors: Any) -> torch.Tensor:
        return sum(LAMBDA / 2 * (t - centre[n]).square().flatten(1).sum(1) for n, t in factors.now.items())

    engine = small.cohort_engine(small.model(), train, rule=LocalRule(penalty=distance))
    [update] = engine.train([Assignment(client, round, start, 1e-2)])
    engine.close()
    return update.adapter


@pytest.mark.parametrize(
    "over",
    [{}, method("scaffold"), method("fedadam", "fedex", server_lr=0.01)],
    ids=["fedavg", "scaffold", "fedadam x fedex"],
)
def test_ditto_leaves_the_global_adapter_as_it_would_be_without_it(over, tmp_path, shared):
    plain = simulation.run(tiny(tmp_path, shared, **over))
    made = tiny(tmp_path, shared, name="ditto", **over, **{"personal.ditto": 1.0})
    outcome = simulation.run(made)
    assert outcome.state.hash() == plain.state.hash()
    for ours, theirs in zip(journal(outcome), journal(plain), strict=True):
        assert ours == theirs
    last = journal(plain)[-1]["held_out"]["clients"]
    for client, scores in outcome.closing.scores["loss"].items():
        if client != "shared" and client in outcome.state.drawn:
            assert scores["personal"] != pytest.approx(last[client], abs=1e-4)
            assert own_loss(made, outcome, client) == pytest.approx(scores["personal"], abs=1e-4)
    assert "personal:client-0" not in outcome.closing.scores["loss"]["shared"]


def test_a_large_lambda_holds_own_adapters_at_the_global_one_and_a_small_one_lets_them_go(tmp_path, shared):
    distances = []
    for value in (1e-6, 1e3):
        made = tiny(
            tmp_path,
            shared,
            **{"personal.ditto": value, "federation.rounds": 1, "train.optimizer": "sgd", "train.lr": 1e-3},
        )
        outcome = simulation.run(made)
        parts, state = ready(outcome, made)
        w = parts.start().adapter.tensors()
        distances.append(
            max(
                float((t - w[n.removeprefix(DITTO)]).norm())
                for client in state.drawn
                for n, t in parts.engine.store.get(client, 1).items()
            )
        )
        parts.engine.close()
    assert distances[1] < distances[0]


# fine-tuning after the last round


@pytest.mark.parametrize(
    "over",
    [{}, method("flora", over=MIXED), method("fedsa"), method("fed_sb")],
    ids=["fedavg", "flora", "fedsa", "fed_sb"],
)
def test_fine_tuning_trains_everybody_further_from_where_the_run_ended(over, tmp_path, shared):
    made = tiny(tmp_path, shared, **over, **{"personal.finetune_steps": 3, "federation.clients_per_round": 2})
    outcome = simulation.run(made)
    plain = simulation.run(tiny(tmp_path, shared, name="plain", **over, **{"federation.clients_per_round": 2}))
    assert outcome.state.hash() == plain.state.hash()
    assert [line["held_out"] for line in journal(outcome)] == [line["held_out"] for line in journal(plain)]

    parts, state = ready(outcome, made)
    train = made.train.model_copy(update={"steps": 3})
    by_hand = assemble(made.model_copy(update={"train": train}))
    by_hand.engine.rule, by_hand.engine.private = None, lambda name: False
    for client in parts.data.clients:  # also those that were never sampled
        handed = parts.strategy.assign(state, client, made.train.lr)
        had = parts.engine.store.get(client, state.round)
        own = {name: had[OWN + name] for name in handed.adapter.tensors() if OWN + name in had}
        start = replace(handed, adapter=handed.adapter.holding(own), frozen=frozenset())
        [update] = by_hand.engine.train([start])
        assert small.gap(update.adapter, start.adapter) > 1e-3
        found = read_peft(outcome.folder / "personal" / folder_name(client))
        expected = combined(handed.side, update.adapter)
        assert found.pairs.keys() == expected.pairs.keys()
        for path, pair in found.pairs.items():
            torch.testing.assert_close(pair.delta(), expected.pairs[path].delta(), rtol=0, atol=1e-5)
        score = outcome.closing.scores["loss"][client]
        assert own_loss(made, outcome, client) == pytest.approx(score["personal"], abs=1e-4)
        assert score["personal"] < score["federated"]
    for one in (parts, by_hand):
        one.engine.close()


def test_rounds_that_follow_after_fine_tuning_go_on_from_the_run_and_not_from_the_fine_tuned(tmp_path, shared):
    over = method("fedsa") | {"personal.finetune_steps": 2, "federation.clients_per_round": 2, "seed": 3}
    whole = simulation.run(tiny(tmp_path, shared, name="whole", **over | {"federation.rounds": 4}))
    simulation.run(tiny(tmp_path, shared, **over | {"federation.rounds": 2}))
    longer = simulation.run(tiny(tmp_path, shared, **over | {"federation.rounds": 4}), resume=True)
    assert longer.state.hash() == whole.state.hash()
    assert journal(longer) == journal(whole), "evaluated with what clients had then"
    assert longer.closing.scores == whole.closing.scores
    assert kept(longer) == kept(whole)


# who goes home with what


def test_an_exported_clients_adapter_is_the_one_that_was_evaluated(tmp_path, shared):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = tiny(tmp_path, shared, **method("fedsa"))
    outcome = simulation.run(made)
    parts, state = ready(outcome, made)
    ids = torch.arange(3, 43).reshape(2, 20)
    parts.engine.close()
    for client in sorted(state.drawn):
        expected = small.logits_with(parts.base.model, joining.personal(parts, state, client), ids)
        out = tmp_path / folder_name(client)
        assert export(outcome.folder, out, client=client) == out
        base = AutoModelForCausalLM.from_pretrained(made.model.base, dtype=torch.float32)
        bare = base(ids).logits
        model: Any = PeftModel.from_pretrained(base, out).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
            assert (expected - bare).abs().max() > 1e-2
        merged = tmp_path / f"merged-{client}"
        export(outcome.folder, merged, client=client, to="merged")
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-4)


def test_a_client_without_an_adapter_of_its_own_is_one_line(tmp_path, shared):
    outcome = simulation.run(tiny(tmp_path, shared, **method("fedsa"), **{"federation.rounds": 1}))
    absent = next(c for c in (f"client-{i}" for i in range(4)) if c not in outcome.state.drawn)
    with pytest.raises(CheckpointError, match=f"client '{absent}' has no adapter of its own; did you mean") as raised:
        export(outcome.folder, tmp_path / "out", client=absent)
    assert "\n" not in str(raised.value)
    plain = simulation.run(tiny(tmp_path, shared, name="plain"))
    with pytest.raises(CheckpointError, match="nobody has one beside the global one"):
        export(plain.folder, tmp_path / "out", client="client-0")
    watching = method("fedsa") | {"stop.key": "loss.weighted"}
    best = simulation.run(tiny(tmp_path, shared, name="best", **watching))
    with pytest.raises(ConfigError, match="--best and --client"):
        export(best.folder, tmp_path / "out", client="client-0", best=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("over", "personal"),
    [
        ({}, False),
        (method("flexlora"), False),
        (method("flexlora", over=MIXED), True),
        (method("fedsa"), True),
        ({"personal.ditto": 1.0}, True),
        ({"personal.finetune_steps": 1}, True),
        ({"personal.keep_local": [KEEP]}, True),
    ],
    ids=["fedavg", "equal ranks", "mixed ranks", "fedsa", "ditto", "fine-tuned", "keep_local"],
)
def test_the_closing_table_has_a_column_for_personal_adapters_where_there_are_any(over, personal, tmp_path, shared):
    made = tiny(tmp_path, shared, **over, **{"federation.rounds": 1, "baselines": ["local"]})
    outcome = simulation.run(made)
    closing = outcome.closing
    assert closing.joined == ("personal" if personal else "federated")
    for client in closing.clients:
        assert ("personal" in closing.scores["loss"][client]) == personal
    better, ties, compared = closing.helped("loss")
    own = [closing.scores["loss"][c] for c in closing.clients]
    assert compared == 4
    assert better == sum(s[closing.joined] < s["local"] for s in own)
    assert ties == sum(s[closing.joined] == s["local"] for s in own)
    assert json.loads((outcome.folder / "closing.json").read_text())["scores"] == closing.scores


def test_clients_of_other_ranks_are_scored_with_the_adapter_they_were_handed(tmp_path, shared):
    """Theirs is the global adapter cut to their rank: neither exported by client nor kept, but in the table."""
    made = tiny(tmp_path, shared, **method("flexlora", over=MIXED), baselines=["local"])
    outcome = simulation.run(made)
    parts, state = ready(outcome, made)
    own = marks.evaluation_rows(parts)
    for client, rows in own.items():
        handed = parts.strategy.assign(state, client, 0.0).adapter
        assert handed.ranks == parts.setting.ranks[client]
        [mean] = parts.engine.held_out([handed], [(0, rows)], 8)
        assert outcome.closing.scores["loss"][client]["personal"] == pytest.approx(mean.value, abs=1e-5)
    assert not (outcome.folder / "personal").exists()
    parts.engine.close()


def without_rows(parts: Parts, *clients: str) -> Parts:
    """Return the parts as if these clients had rows to evaluate with and none to train on."""
    empty = np.array([], dtype=np.int64)
    have = {c: replace(r, train=empty) if c in clients else r for c, r in parts.data.clients.items()}
    parts.engine.train_rows = {c: r.train for c, r in have.items()}
    return replace(parts, data=replace(parts.data, clients=have))


@pytest.mark.parametrize(
    "over", [{"personal.ditto": 1.0}, {"personal.finetune_steps": 2}, {"personal.keep_local": [KEEP]}, method("fedsa"),
             method("scaffold")], ids=["ditto", "fine-tuned", "keep_local", "fedsa", "scaffold"])  # fmt: skip
def test_a_client_without_rows_goes_home_with_everybodys_adapter(over, tmp_path, shared):
    made = tiny(tmp_path, shared, **over)
    parts = without_rows(assemble(made), "client-1")
    state = parts.start()
    for _ in range(2):
        answers = list(parts.engine.train([parts.strategy.assign(state, c, 1e-2) for c in parts.data.clients]))
        assert [a.client for a in answers if isinstance(a, Absence)] == ["client-1"]
        updates = [a for a in answers if isinstance(a, Update)]
        state = parts.strategy.fold(state, updates)
        state = replace(state, counted=dict.fromkeys((u.client for u in updates), state.round))
    tuned = joining.fine_tune(parts, state, 1e-2, 2) if made.personal.finetune_steps else None
    store = tuned or parts.engine.store
    assert store.get("client-1", 9) == {}
    assert store.get("client-0", 9) != {}
    assert joining.going_home(parts, state, tuned, "client-1").hash() == state.whole().hash()
    closing = joining.compare(parts, state, {}, None, ["loss"], tuned)
    scores = closing.scores["loss"]["client-1"]
    if "personal" in scores:
        assert scores["personal"] == pytest.approx(scores["federated"], abs=1e-6)
        assert closing.scores["loss"]["client-0"]["personal"] != pytest.approx(
            closing.scores["loss"]["client-0"]["federated"], abs=1e-6
        )
    parts.engine.close()


def test_personal_folders_hold_what_went_home_and_read_back(tmp_path, shared):
    for over in (
        method("fedsa"),
        {"personal.ditto": 1.0},
        {"personal.finetune_steps": 2},
        {"personal.keep_local": [KEEP]},
    ):
        made = tiny(tmp_path, shared, **over)
        outcome = simulation.run(made)
        parts, state = ready(outcome, made)
        folders = {path.name for path in (outcome.folder / "personal").iterdir()}
        assert folders == {folder_name(c) for c in state.drawn}
        found = {c: read_peft(outcome.folder / "personal" / folder_name(c)) for c in state.drawn}
        assert len({adapter.hash() for adapter in found.values()}) == len(found)
        rows = marks.evaluation_rows(parts)
        for client, adapter in found.items():
            [mean] = parts.engine.held_out([adapter], [(0, rows[client])], 8)
            assert outcome.closing.scores["loss"][client]["personal"] == pytest.approx(mean.value, abs=1e-6)
        parts.engine.close()
