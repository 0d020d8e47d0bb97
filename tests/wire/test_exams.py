"""Held-out rows between machines: what a client is asked, what it answers, and answers that no rows could give."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sheepfold.adapter import Adapter
from sheepfold.errors import WireError
from sheepfold.messages import Absence
from sheepfold.metrics import Mean, Score
from sheepfold.wire import blob, exams
from sheepfold.wire.exams import ClientFacts, Exam, Verdict, pack_exam, pack_verdict, unpack_exam, unpack_verdict
from sheepfold.wire.packing import pack_absence
from tests.wire.samples import a_handed, a_pair, assignments

RUN = "00000000000000aa"
FACTS = ClientFacts(12, 3, 0, 84, "ab12")
LOSS = Score(Mean(31.25, 77.0))


def a_verdict(**over) -> Verdict:
    return replace(Verdict("ann", 3, {"federated": LOSS}, FACTS), **over)


def labelled(table: list[list[int]], count: float | None = None) -> Score:
    counts = np.array(table, dtype=np.int64)
    return Score(Mean(2.5, float(counts.sum()) if count is None else count), counts)


@settings(max_examples=40)
@given(assignments())
def test_an_exam_arrives_as_it_was_whatever_its_adapter_is_made_of(handed):
    """Also what a client would make itself, and what it would be handed where that is not the global adapter."""
    side = Adapter({path: a_pair(5, 3, scale=0.5) for path in list(handed.adapter.pairs)[:1]})
    other = handed.adapter.holding({n: t * 2 for n, t in handed.adapter.tensors().items() if t.is_floating_point()})
    for adapter in (handed.adapter, other):
        asked = Exam(replace(handed, last=min(2, handed.round)), adapter, side)
        there = unpack_exam(pack_exam(asked, RUN), adapter, RUN)
        assert there.adapter.hash() == adapter.hash()
        assert there.side.hash() == side.hash()
        assert there.handed.adapter.hash() == handed.adapter.hash()
        assert list(there.handed.adapter.pairs) == list(handed.adapter.pairs)
        for name in ("client", "round", "lr", "first_step", "last"):
            assert getattr(there.handed, name) == getattr(asked.handed, name)
        assert there.handed.memory.keys() == handed.memory.keys()


def test_an_exam_sends_an_adapter_once():
    handed = a_handed()
    once, twice = (len(pack_exam(Exam(handed, adapter))) for adapter in (handed.adapter, a_handed().adapter))
    assert 0 < once - handed.adapter.nbytes() < 4096
    assert twice - once > handed.adapter.nbytes()


def test_an_exam_of_another_run_or_of_other_modules_or_of_the_future_is_refused():
    handed = a_handed()
    data = pack_exam(Exam(handed, handed.adapter), RUN)
    with pytest.raises(WireError, match=r"a message of run '00000000000000aa', expected 0{16}; it was sent before"):
        unpack_exam(data, handed.adapter)
    with pytest.raises(WireError, match=r"adapts layers.0.q_proj, which this client's own adapter does not"):
        unpack_exam(data, Adapter(extra=handed.adapter.extra), RUN)
    with pytest.raises(WireError, match=r"has 1,[0-9]+ bytes, expected at most 1,000"):
        unpack_exam(data, handed.adapter, RUN, 1000)
    late = pack_exam(Exam(replace(handed, last=9), handed.adapter), RUN)
    with pytest.raises(WireError, match="its last is 9, expected at most its round, 3"):
        unpack_exam(late, handed.adapter, RUN)


@pytest.mark.parametrize(
    ("verdict", "asked"),
    [
        (a_verdict(), {}),
        (a_verdict(scores={"federated": Score()}), {}),
        (a_verdict(scores={"federated": labelled([[2, 1], [0, 4]])}), {"labels": 2}),
        (
            a_verdict(
                scores={"base": LOSS, "federated": LOSS},
                metrics={"rouge": {"base": Mean(1.5, 3.0), "federated": Mean(2.5, 3.0)}},
            ),
            {"metrics": ["rouge"], "must": ["base", "federated"]},
        ),
    ],
    ids=["loss", "no rows", "labels", "metrics"],
)
def test_a_verdict_arrives_as_it_was(verdict, asked):
    there = unpack_verdict(pack_verdict(verdict, RUN), "ann", 3, RUN, **asked)
    assert isinstance(there, Verdict)
    assert (there.facts, there.metrics) == (verdict.facts, verdict.metrics)
    for who, score in verdict.scores.items():
        assert there.scores[who].loss == score.loss
        np.testing.assert_equal(there.scores[who].confusion, score.confusion)


def test_a_client_may_say_why_it_does_not_judge():
    data = pack_absence(Absence("ann", "its owner forbids generation"), 3, RUN)
    assert unpack_verdict(data, "ann", 3, RUN).reason == "its owner forbids generation"


def forged(**over) -> bytes:
    """Return a verdict's bytes with other tensors or parts of its head."""
    head, tensors = blob.read(pack_verdict(a_verdict(), RUN))
    tensors |= {name: value for name, value in over.items() if isinstance(value, torch.Tensor)}
    return blob.write({**head, **{n: v for n, v in over.items() if n not in tensors}}, tensors)


def losses(*figures: float) -> torch.Tensor:
    return torch.tensor([[figures]], dtype=torch.float64)


BAD = {
    "another client's": (forged(client="bob"), "a verdict in the name of 'bob'; a client sends its own alone"),
    "replayed": (forged(round=2), "a verdict on round 2, expected round 3; was it sent again"),
    "another run": (pack_verdict(a_verdict()), "a message of run '0{16}', expected 00000000000000aa"),
    "an update": (forged(message="update"), "its message is 'update', expected verdict or absence"),
    "nobody": (forged(who=[]), r"a verdict on \[\], expected \['federated'\]"),
    "somebody else": (forged(who=["federated", "mine"]), r"a verdict on \['federated', 'mine'\]"),
    "a metric": (forged(metrics=["rouge"]), r"a verdict with metrics \['rouge'\], expected \[\]"),
    "a row": (forged(row=torch.zeros(3)), "a verdict with a tensor 'row'; expected losses and counted"),
    "nan": (forged(losses=losses(float("nan"), 3.0)), "figures that are not finite"),
    "fractions": (forged(losses=losses(1.0, 2.5)), "counts in fractions, or below 0"),
    "below nothing": (forged(losses=losses(1.0, -2.0)), "counts in fractions, or below 0"),
    "a loss of nothing": (forged(losses=losses(1.0, 0.0)), "a loss of nothing, or below 0"),
    "a negative loss": (forged(losses=losses(-5.0, 3.0)), "a loss of nothing, or below 0"),
    "another shape": (forged(losses=torch.zeros(2, 2)), r"without its losses, expected \(1, 1, 2\)"),
    "half numbers": (forged(losses=losses(1.0, 2.0).float()), "without its losses"),
    "labels": (forged(counted=torch.zeros(1, 2, 2, dtype=torch.int64)), "with counted labels, where rows have none"),
    "rows below 0": (forged(train=-3), "its train is -3, expected a whole number of at least 0"),
    "a long hash": (forged(data="x" * 200), "its data is 'xxx.*expected a text of at most 100 characters"),
    "cut": (pack_verdict(a_verdict(), RUN)[:-3], "it is truncated"),
    "huge": (bytes(exams.verdict_bytes(0) + 1), "bytes, expected at most 1,048,576"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_verdict_that_no_rows_could_give_is_refused(name):
    data, why = BAD[name]
    with pytest.raises(WireError, match=why) as error:
        unpack_verdict(data, "ann", 3, RUN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("score", "why"),
    [
        (LOSS, r"without its counted, expected \(1, 2, 2\)"),
        (labelled([[1, 2], [3, 4]], 11.0), "counted labels are not as many as its rows"),
        (labelled([[-1, 2], [3, 4]]), "counted labels are not as many as its rows"),
        (labelled([[1, 0, 0], [0, 1, 0], [0, 0, 1]]), r"expected \(1, 2, 2\) whole numbers"),
    ],
    ids=["none", "another sum", "below nothing", "three labels"],
)
def test_a_matrix_that_is_not_the_rows_is_refused(score, why):
    data = pack_verdict(a_verdict(scores={"federated": score}), RUN)
    with pytest.raises(WireError, match=why):
        unpack_verdict(data, "ann", 3, RUN, labels=2)


def test_figures_of_all_clients_together_stay_numbers():
    data = pack_verdict(a_verdict(scores={"federated": Score(Mean(1e308, 1.0))}), RUN)
    with pytest.raises(WireError, match="figures that are not finite, or that no sum has room for"):
        unpack_verdict(data, "ann", 3, RUN)


def test_a_loss_that_is_no_number_does_not_travel():
    with pytest.raises(WireError, match="the federated adapter's figures on this client's rows are not finite"):
        pack_verdict(a_verdict(scores={"federated": Score(Mean(float("nan"), 3.0))}))
