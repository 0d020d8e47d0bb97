"""Whole runs of every method on both engines: they learn, repeat and resume to the bit, and export what they evaluated.

A small base, four clients of which three take part in a round, three rounds: enough for a second visit of some clients,
for a client that comes late, and for both halves of the methods that change in between.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save

from sheepfold import folders, simulation
from sheepfold import state as states
from sheepfold.adapter import Adapter, kind
from sheepfold.assembly import Parts, assemble, load_data
from sheepfold.config import Experiment
from sheepfold.journal import RunFolder
from sheepfold.messages import Assignment, Update
from sheepfold.models import load_tokenizer
from sheepfold.state import ServerState
from sheepfold.strategies import AROUND, FOLDS
from sheepfold.strategies.hetlora import RANKS
from sheepfold.wire.ends import terms, written
from sheepfold.wire.packing import pack
from tests import small
from tests.marks import mostly_slow
from tests.runs import MEASURED, experiment

MIXED = {"adapter.rank": 8, "adapter.ranks": [2, 4, 8, 4]}
Over = dict[str, Any]


def method(*names: str, over: Over | None = None, **arguments: Any) -> Over:
    """Return the options of a method, or of a list of them."""
    strategy = names[0] if len(names) == 1 else list(names)
    return {"federation.strategy": strategy, "federation.strategy_args": arguments, **(over or {})}


SGD = {"train.optimizer": "sgd", "train.lr": 0.3}
METHODS: dict[str, Over] = {
    "fedavg": method("fedavg"),
    "fedit": method("fedit"),
    "fedprox": method("fedprox", mu=20.0),
    "scaffold": method("scaffold", over=SGD),
    "scaffold with adamw": method("scaffold", server_lr=0.7),
    "fedopt": method("fedopt", server="avgm"),
    "fedavgm": method("fedavgm"),
    "fedadam": method("fedadam", server_lr=0.01),
    "fedyogi": method("fedyogi", server_lr=0.01),
    "fedadagrad": method("fedadagrad", server_lr=0.01),
    "flora": method("flora", over=MIXED),
    "fedex": method("fedex"),
    "fedex, shortened": method("fedex", residual_rank=2),
    "flexlora": method("flexlora", over=MIXED),
    "hetlora": method("hetlora", gamma=0.5, regularisation=30.0, over=MIXED),
    "heterolora": method("heterolora", over=MIXED),
    "heterolora, raw": method("heterolora", handle_alpha=False, over=MIXED),
    "ffa_lora": method("ffa_lora"),
    "rolora": method("rolora"),
    "fedsa": method("fedsa"),
    "fed_sb": method("fed_sb"),
    "fed_sb in the base": method("fed_sb", start="base"),
    "slora": method("slora", stage_rounds=1, density=0.2),
    "slora, keeping": method("slora", "fedex", stage_rounds=2, density=0.2, residual="keep"),
    "fedprox x flexlora": method("fedprox", "flexlora", mu=20.0, over=MIXED),
    "fedadam x fedex": method("fedadam", "fedex", server_lr=0.01),
    "scaffold x fedex": method("scaffold", "fedex"),
    "scaffold x rolora": method("scaffold", "rolora"),
    "slora x flexlora": method("slora", "flexlora", stage_rounds=2, density=0.2, over=MIXED),
    "fedadam x fedsa": method("fedadam", "fedsa", server_lr=0.01),
    "fedavgm x slora": method("fedavgm", "slora", stage_rounds=1, density=0.2),
    "fedyogi x fed_sb": method("fedyogi", "fed_sb", server_lr=0.01),
    "fedavgm x scaffold x fedprox": method("fedavgm", "scaffold", "fedprox", "fedavg", mu=20.0),
}

QUICK = {
    "fedprox", "scaffold", "flora", "fedex", "flexlora", "heterolora", "rolora", "fed_sb", "fedadam x fedsa",
}  # fmt: skip
"""Methods of the plain suite: one of each kind, alone or around another"""

OTHER_LOSS = 1e-4
"""Nats by which the engines may differ in float32: a hundredth of what these runs learn in a round."""


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with small.quick():
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A small base and a token cache."""
    folder = tmp_path_factory.mktemp("shared")
    small.saved(folder / "base")
    return folder


def tiny(folder: Path, shared: Path, **over: Any) -> Experiment:
    """Return an experiment of a fifth of a second."""
    values = {
        "model.base": str(shared / "base"), "cache": str(shared / "cache"), "data.rows": 40, "data.max_tokens": 64,
        "train.batch_rows": 2, "federation.rounds": 3, "federation.clients_per_round": 3, "keep_rounds": 1,
    }  # fmt: skip
    return experiment(folder, **(values | over))


@pytest.fixture(scope="module")
def ran(tmp_path_factory, shared):
    """Return a function that gives a method's run, made once for all tests."""
    made: dict[str, simulation.Outcome] = {}

    def run(name: str) -> simulation.Outcome:
        if name not in made:
            made[name] = simulation.run(tiny(tmp_path_factory.mktemp("ran"), shared, **METHODS[name]))
        return made[name]

    return run


def journal(outcome: simulation.Outcome) -> list[dict[str, Any]]:
    """Return the journal without the seconds, which differ."""
    lines = [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def kept(outcome: simulation.Outcome) -> dict[str, bytes]:
    """Return the contents of every state and of everything that clients keep, by path."""
    paths = [*(outcome.folder / "state").glob("*"), *(outcome.folder / "clients").rglob("*.safetensors")]
    return {str(path.relative_to(outcome.folder)): path.read_bytes() for path in paths}


def by_plain_peft(made: Experiment, adapter: Path) -> dict[str, float]:
    """Return each client's held-out loss with an exported adapter, by plain transformers and plain PEFT, row by row."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made.model.base, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, adapter).eval()
    data = load_data(made, load_tokenizer(made.model))
    losses = {}
    for client, rows in data.clients.items():
        nats, count = 0.0, 0
        for n in rows.eval:
            ids, labels = data.tokens.row(int(n))
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1].double()
            nats += float(F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
            count += int((labels[1:] != -100).sum())
        losses[client] = nats / count
    return losses


def payload(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of these tensors' numbers in a safetensors file."""
    content = save({name: t.detach().clone().contiguous() for name, t in tensors.items()})
    (head,) = struct.unpack("<Q", content[:8])
    return len(content) - 8 - head


def in_rounds(
    parts: Parts, rounds: int, clients: Sequence[str] = ()
) -> Iterator[tuple[ServerState, list[Assignment], list[Update]]]:
    """Yield the state before each round, what goes out and what comes back; of everybody where no clients are named."""
    state = parts.start()
    for _ in range(rounds):
        assignments = [parts.strategy.assign(state, client, 1e-3) for client in clients or parts.data.clients]
        updates = list(parts.engine.train(assignments))
        yield state, assignments, updates
        state = parts.strategy.fold(state, updates)
        state = replace(state, counted=dict.fromkeys((u.client for u in updates), state.round))


def test_every_method_by_name_is_here():
    tried = {name for over in METHODS.values() for name in _names(over)}
    elsewhere = {"fedkseed", "fedkd"}  # a model of scalars, and a teacher: their own tests stop and resume them
    assert tried | elsewhere == FOLDS.keys() | AROUND.keys()


def _names(over: Over) -> list[str]:
    strategy = over["federation.strategy"]
    return [strategy] if isinstance(strategy, str) else strategy


@pytest.mark.parametrize("name", mostly_slow(METHODS, QUICK))
def test_a_method_repeats_and_resumes_to_the_bit(name, ran, tmp_path, shared):
    over, first = METHODS[name], ran(name)
    lines, files = journal(first), kept(first)
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert len({line["adapter"] for line in lines}) == 4
    assert not any(line["absent"] for line in lines[1:])
    assert lines[-1]["adapter"] == first.state.hash()

    again = simulation.run(tiny(tmp_path, shared, **over))
    assert (journal(again), kept(again)) == (lines, files), "the same experiment"
    resumed = simulation.run(tiny(tmp_path, shared, **over), resume_from=1)
    assert resumed.folder == again.folder
    assert (journal(resumed), kept(resumed)) == (lines, files), "resumed from round 1"
    assert resumed.state.hash() == first.state.hash()

    other = simulation.run(tiny(tmp_path, shared, seed=1, **over | {"evaluation.every": 0}))
    assert other.state.hash() != first.state.hash()


SAME_CLIENTS = {"fedit", "fedopt", "fedyogi", "fedadagrad", "fedex, shortened", "heterolora, raw", "fedavgm x slora"}
"""Methods whose clients do what those of another one do: tried on one engine."""


@pytest.mark.parametrize("name", mostly_slow([n for n in METHODS if n not in SAME_CLIENTS], QUICK))
def test_both_engines_learn_the_same_and_send_the_same(name, ran, tmp_path, shared):
    slower = simulation.run(tiny(tmp_path, shared, **METHODS[name], **{"train.engine": "peft_model"}))
    for ours, theirs in zip(journal(ran(name)), journal(slower), strict=True):
        for key in ("cohort", "downlink_bytes"):
            assert ours.get(key) == theirs.get(key)
        more = ours.get("uplink_bytes", 0) - theirs.get("uplink_bytes", 0)  # the names and seconds of more stages
        assert 0 <= more <= 64 * len(ours.get("cohort", ()))
        assert ours.get("train_loss", 0.0) == pytest.approx(theirs.get("train_loss", 0.0), abs=OTHER_LOSS)
        for client, loss in ours["held_out"]["clients"].items():
            assert loss == pytest.approx(theirs["held_out"]["clients"][client], abs=OTHER_LOSS), client


@pytest.mark.parametrize("name", mostly_slow([n for n in METHODS if "fedsa" not in n], QUICK - {"fedadam x fedsa"}))
def test_what_is_exported_is_what_was_evaluated_last(name, ran, tmp_path, shared):
    """Of fedsa the global adapter alone is the base: what its clients are evaluated with is in test_personal.py."""
    outcome = ran(name)
    start, *_, last = (line["held_out"]["clients"] for line in journal(outcome))
    for client, loss in by_plain_peft(tiny(tmp_path, shared), outcome.folder / "adapter").items():
        assert loss == pytest.approx(last[client], abs=1e-4)
        assert abs(last[client] - start[client]) > 1e-3, "it learned nothing that could be lost"


@pytest.mark.parametrize("name", ["flora", "fed_sb in the base", "slora, keeping", "flexlora"])
def test_a_base_that_stores_its_weights_transposed_is_no_exception(name, tmp_path, shared):
    """GPT-2: whatever is made from a weight, or added beside it, has a weight's other orientation there."""
    small.saved(tmp_path / "gpt2", "gpt2")
    made = tiny(tmp_path, shared, **METHODS[name] | {"model.base": str(tmp_path / "gpt2"), "federation.rounds": 3})
    outcome = simulation.run(made)
    start, *_, last = (line["held_out"]["clients"] for line in journal(outcome))
    for client, loss in by_plain_peft(made, outcome.folder / "adapter").items():
        assert loss == pytest.approx(last[client], abs=1e-4)
        assert loss < start[client]


@pytest.mark.parametrize(
    ("around", "adapter"),
    [
        (method("scaffold"), "full"),
        (method("scaffold"), "ia3"),
        (method("fedprox", mu=1.0), "ia3"),
    ],
    ids=["scaffold, full", "scaffold, ia3", "fedprox, ia3"],
)
def test_methods_that_say_so_go_around_any_adapter(around, adapter, tmp_path, shared):
    over = around | {"adapter.method": adapter, "train.engine": "peft_model", "train.lr": 3e-3}
    outcome = simulation.run(tiny(tmp_path, shared, **over))
    losses = [line["held_out"]["loss"]["weighted"] for line in journal(outcome)]
    assert losses == sorted(losses, reverse=True)
    resumed = simulation.run(tiny(tmp_path, shared, **over), resume_from=2)
    assert resumed.state.hash() == outcome.state.hash()
    plain = simulation.run(tiny(tmp_path, shared, name="plain", **over | method("fedavg")))
    assert plain.state.hash() != outcome.state.hash()


class Killed(BaseException):
    """What stands for kill -9 here: nothing below can handle it, and the disk stays as it is."""


def writes_of(patch: pytest.MonkeyPatch, last: int | None = None) -> list[str]:
    """Return a list that fills up with what a run writes; the process dies before the write after the `last`."""
    done: list[str] = []
    replace_file, append = folders.replace_file, RunFolder.append

    def counted(name: str) -> None:
        if len(done) == last:
            raise Killed
        done.append(name)

    def write(path: Path, content: bytes) -> None:
        counted(path.parent.name)
        replace_file(path, content)

    def journal_line(self: RunFolder, line: Mapping[str, Any]) -> None:
        counted("journal")
        append(self, line)

    patch.setattr(states, "replace_file", write)
    patch.setattr(RunFolder, "append", journal_line)
    return done


@pytest.mark.parametrize("name", mostly_slow(["scaffold", "fedadam x fedsa"], quick=["scaffold"]))
def test_a_run_that_ends_before_any_of_its_writes_resumes_to_the_bit(name, tmp_path, shared, monkeypatch):
    """Between what clients keep, the journal's line and the state there is no moment that a resumed run minds."""
    over = METHODS[name] | {"federation.rounds": 2, "federation.clients_per_round": 2, "keep_rounds": 2}
    with monkeypatch.context() as patch:
        done = writes_of(patch)
        whole = simulation.run(tiny(tmp_path, shared, name="whole", **over))
    assert {"client-1", "journal", "state"} <= set(done)
    for last in range(done.index("journal") + 1, len(done)):
        made = tiny(tmp_path, shared, name=f"killed-{last}", **over)
        with monkeypatch.context() as patch:
            writes_of(patch, last)
            with pytest.raises(Killed):
                simulation.run(made)
        resumed = simulation.run(made, resume=True)
        assert resumed.state.hash() == whole.state.hash(), done[last]
        assert journal(resumed) == journal(whole), done[last]
        assert kept(resumed) == kept(whole), done[last]


def test_clients_prune_their_ranks_and_a_resumed_run_remembers_them(tmp_path, shared):
    over = METHODS["hetlora"] | {"federation.rounds": 2}
    outcome = simulation.run(tiny(tmp_path, shared, **over))
    ranks = outcome.state.memory[RANKS]
    assert ranks.shape == (4, len(outcome.adapter.pairs))
    before = torch.tensor([2, 4, 8, 4])[:, None].expand_as(ranks)
    assert (ranks <= before).all()
    assert 0 < (ranks < before).sum() < ranks.numel(), "some were cut, and some were not"
    longer = simulation.run(tiny(tmp_path, shared, **METHODS["hetlora"]), resume=True)
    whole = simulation.run(tiny(tmp_path, shared, name="whole", **METHODS["hetlora"]))
    assert longer.state.hash() == whole.state.hash()
    assert torch.equal(longer.state.memory[RANKS], whole.state.memory[RANKS])
    assert not torch.equal(whole.state.memory[RANKS], ranks), "and they went on pruning"


A, B, CORE, VALUES = "A", "B", "core", "values"
TRAVEL: dict[str, list[tuple[set[str], set[str]]]] = {
    "fedavg": [({A, B}, {A, B})] * 2,
    "fedprox": [({A, B}, {A, B})] * 2,
    "fedadam": [({A, B}, {A, B})] * 2,
    "scaffold": [({A, B}, {A, B})] * 3,
    "flora": [({A, B}, {A, B})] * 3,
    "fedex": [({A, B}, {A, B})] * 3,
    "flexlora": [({A, B}, {A, B})] * 2,
    "hetlora": [({A, B}, {A, B})] * 2,
    "ffa_lora": [({B}, {B})] * 2,
    "rolora": [({A, B}, {B}), ({A, B}, {A}), ({A, B}, {B})],
    "fedsa": [({A}, {A})] * 2,
    "fed_sb": [({VALUES}, {VALUES}), ({A, B, CORE}, {CORE}), ({A, B, CORE}, {CORE})],
    "fed_sb in the base": [({CORE}, {CORE})] * 2,
    "slora": [({VALUES}, {VALUES}), ({A, B}, {A, B})],
    "scaffold x rolora": [({A, B}, {B}), ({A, B}, {A}), ({A, B}, {B})],
    "fedadam x fedsa": [({A}, {A})] * 2,
}
"""Method -> for each round: the kinds of tensors that go out, and those that come back, beside sides and variates."""
BESIDE = {"scaffold": {2, 3}, "scaffold x rolora": {3}, "flora": {2, 3}, "fedex": {2, 3}}
"""Method -> rounds in which more than the adapter goes out: what trains' control variates, or the base's change."""


def as_a_side_travels(side: Adapter) -> dict[str, torch.Tensor]:
    """Return a side's factors, or where their product is smaller, that."""
    sent: dict[str, torch.Tensor] = {}
    for path, pair in side.pairs.items():
        dense = pair.delta(torch.float32)
        factors = {f"side:{path}/A": pair.A, f"side:{path}/B": pair.B}
        sent |= factors if pair.A.numel() + pair.B.numel() < dense.numel() else {f"side:{path}": dense}
    return sent


@pytest.mark.parametrize("name", TRAVEL)
def test_counted_bytes_are_those_of_what_travels(name, tmp_path, shared):
    parts = assemble(tiny(tmp_path, shared, **METHODS[name]))
    travel = zip(TRAVEL[name], in_rounds(parts, len(TRAVEL[name])), strict=True)
    for (down, up), (state, assignments, updates) in travel:
        for a, u in zip(assignments, updates, strict=True):
            out = {n: t for n, t in a.adapter.tensors().items() if kind(n) in down}
            beside = as_a_side_travels(a.side) | dict(a.memory)
            assert a.nbytes == payload(out | beside) > 0
            assert bool(beside) == (state.round + 1 in BESIDE.get(name, ()))
            back = {n: t for n, t in u.adapter.tensors().items() if kind(n) in up}
            assert u.nbytes == payload(back | dict(u.memory)) > 0
            assert bool(u.memory) == name.startswith("scaffold")
            still = {n: t for n, t in u.adapter.tensors().items() if kind(n) not in up}
            handed = a.adapter.tensors()
            assert all(torch.equal(t, handed[n]) for n, t in still.items()), "what does not travel is as it was"
            assert all(kind(n) in down | {"positions"} or n in u.unsent for n in handed), "unsent, yet not made at home"
    parts.engine.close()


def test_the_journal_counts_what_the_messages_count(tmp_path, shared):
    for name in ("scaffold", "slora x flexlora", "fedadam x fedsa"):
        outcome = simulation.run(tiny(tmp_path, shared, **METHODS[name], **{"federation.clients_per_round": 4}))
        parts = assemble(tiny(tmp_path, shared, **METHODS[name], **{"federation.clients_per_round": 4}))
        for line, (_, assignments, updates) in zip(journal(outcome)[1:], in_rounds(parts, 3), strict=True):
            assert line["downlink_bytes"] == sum(len(pack(a)) for a in assignments)
            agreed = terms(parts.experiment, parts.strategy)
            letters = [written(u, a, agreed, {})[0] for a, u in zip(assignments, updates, strict=True)]
            assert line["uplink_bytes"] == sum(len(pack(letter)) for letter in letters)
        parts.engine.close()
