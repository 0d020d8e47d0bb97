"""FedKSeed: all weights train, without gradients; K candidate directions are known to all, and scalars travel.

    w = w0 - lr sum_s G_s z_s,   G_s <- G_s + sum_k p_k (sum of client k's scalars g for candidate s)

The candidates follow from the run's seed. A client is handed G, rebuilds w from it, and answers with the candidate and
the scalar of each step (engines/zeroth_order.py). The learning rate is constant, since G holds none.

probabilities (FedKSeed-Pro): candidates that moved the loss much are drawn more often,

    a_s = mean of min(|g|, clip) over a zero and all uses of s so far,   p = softmax((a - min a) / (max a - min a))

and since the server draws the candidates of a client's steps itself, it hands out these, and p never travels.

Source: FedKSeed, arXiv:2312.06353, Algorithm 1 and section 3.3; zero as the first entry of a history, and clip, as in
its release. Deviations: the release sends the sum for each candidate, this the scalars of the steps, which are fewer
bytes and tell the server the history; there, clients write it into the server's memory.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sheepfold import adapter_methods
from sheepfold.adapter import Adapter
from sheepfold.config import Experiment, TrainSettings
from sheepfold.engines.seed_carrier import SEEDS, number_type
from sheepfold.engines.zeroth_order import CANDIDATES, SCALARS
from sheepfold.errors import AdapterMismatch, ConfigError
from sheepfold.messages import Assignment, Update
from sheepfold.rng import stream
from sheepfold.state import ServerState
from sheepfold.strategies.base import Beside, Strategy, Weights, argument, hand_out, weight, who

USES, SIZES = "uses", "sizes"
"""What the state remembers for Pro: how often each candidate was used, and the sum of its |g|, (K,) float64 each."""
CLIP = 1000.0
"""What a scalar counts at most in Pro's history, where nothing is said."""
MOST_STEPS = 1 << 20
"""Steps of which a client's answer may tell, where the server does not draw their candidates."""


def fedkseed(probabilities: bool = False, clip: float = CLIP, weights: Weights = "rows") -> Strategy:
    """Return FedKSeed; probabilities: FedKSeed-Pro, whose history counts no scalar as more than `clip`."""
    clip = argument("clip", clip, "a number above 0", lambda x: x > 0)
    if not isinstance(probabilities, bool):
        raise ConfigError(f"federation.strategy_args.probabilities: found {probabilities!r}, expected true or false")
    if clip != CLIP and not probabilities:
        raise ConfigError("federation.strategy_args.clip: has no effect without probabilities: true; remove it")

    def begin(state: ServerState) -> ServerState:
        none = torch.zeros(len(state.adapter.extra[SEEDS]), dtype=torch.float64)
        return replace(state, memory={USES: none, SIZES: none.clone()}) if probabilities else state

    def assign(state: ServerState, client: str, lr: float) -> Assignment:
        handed = replace(hand_out(state, client, lr), frozen=frozenset({"extra"}))  # its change is what scalars say
        return replace(handed, memory={CANDIDATES: drawn(state, client)}) if probabilities else handed

    def fold(state: ServerState, updates: Iterable[Update]) -> ServerState:
        G = state.adapter.extra[SEEDS]
        sums, total = np.zeros(len(G)), 0.0
        memory = {name: tensor.clone() for name, tensor in state.memory.items()}
        for update in updates:
            at, g = _steps(who(state, update), update, len(G))
            share = weight(update.measurements, weights)
            np.add.at(sums, at, share * g)
            total += share
            if probabilities:
                np.add.at(memory[USES].numpy(), at, 1.0)
                np.add.at(memory[SIZES].numpy(), at, np.minimum(abs(g), clip))
        if not total > 0:
            raise AdapterMismatch(f"round {state.round + 1}: nothing to fold: the weights sum to {total}")
        moved = (G.double() + torch.from_numpy(sums / total)).float()
        return state.advance(Adapter(extra={SEEDS: moved}), memory)

    def check(experiment: Experiment) -> None:
        _check(experiment, probabilities)

    return Strategy(
        name="fedkseed",
        fold=fold,
        assign=assign,
        begin=begin,
        weights=weights,
        beside=beside,
        admit=admit,
        check=check,
    )


def beside(handed: Assignment) -> dict[str, Beside]:
    """Return what a client's answer holds: a candidate and a scalar for each step that it took."""
    steps = len(handed.memory[CANDIDATES]) if CANDIDATES in handed.memory else MOST_STEPS
    numbered = number_type(len(handed.adapter.extra[SEEDS]))
    return {CANDIDATES: Beside((steps,), numbered, up_to=True), SCALARS: Beside((steps,), up_to=True)}


def admit(handed: Assignment, update: Update) -> None:
    """Raise AdapterMismatch for an answer that is not a known candidate and a scalar for each step."""
    _steps(f"round {handed.round + 1}, client {update.client!r}", update, len(handed.adapter.extra[SEEDS]))


def likelihoods(uses: Tensor, sizes: Tensor) -> Tensor:
    """Return how likely each candidate is to be drawn, (K,) float64, from its uses and the sum of its |g|.

    Source: arXiv:2312.06353, section 3.3. All alike where no candidate stands out.
    """
    mean = sizes / (1 + uses)
    spread = mean.max() - mean.min()
    return torch.softmax((mean - mean.min()) / spread if spread > 0 else torch.zeros_like(mean), dim=0)


def drawn(state: ServerState, client: str) -> Tensor:
    """Return the candidate of each of a client's steps in this round, (steps,) int16 or int32."""
    p = likelihoods(state.memory[USES], state.memory[SIZES]).numpy()
    rng = stream(state.setting.seed, "likely candidates", client, state.round)
    found = rng.choice(len(p), state.setting.steps, p=p)
    return torch.from_numpy(found).to(number_type(len(p)))


def _steps(place: str, update: Update, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the candidates and the scalars, in float64, of the steps that a client took."""
    none = torch.empty(0)
    at, g = update.memory.get(CANDIDATES, none), update.memory.get(SCALARS, none)
    known = (at >= 0) & (at < candidates)
    if not len(at) or at.shape != g.shape or not bool((known & g.isfinite()).all()):
        raise AdapterMismatch(
            f"{place}: expected a candidate, 0 to {candidates - 1}, and a scalar for each step; they were "
            "made by another engine, or with other adapter.options"
        )
    return at.long().numpy(), g.double().numpy()


def _check(experiment: Experiment, probabilities: bool) -> None:
    """Raise ConfigError for what this method cannot run with, or would ignore."""
    train, usual = experiment.train, TrainSettings()
    if experiment.adapter.method != adapter_methods.SEEDS:
        raise ConfigError(
            f"federation.strategy fedkseed: it trains all weights through seeds, and adapter.method is "
            f"{experiment.adapter.method!r}; set it to {adapter_methods.SEEDS}"
        )
    if experiment.personal.keep_local or experiment.personal.ditto:
        raise ConfigError(
            "federation.strategy fedkseed: its clients share one vector of sums, of which none can have a part of its "
            "own; of `personal`, finetune_steps goes with it"
        )
    if (wire := experiment.federation.wire).up != "fp32" or wire.down != "fp32":
        raise ConfigError(
            f"federation.wire {{up: {wire.up}, down: {wire.down}}}: federation.strategy fedkseed sends a scalar for "
            "each step, which is small already and means another step where it is rounded; set both to fp32"
        )
    constant = ("schedule", "round_schedule", "warmup_steps")
    for name in (*constant, "weight_decay", "optimizer_args", "local_rule", "gradient_checkpointing"):
        if (getattr(train, name) or None) != (getattr(usual, name) or None):
            why = "its learning rate is constant" if name in constant else "its steps have no gradient"
            raise ConfigError(f"train.{name}: has no place in federation.strategy fedkseed: {why}; remove it")
    if train.optimizer.lower() != "sgd":
        raise ConfigError(f"train.optimizer {train.optimizer!r}: federation.strategy fedkseed takes steps of sgd alone")
    if probabilities and train.steps is None:
        raise ConfigError(
            "federation.strategy_args.probabilities: the server draws the candidate of every step, so it must know how "
            "many there are; set train.steps"
        )
