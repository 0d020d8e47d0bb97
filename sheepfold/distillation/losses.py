"""What teacher and student minimise together.

    L = S + T + a * attention / (S + T + 1) + k * (student's KL + teacher's KL) / sg(S + T + 1)

S and T are the task losses (cross-entropy, nats per target), sg(.) passes no gradient. Each KL takes the other side as
a constant:

    student's KL = tau^2 * mean over targets of KL(p_student || p_teacher),   p = softmax(logits / tau)
    teacher's KL = tau^2 * mean over targets of KL(p_teacher || p_student)

(`log_probabilities`: the learner's own distribution comes first; `forward`: the other's does, as Hinton et al.,
arXiv:1503.02531, have it),

and `attention` compares attention maps, layer by layer from the top:

    attention = sum_s mean (student layer L_s - s  -  teacher layer L_t - s * (L_t // L_s))^2,   s = 0 .. L_s - 1

Source: FedKD-LoRA, the code of Federated-Learning-for-Fine-Tuning-Large-Language-Models. It takes tau = a = k = 1, and
raw logits where a KL takes log-probabilities (`raw_logits` here): sum exp(l) * (l - c) is no divergence, can be
negative, and is least where each of the learner's logits is the other's less 1. The denominator of the attention term
carries gradients, the KLs' does not, as there. Our own: means of attention are over pairs of real tokens, so that
padding has no say; heads in different numbers are projected; where the logits of two sizes of one family have different
widths, the KLs see the columns that both have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sheepfold.tasks.base import Predicted


@dataclass(frozen=True, slots=True)
class Joint:
    """One batch's loss, and what it is made of; all scalars."""

    total: Tensor
    student: Tensor
    teacher: Tensor
    attention: Tensor
    kl_student: Tensor
    kl_teacher: Tensor


def kl(learner: Tensor, constant: Tensor, temperature: float = 1.0, kind: str = "log_probabilities") -> Tensor:
    """Return the mean over targets of KL(learner || constant), both (targets, classes) logits; a scalar.

    kind forward: of KL(constant || learner); raw_logits: the logits themselves stand where log-probabilities do, sum
    exp(l) * (l - c), at temperature 1.
    """
    constant = constant.detach()
    if kind == "raw_logits":
        return F.kl_div(constant, learner, reduction="batchmean", log_target=True)
    ours = F.log_softmax(learner / temperature, dim=-1)
    theirs = F.log_softmax(constant / temperature, dim=-1)
    first, second = (theirs, ours) if kind == "forward" else (ours, theirs)
    return temperature**2 * F.kl_div(second, first, reduction="batchmean", log_target=True)


def matched_layers(student: int, teacher: int) -> list[tuple[int, int]]:
    """Return (student layer, teacher layer) pairs, both counted from 0 at the bottom, from the top down.

    Every student layer has one, teacher // student layers of the teacher apart. A student with more layers than its
    teacher has none: the rule has no answer there.
    """
    if teacher < student:
        return []
    return [(student - 1 - s, teacher - 1 - s * (teacher // student)) for s in range(student)]


def attention_gap(student: Predicted, teacher: Predicted, projections: Sequence[nn.Module | None]) -> Tensor:
    """Return the summed mean squared difference of matched layers' attention maps; a scalar.

    projections: for each matched pair what takes the student's heads to the teacher's, (..., heads) each; None where
    they have the same number.
    """
    total = student.logits.new_zeros(())
    tokens = student.attentions[0].shape[-1]
    real = torch.arange(tokens, device=student.lengths.device) < student.lengths[:, None]
    pairs = (real[:, :, None] & real[:, None, :])[..., None]  # (rows, tokens, tokens, 1)
    matched = matched_layers(len(student.attentions), len(teacher.attentions))
    for (low, high), projection in zip(matched, projections, strict=True):
        ours, theirs = (x.permute(0, 2, 3, 1) for x in (student.attentions[low], teacher.attentions[high]))
        ours = ours.to(total.dtype) if projection is None else projection(ours.to(total.dtype))
        gap = (ours - theirs.to(total.dtype)) ** 2 * pairs
        total = total + gap.sum() / (pairs.sum() * theirs.shape[-1])
    return total


def joint(
    student: Predicted,
    teacher: Predicted,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    attention_weight: float = 1.0,
    kind: str = "log_probabilities",
    projections: Sequence[nn.Module | None] = (),
) -> Joint:
    """Return the loss of both sides on the same rows; a teacher whose logits carry no gradient stays as it is."""
    S, T = student.losses().mean(), teacher.losses().mean()
    scale = S + T + 1
    gap = attention_gap(student, teacher, projections) if attention_weight else S.new_zeros(())
    width = min(student.logits.shape[1], teacher.logits.shape[1])  # sizes of one family pad one vocabulary differently
    ours, theirs = student.logits[:, :width], teacher.logits[:, :width]
    of_student, of_teacher = kl(ours, theirs, temperature, kind), kl(theirs, ours, temperature, kind)
    total = S + T + attention_weight * gap / scale + kl_weight * (of_student + of_teacher) / scale.detach()
    return Joint(total, S, T, gap, of_student, of_teacher)
