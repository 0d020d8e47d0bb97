"""What both ends of a run agree on, and the client's end: an update becomes a letter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Size, Tensor

from sheepfold.adapter import Adapter
from sheepfold.config import Experiment
from sheepfold.errors import ConfigError, WireError
from sheepfold.local.store import ClientStore
from sheepfold.messages import Absence, Assignment, Update, Wire
from sheepfold.state import ServerState
from sheepfold.strategies.base import Beside, Strategy, accept, cut, no_more, nothing, parts_of
from sheepfold.transforms.base import Parcel, Transform, outbound
from sheepfold.transforms.norm_bound import norm_bound
from sheepfold.transforms.wire_dtype import KEPT, wire_dtype
from sheepfold.wire.packing import ADAPTER, Letter, compact, going_up, scales_of


@dataclass(frozen=True, slots=True)
class Terms:
    """What both ends of a run know without being told; it follows from the experiment."""

    transforms: tuple[Transform, ...] = (wire_dtype(),)
    private: Callable[[str], bool] = nothing
    """Whether a tensor, by flat name, stays with its client"""
    beside: Callable[[Assignment], Mapping[str, Size | Beside]] | None = no_more
    """What an update brings beside the adapter, by name; None: not declared"""
    may_shrink: bool = False
    """Whether a pair may come back with a smaller rank than it was handed out with"""
    admit: Callable[[Assignment, Update], None] = accept
    """Raises AdapterMismatch for an update of the right shapes that cannot be folded"""

    def declared(self, handed: Assignment) -> dict[str, Beside] | None:
        """Return what an update brings beside the adapter after this assignment; None: not declared."""
        if self.beside is None:
            return None
        named = self.beside(handed).items()
        return {name: what if isinstance(what, Beside) else Beside(tuple(what)) for name, what in named}


def terms(experiment: Experiment, made: Strategy) -> Terms:
    """Return the terms of an experiment. Raises ConfigError for transforms that its strategy cannot have."""
    bound = experiment.federation.norm_bound
    if bound is not None and "scaffold" in parts_of(made):
        raise ConfigError(
            "federation.norm_bound with federation.strategy scaffold: a shortened change of a control variate would "
            "leave server and client with different ones; set it to null (train.grad_norm bounds variates)"
        )
    transforms = [] if bound is None else [norm_bound(bound)]
    last = wire_dtype(feedback=made.averages == "factors")
    silent = made.local is None or made.local.finish is None  # its clients have nothing to say beside the adapter
    beside = made.beside or (no_more if silent else None)
    return Terms((*transforms, last), made.private, beside, made.mixed_ranks, made.admit)


def over_the_wire(made: Strategy, experiment: Experiment) -> Strategy:
    """Return the strategy whose assignments travel as the experiment says."""
    wire = Wire(experiment.federation.wire.up, experiment.federation.wire.down)
    sides: list[tuple[Adapter, Adapter]] = []

    def assign(state: ServerState, client: str, lr: float) -> Assignment:
        handed = made.assign(state, client, lr)
        if not (sides and sides[-1][0] is handed.side):
            sides[:] = [(handed.side, compact(handed.side))]  # one value for all clients of a round
        return replace(handed, wire=wire, side=sides[-1][1])

    return replace(made, assign=assign)


def starts(handed: Assignment, scales: Mapping[str, float], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return what a client's changes are counted from, by flat name after 'adapter:'.

    A pair of a smaller rank is counted from the handed one cut to it, as a client that prunes cuts it.
    """
    pairs = {}
    for path, pair in handed.adapter.pairs.items():
        small = ranks.get(path, pair.rank) < pair.rank
        pairs[path] = cut(pair, ranks[path], scales[path]) if small else pair
    return {
        ADAPTER + name: t for name, t in Adapter(pairs, handed.adapter.extra, handed.adapter.sparse).tensors().items()
    }


def written(
    update: Update, received: Assignment, terms: Terms, own: Mapping[str, Tensor]
) -> tuple[Letter, dict[str, Tensor]]:
    """Return an update as it travels, and what the client keeps for its next one.

    received: the assignment as the client has it; own: what it kept. Raises WireError for numbers that cannot travel.
    """
    tensors = going_up(update)
    scales = scales_of(update.adapter, tensors)
    start = starts(received, scales, update.adapter.ranks)
    parcel = Parcel(update.client, received.round, received.wire.up, tensors, start, start, own)
    sent = outbound(terms.transforms, parcel)
    letter = Letter(update.client, received.round, received.wire.up, sent.tensors, scales, update.measurements)
    return letter, {name: t for name, t in sent.own.items() if own.get(name) is not t}


def reply(answer: Update | Absence, received: Assignment, terms: Terms, store: ClientStore) -> Letter | Absence:
    """Return what a client sends, and put what its transforms remember beside what it keeps anyway."""
    if isinstance(answer, Absence):
        return answer
    remembers = received.wire.up == "int8"
    own = store.get(answer.client, received.last) if remembers else {}
    own = {name: t for name, t in own.items() if name.startswith(KEPT)}
    try:
        letter, keep = written(answer, received, terms, own)
    except WireError as error:
        return Absence(answer.client, str(error), answer.measurements.steps)
    if keep:
        after = received.round + 1
        store.put(answer.client, after, {**store.get(answer.client, after), **keep})
    return letter


def ranks_sent(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the ranks that a message's A, B and core have, by path; only well-formed ones."""
    sides = {"A": 0, "B": 1, "core": 0}
    found = {}
    for name, t in tensors.items():
        path, _, of = name.rpartition("/")
        if of in sides and name.startswith(ADAPTER) and t.dim() == 2:
            found[path.removeprefix(ADAPTER)] = int(t.shape[sides[of]])
    return found
