"""Classifiers in both engines: heads of every client in one pass, against plain PEFT one client at a time."""

import pytest
import torch

from sheepfold.adapter import Adapter
from sheepfold.config import TrainSettings
from sheepfold.engines.batches import Row
from sheepfold.errors import AdapterMismatch
from sheepfold.local.rules import local_rule
from sheepfold.state import BatchPlan
from sheepfold.tasks.classification import collate
from tests import encoders, small
from tests.engines.test_cohort import RANKS, trained

RAGGED = TrainSettings(epochs=2, batch_rows=4, micro_rows=2, lr=1e-3, schedule="linear", weight_decay=0.01)
"""8, 6, 8 and 10 steps for the four clients; last steps of an epoch are short."""


@pytest.fixture(autouse=True)
def one_thread():
    with small.one_thread():
        yield


def work_for(base, **over):
    adapters = {c: encoders.adapter(base, over.get("rank", r), seed) for seed, (c, r) in enumerate(RANKS.items())}
    return small.assignments(adapters)


def closed(engine, work):
    try:
        return trained(engine, work)
    finally:
        engine.close()


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_a_cohort_of_classifiers_equals_plain_peft_one_client_at_a_time(family):
    base = encoders.model(family=family)
    work = work_for(base)
    ours = closed(encoders.cohort_engine(base, RAGGED), work)
    reference = trained(encoders.peft_engine(base, RAGGED), work)
    assert min(small.gap(ours[w.client].adapter, w.adapter) for w in work) > 1e-3
    for client in ours:
        assert ours[client].adapter.extra.keys() == work[0].adapter.extra.keys() != set()
        assert small.gap(ours[client].adapter, reference[client].adapter) < 1e-10
        assert ours[client].measurements.loss.value == pytest.approx(reference[client].measurements.loss.value)
        assert ours[client].measurements.target_tokens == len(small.client_rows()[client])


def test_every_tensor_of_a_head_trains():
    base = encoders.model(family="distilbert")
    work = work_for(base)
    ours = closed(encoders.cohort_engine(base, RAGGED), work)
    assert set(work[0].adapter.extra) == {
        f"{module}.{leaf}" for module in ("pre_classifier", "classifier") for leaf in ("weight", "bias")
    }
    for handed in work:
        for name, tensor in handed.adapter.extra.items():
            assert not torch.equal(ours[handed.client].adapter.extra[name], tensor)


def test_a_penalty_sees_heads_in_both_engines():
    base = encoders.model()
    work, rule = work_for(base), local_rule("proximal", {"mu": 0.5})
    ours = closed(encoders.cohort_engine(base, RAGGED, rule=rule), work)
    free = closed(encoders.cohort_engine(base, RAGGED), work)
    reference = trained(encoders.peft_engine(base, RAGGED, rule=rule), work)
    for client in ours:
        assert small.gap(ours[client].adapter, reference[client].adapter) < 1e-10
        head = [float((a[client].adapter.extra["classifier.weight"] - w.adapter.extra["classifier.weight"]).norm())
                for a in (ours, free) for w in work if w.client == client]  # fmt: skip
        assert head[0] < head[1]


def test_the_plan_and_the_cohort_change_no_result_with_dropout():
    base = encoders.model()
    work = work_for(base)
    plans = (BatchPlan(4, 2, 120), BatchPlan(1, 4, 10_000), BatchPlan(3, 1, 30))
    results = [closed(encoders.cohort_engine(base, RAGGED, plan=plan, dropout=0.3), work) for plan in plans]
    without = closed(encoders.cohort_engine(base, RAGGED), work)
    for client in without:
        assert all(small.gap(results[0][client].adapter, other[client].adapter) < 1e-10 for other in results[1:])
        assert small.gap(results[0][client].adapter, without[client].adapter) > 1e-4


def test_both_engines_give_the_same_scores_and_padding_leaves_them_alone():
    base = encoders.model()
    adapters = [encoders.adapter(base, 4, seed) for seed in range(3)]
    asked = [(a, rows) for a, rows in zip((0, 2, 1, 0), small.client_rows().values(), strict=True)]
    engine = encoders.cohort_engine(base, RAGGED)
    ours, again = engine.scores(adapters, asked, 32), engine.scores(adapters, asked, 1)
    engine.close()
    reference = encoders.peft_engine(base, RAGGED).scores(adapters, asked, 5)
    for one, other, third, (_, rows) in zip(ours, again, reference, asked, strict=True):
        assert one.loss.count == one.confusion.sum() == len(rows)
        assert one.loss.value == pytest.approx(other.loss.value, abs=1e-12)
        assert one.loss.value == pytest.approx(third.loss.value, abs=1e-12)
        assert (one.confusion == other.confusion).all()
        assert (one.confusion == third.confusion).all()


def test_a_batch_has_no_label_in_it_and_marks_pairs_and_padding():
    tokens = encoders.tokens()
    batch = collate(tokens, [Row(2, 0), Row(3, 1)])
    for i, row in enumerate((2, 3)):
        ids = tokens.row(row)[0]
        assert batch.lengths[i] == len(ids) - 1
        assert batch.ids[i, : len(ids) - 1].tolist() == ids[:-1].tolist()
        assert not batch.ids[i, len(ids) - 1 :].any()
        assert batch.target[i] == ids[-1]
    assert batch.first[0] < batch.lengths[0]  # a pair
    assert batch.first[1] == batch.lengths[1]


def test_pooled_and_flat_rows_go_through_an_adapted_pooler():
    base = encoders.model()
    sites = {name: m for name, m in base.named_modules() if name.endswith(("query", "pooler.dense"))}
    from sheepfold.engines.cohort import CohortEngine
    from sheepfold.engines.injection import CohortModel
    from sheepfold.engines.peft_model import PeftModelEngine
    from sheepfold.targets import new_adapter

    heads = {n: base.get_parameter(n).clone() for names in encoders.TASK.whole(base).values() for n in names}
    adapters = {c: Adapter(new_adapter(sites, 4, 16.0, i).pairs, heads).to(torch.float64) for i, c in enumerate(RANKS)}
    parts, keywords = encoders._engine(RAGGED, {}), encoders._keywords(RAGGED, {})
    work = small.assignments(adapters)
    ours = closed(CohortEngine(CohortModel(base, sites, list(heads)), *parts, **keywords), work)
    reference = trained(PeftModelEngine(base, list(sites), *parts, **keywords), work)
    assert max(small.gap(ours[c].adapter, reference[c].adapter) for c in ours) < 1e-10


def test_a_head_that_the_model_does_not_take_whole_is_refused():
    base = small.model()
    engine = small.cohort_engine(base, RAGGED)
    odd = Adapter(small.adapter(base, 4, 0).pairs, {"score.weight": torch.zeros(2, 2)})
    with pytest.raises(AdapterMismatch, match=r"score.weight: whole tensors are trained by train.engine peft_model"):
        list(engine.train(small.assignments(dict.fromkeys(RANKS, odd))))
    engine.close()


def test_heads_are_float32_on_a_bfloat16_base_in_both_engines():
    base = encoders.model(torch.bfloat16, "distilbert")
    work = small.assignments({c: encoders.adapter(base, 4, i).to(torch.float32) for i, c in enumerate(RANKS)})
    train = TrainSettings(steps=2, batch_rows=4, lr=1e-3)
    ours = closed(encoders.cohort_engine(base, train), work)
    reference = trained(encoders.peft_engine(base, train), work)
    for client in ours:
        assert {t.dtype for t in ours[client].adapter.extra.values()} == {torch.float32}
        assert small.gap(ours[client].adapter, reference[client].adapter) < 5e-3  # Adam's steps are of size lr
        assert ours[client].measurements.loss.value == pytest.approx(
            reference[client].measurements.loss.value, rel=0.05
        )
