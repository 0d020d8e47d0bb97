"""fedkd's loss against one written by hand: value and gradients of both sides, row by row, target by target."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sheepfold.distillation.losses import attention_gap, joint, kl, matched_layers
from sheepfold.models import silence_dropout
from sheepfold.tasks.base import Predicted
from sheepfold.tasks.causal_lm import CAUSAL_LM
from tests import encoders, small

CPU = torch.device("cpu")
ROWS = [0, 3, 4, 7]
KINDS = ("log_probabilities", "forward", "raw_logits")


def net(family: str, layers: int, heads: int, seed: int) -> Any:
    """Return a random model in float64 whose weights all learn, with attention maps to look at."""
    import transformers

    name, config = {**encoders.FAMILIES, "llama": small.FAMILIES["llama"][:2]}[family]
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads}
    if family == "distilbert":
        shape = {"n_layers": layers, "n_heads": heads}
    if family == "llama":
        shape["num_key_value_heads"] = heads // 2
    labels = {} if family == "llama" else {"num_labels": len(encoders.LABELS)}
    torch.manual_seed(seed)
    cls: Any = getattr(transformers, name)
    shape |= {"initializer_range": 0.3}  # attention maps far from uniform
    made = cls(cls.config_class(**config | shape, **labels, attn_implementation="eager"))
    silence_dropout(made)
    return made.double().requires_grad_(True).eval()


class Side:
    """One side of the reference: what a model says of each row when it sees that row alone."""

    def __init__(self, model: Any, tokens: Any) -> None:
        self.logits: list[torch.Tensor] = []  # one (classes,) a target
        self.nats: list[torch.Tensor] = []
        self.maps: list[tuple[torch.Tensor, ...]] = []  # by row, then layer: (heads, tokens, tokens)
        for row in ROWS:
            ids, labels = tokens.row(row)
            more, targets = {}, []
            if model.config.model_type == "llama":
                targets = [(t, int(labels[t + 1])) for t in range(len(ids) - 1) if labels[t + 1] >= 0]
            else:
                label, ids = int(ids[-1]), ids[:-1]
                targets = [(-1, label)]
                if model.config.model_type == "bert":
                    second = torch.arange(len(ids)) >= int(tokens.prompt_tokens[row])
                    more = {"token_type_ids": second.long()[None]}
            out = model(input_ids=ids[None], output_attentions=True, **more)
            self.maps.append(tuple(layer[0] for layer in out.attentions))
            for place, label in targets:
                z = out.logits[0] if place == -1 else out.logits[0, place]
                self.logits.append(z)
                self.nats.append(torch.log(torch.exp(z).sum()) - z[label])

    def loss(self) -> torch.Tensor:
        return sum(self.nats[1:], self.nats[0]) / len(self.nats)


def log_p(z: torch.Tensor, tau: float) -> torch.Tensor:
    return z / tau - torch.log(torch.exp(z / tau).sum())


def divergence(learner: Side, constant: list[torch.Tensor], tau: float, kind: str) -> torch.Tensor:
    """Return the mean over targets of what the learner is pulled by; `constant` holds plain numbers."""
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs in zip(learner.logits, constant, strict=True):
        if kind == "raw_logits":
            for l, c in zip(mine, theirs.tolist(), strict=True):  # noqa: E741
                total = total + torch.exp(l) * (l - c)
        elif kind == "log_probabilities":
            for l, c in zip(log_p(mine, tau), log_p(theirs, tau).tolist(), strict=True):  # noqa: E741
                total = total + tau * tau * torch.exp(l) * (l - c)
        else:
            p = torch.exp(theirs / tau) / torch.exp(theirs / tau).sum()
            for q, l, c in zip(p.tolist(), log_p(mine, tau), log_p(theirs, tau).tolist(), strict=True):  # noqa: E741
                total = total + tau * tau * q * (c - l)
    return total / len(learner.logits)


def gap(student: Side, teacher: Side, projections: list[Any]) -> torch.Tensor:
    layers, deeper = len(student.maps[0]), len(teacher.maps[0])
    total = torch.zeros((), dtype=torch.float64)
    for s in range(layers):
        squares, count = torch.zeros((), dtype=torch.float64), 0
        for ours, theirs in zip(student.maps, teacher.maps, strict=True):
            mine, wanted = ours[-s - 1], theirs[-s * (deeper // layers) - 1]
            for head in range(len(wanted)):
                if projections[s] is None:
                    seen = mine[head]
                else:
                    weight = projections[s].weight[head]
                    seen = sum((weight[h] * mine[h] for h in range(1, len(mine))), weight[0] * mine[0])
                squares = squares + ((seen - wanted[head]) ** 2).sum()
                count += seen.numel()
        total = total + squares / count
    return total


class Held:
    """Everything that passes no gradient, as it was when it was looked at."""

    def __init__(self, student: Side, teacher: Side) -> None:
        self.student, self.teacher = ([z.detach().clone() for z in side.logits] for side in (student, teacher))
        self.scale = float((student.loss() + teacher.loss() + 1).detach())


def reference(student: Side, teacher: Side, held: Held, projections: list[Any], **o: Any) -> torch.Tensor:
    S, T = student.loss(), teacher.loss()
    total = S + T
    if o["attention_weight"]:
        total = total + o["attention_weight"] * gap(student, teacher, projections) / (S + T + 1)
    pulls = divergence(student, held.teacher, o["temperature"], o["kind"])
    pulls = pulls + divergence(teacher, held.student, o["temperature"], o["kind"])
    return total + o["kl_weight"] * pulls / held.scale


CASES = {
    "bert teaches distilbert": (("distilbert", 2, 4), ("bert", 5, 4)),
    "other numbers of heads": (("bert", 2, 2), ("bert", 3, 8)),
    "causal": (("llama", 2, 4), ("llama", 4, 4)),
    "causal, other numbers of heads": (("llama", 1, 2), ("llama", 3, 4)),
}
OPTIONS = [
    {"kind": "log_probabilities", "temperature": 1.0, "kl_weight": 1.0, "attention_weight": 1.0},
    {"kind": "log_probabilities", "temperature": 2.5, "kl_weight": 0.3, "attention_weight": 4.0},
    {"kind": "forward", "temperature": 2.0, "kl_weight": 1.0, "attention_weight": 0.0},
    {"kind": "raw_logits", "temperature": 1.0, "kl_weight": 1.0, "attention_weight": 1.0},
    {"kind": "raw_logits", "temperature": 1.0, "kl_weight": 0.7, "attention_weight": 0.0},
]


def setting(case: str) -> tuple[Any, Any, Any, Any, list[Any]]:
    """Return (task, tokens, student, teacher, projections) of a case."""
    (family, layers, heads), (theirs, deeper, more) = CASES[case]
    causal = family == "llama"
    tokens = small.tokens(8, longest=14) if causal else encoders.tokens(8)
    student, teacher = net(family, layers, heads, 1), net(theirs, deeper, more, 2)
    projections: list[Any] = [None] * layers
    if heads != more:
        projections = [nn.Linear(heads, more, bias=False, dtype=torch.float64) for _ in range(layers)]
    return CAUSAL_LM if causal else encoders.TASK, tokens, student, teacher, projections


def gradients(loss: torch.Tensor, *modules: Any) -> list[torch.Tensor]:
    params = [p for module in modules if module is not None for p in module.parameters()]
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_all_its_gradients_are_those_written_by_hand(case, options):
    task, tokens, student, teacher, projections = setting(case)
    looks = bool(options["attention_weight"])
    said = [task.predict(model, tokens, ROWS, CPU, attentions=looks) for model in (student, teacher)]
    made = joint(*said, **options, projections=projections if looks else [])
    sides = Side(student, tokens), Side(teacher, tokens)
    expected = reference(*sides, Held(*sides), projections, **options)
    assert made.total.item() == pytest.approx(expected.item(), rel=0, abs=1e-9)
    assert made.student.item() == pytest.approx(sides[0].loss().item(), abs=1e-9)
    used = projections if looks else []
    ours, theirs = (gradients(loss, student, teacher, *used) for loss in (made.total, expected))
    assert max(float(g.abs().max()) for g in theirs) > 1e-2
    for mine, hers in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, hers, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", ["bert teaches distilbert", "other numbers of heads"])
@pytest.mark.parametrize("options", OPTIONS[1:3], ids=lambda o: o["kind"])
def test_a_gradient_is_the_slope_with_everything_held_that_passes_none(case, options):
    """Finite differences: the constants stay as they were, the denominator of the attention term moves."""
    task, tokens, student, teacher, projections = setting(case)
    held = Held(Side(student, tokens), Side(teacher, tokens))
    said = [task.predict(model, tokens, ROWS, CPU, attentions=True) for model in (student, teacher)]
    joint(*said, **options, projections=projections).total.backward()
    draw, h = np.random.default_rng(0), 1e-5
    for model in (student, teacher):
        weights = [p for p in model.parameters() if p.grad is not None and float(p.grad.abs().max()) > 1e-3]
        for p in (weights[i] for i in draw.choice(len(weights), 2, replace=False)):
            at = int(p.grad.abs().argmax())
            values = []
            with torch.no_grad():
                for step in (h, -2 * h):
                    p.view(-1)[at] += step
                    sides = Side(student, tokens), Side(teacher, tokens)
                    values.append(float(reference(*sides, held, projections, **options)))
                p.view(-1)[at] += h
            assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(p.grad.view(-1)[at]), rel=1e-5, abs=1e-7)


def test_a_teacher_without_gradients_still_counts_in_the_student_s():
    task, tokens, student, teacher, projections = setting("bert teaches distilbert")
    teacher.requires_grad_(False)
    said = [task.predict(model, tokens, ROWS, CPU, attentions=True) for model in (student, teacher)]
    made = joint(*said, **OPTIONS[0], projections=projections)
    sides = Side(student, tokens), Side(teacher, tokens)
    expected = reference(*sides, Held(*sides), projections, **OPTIONS[0])
    for mine, hers in zip(gradients(made.total, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(mine, hers, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (6, 12, [(5, 11), (4, 9), (3, 7), (2, 5), (1, 3), (0, 1)]),  # DistilBERT and BERT
        (3, 6, [(2, 5), (1, 3), (0, 1)]),
        (4, 4, [(3, 3), (2, 2), (1, 1), (0, 0)]),
        (2, 5, [(1, 4), (0, 2)]),
        (5, 12, [(4, 11), (3, 9), (2, 7), (1, 5), (0, 3)]),
        (3, 5, [(2, 4), (1, 3), (0, 2)]),
        (1, 7, [(0, 6)]),
        (3, 2, []),
    ],
)
def test_layers_are_matched_from_the_top_a_whole_ratio_apart(student, teacher, pairs):
    assert matched_layers(student, teacher) == pairs


@given(student=st.integers(1, 40), teacher=st.integers(1, 90))
def test_every_student_layer_has_a_layer_of_a_deeper_teacher(student, teacher):
    pairs = matched_layers(student, teacher)
    assert [low for low, _ in pairs] == (list(range(student))[::-1] if student <= teacher else [])
    assert all(0 <= high < teacher for _, high in pairs)
    assert all(a[1] - b[1] == teacher // student for a, b in pairwise(pairs))


def said(lengths: list[int], layers: int, heads: int, width: int, draw: np.random.Generator) -> Predicted:
    """Return random logits and attention maps of rows of these lengths, with anything in the padding."""
    maps = tuple(torch.from_numpy(draw.random((len(lengths), heads, width, width))) for _ in range(layers))
    logits = torch.from_numpy(draw.normal(size=(len(lengths), 3)))
    return Predicted(logits, torch.zeros(len(lengths), dtype=torch.int64), torch.tensor(lengths), maps)


def wider(predicted: Predicted, extra: int, draw: np.random.Generator) -> Predicted:
    """Return the same rows with so many more columns of padding, and anything in it."""
    maps = []
    for old in predicted.attentions:
        rows, heads, width, _ = old.shape
        new = torch.from_numpy(draw.normal(size=(rows, heads, width + extra, width + extra)))
        new[:, :, :width, :width] = old
        maps.append(new)
    return Predicted(predicted.logits, predicted.target, predicted.lengths, tuple(maps))


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    extra=st.integers(0, 5),
    heads=st.sampled_from([(2, 2), (2, 3), (3, 1)]),
    seed=st.integers(0, 99),
)
def test_padding_has_no_say(lengths, extra, heads, seed):
    draw = np.random.default_rng(seed)
    student, teacher = (said(lengths, layers, n, max(lengths), draw) for layers, n in zip((2, 4), heads, strict=True))
    projections: list[nn.Module | None] = [None, None]
    if heads[0] != heads[1]:
        projections = [nn.Linear(*heads, bias=False, dtype=torch.float64) for _ in range(2)]
    narrow = joint(student, teacher, projections=projections)
    wide = joint(wider(student, extra, draw), wider(teacher, extra, draw), projections=projections)
    torch.testing.assert_close(wide.total, narrow.total, rtol=1e-12, atol=0)
    alone = [
        attention_gap(*(_row(side, i) for side in (student, teacher)), projections) * n * n
        for i, n in enumerate(lengths)
    ]
    expected = sum(alone, torch.tensor(0.0)) / sum(n * n for n in lengths)
    torch.testing.assert_close(narrow.attention, expected, rtol=1e-12, atol=0)


def _row(predicted: Predicted, i: int) -> Predicted:
    maps = tuple(layer[i : i + 1] for layer in predicted.attentions)
    return Predicted(predicted.logits[i : i + 1], predicted.target[i : i + 1], predicted.lengths[i : i + 1], maps)


@given(seed=st.integers(0, 99), shift=st.floats(-3, 3), tau=st.sampled_from([0.5, 1.0, 4.0]))
def test_the_divergence_is_one_and_raw_logits_are_none(seed, shift, tau):
    draw = np.random.default_rng(seed)
    mine, theirs = (torch.from_numpy(draw.normal(size=(5, 4))) for _ in range(2))
    assert float(kl(mine, theirs, tau)) > 0
    assert float(kl(mine + shift, mine, tau)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(kl(mine + shift, theirs - shift, tau), kl(mine, theirs, tau), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kl(mine, theirs, tau, "forward"), kl(theirs, mine, tau), rtol=1e-9, atol=1e-12)
    # raw logits: the same two distributions come to another number, below zero where the learner's logits are smaller
    raw = kl(mine + shift, mine, kind="raw_logits")
    torch.testing.assert_close(raw, shift * (mine + shift).exp().sum() / 5, rtol=1e-9, atol=1e-9)
    learner = mine.clone().requires_grad_()
    of_kl, of_forward, of_raw = (torch.autograd.grad(kl(learner, theirs, kind=k), learner)[0] for k in KINDS)
    p, apart = mine.softmax(1), mine.log_softmax(1) - theirs.log_softmax(1)
    torch.testing.assert_close(of_kl, p * (apart - (p * apart).sum(1, keepdim=True)) / 5)
    torch.testing.assert_close(of_forward, (p - theirs.softmax(1)) / 5)
    torch.testing.assert_close(of_raw, mine.exp() * (mine - theirs + 1) / 5)  # it rests at the other's logits less 1


def test_two_widths_of_one_vocabulary_meet_in_the_columns_that_both_have():
    """Qwen2.5's sizes share a tokenizer, and pad its vocabulary to 151,936 or to 152,064."""
    draw = np.random.default_rng(0)
    target, lengths = torch.tensor([1, 0, 3]), torch.tensor([2, 2])
    narrow, wide = (Predicted(torch.from_numpy(draw.normal(size=(3, n))), target, lengths) for n in (5, 7))
    made = joint(narrow, wide, attention_weight=0.0)
    assert made.kl_student == kl(narrow.logits, wide.logits[:, :5])
    assert made.kl_teacher == kl(wide.logits[:, :5], narrow.logits)
    torch.testing.assert_close(made.teacher, wide.losses().mean())
