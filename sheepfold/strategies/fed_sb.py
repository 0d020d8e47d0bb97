"""Fed-SB: B and A stay as they are, and a small matrix R between them trains: r^2 numbers a module, averaged exactly.

    W + s B R A,   R = sum_k p_k R_k,   so   sum_k p_k s B R_k A  =  s B R A

start "gradient": in the first round the adapted weights themselves train. Of their mean change D = U S V^T,

    B = U_r,   A = V_r^T,   R = diag(S_r) / s:   the best rank-r part of that round's progress

start "base": B and A come from the base's own weights, W = U S V^T: B = U_r S_r, A = V_r^T, R = 0. Every client can
make these two for itself, so R alone travels.

Sources: Fed-SB, arXiv:2502.15436, section 4, with LoRA-SB's start, arXiv:2411.19557, section 3; LoRA-XS,
arXiv:2405.17604, section 3. Deviations: LoRA-SB estimates D by one step over a sample of rows, where this is a whole
first round; LoRA-XS draws R from N(0, 1e-10).
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sheepfold.adapter import Adapter, LoraPair, from_delta
from sheepfold.errors import ConfigError, suggest
from sheepfold.messages import Assignment, Update
from sheepfold.products import best_rank
from sheepfold.state import ServerState
from sheepfold.strategies.base import Strategy, Weights, factor_means, hand_out
from sheepfold.strategies.slora import best_pairs, from_the_base, weights_train

STARTS = ("gradient", "base")
FRAME = frozenset({"A", "B"})


def fed_sb(start: str = "gradient", weights: Weights = "rows") -> Strategy:
    """Return Fed-SB over adapters of equal ranks. Raises ConfigError for an unknown start."""
    if start not in STARTS:
        raise ConfigError(f"federation.strategy_args.start: no {start!r}; {suggest(str(start), STARTS)}")

    def assign(state: ServerState, client: str, lr: float) -> Assignment:
        handed = hand_out(state, client, lr)
        if state.adapter.sparse:
            return handed
        return replace(handed, frozen=FRAME, known=handed.known | FRAME if start == "base" else handed.known)

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        mean = factor_means(state, updates, weights, unmoved=FRAME)
        if mean.sparse:
            mean = Adapter({path: framed(pair) for path, pair in best_pairs(state, mean).items()}, mean.extra)
        return state.advance(mean)

    return Strategy(
        name="fed_sb",
        fold=fold,
        assign=assign,
        begin=inside_base if start == "base" else partial(weights_train, positions=everywhere),
        weights=weights,
        check=partial(from_the_base, "fed_sb"),
        pairs_only=True,
        beyond_peft=True,
    )


def everywhere(path: str, numbers: int) -> Tensor:
    """Return all positions of a weight."""
    return torch.arange(numbers)


def framed(pair: LoraPair) -> LoraPair:
    """Return the same product with orthonormal B and A and a core between them; of SVD form, the core is diagonal.

    Directions that a product of lower rank does not fill are orthonormal too, so that they can train.
    """
    B, left = torch.linalg.qr(pair.B.double())
    A, right = torch.linalg.qr(pair.A.double().T)
    core = left @ right.T
    sign = torch.where(core.diagonal() < 0, -1.0, 1.0)
    return LoraPair(A.T.to(pair.A).contiguous(), (B * sign).to(pair.B), pair.scale, (sign[:, None] * core).to(pair.A))


def inside_base(state: ServerState) -> ServerState:
    """Return the state whose frames are the base's own largest singular directions, with cores of zero.

    Decomposed in float64, which never searches: every client must find the same.
    """
    weight = state.setting.weight
    if weight is None:
        raise ConfigError("federation.strategy fed_sb, start base: needs the base's weights; set start to gradient")
    pairs = {}
    for path, pair in state.adapter.pairs.items():
        found = best_rank(from_delta(weight(path).double()), pair.rank)
        pairs[path] = LoraPair(
            found.A.to(pair.A), found.B.to(pair.B), pair.scale, pair.A.new_zeros(pair.rank, pair.rank)
        )
    return replace(state, adapter=replace(state.adapter, pairs=pairs))
