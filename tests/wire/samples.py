"""Messages to test with: adapters of every kind of change, sides, memories, and what each side knows or keeps."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from sheepfold.adapter import Adapter, LoraPair, SparseDelta, from_delta, kind
from sheepfold.messages import Assignment, Measurements, Update, Wire
from sheepfold.metrics import Mean
from sheepfold.wire.packing import compact

PATHS = ("layers.0.q_proj", "layers.0.v_proj", "layers.10.down_proj", "layers.2.q_proj")
FORMATS = ("fp32", "bf16", "int8")
D_IN, D_OUT = 7, 5


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def a_pair(rank: int, seed: int, core: bool = False, scale: float | None = None) -> LoraPair:
    A, B = numbers(rank, D_IN, seed=seed), numbers(D_OUT, rank, seed=seed + 1)
    return LoraPair(A, B, 16 / rank if scale is None else scale, numbers(rank, rank, seed=seed + 2) if core else None)


def a_sparse(seed: int) -> SparseDelta:
    return SparseDelta(numbers(4, seed=seed), torch.tensor([0, 3, 17, 34]), (D_OUT, D_IN))


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Return pairs of mixed ranks and scales, some with a core, sparse deltas, and whole tensors of several formats."""
    seed = draw(st.integers(0, 10**6))
    found: dict[str, LoraPair] = {}
    sparse: dict[str, SparseDelta] = {}
    for i, path in enumerate(PATHS):
        what = draw(st.sampled_from(["pair", "core", "sparse", "nothing"]))
        if what in ("pair", "core"):
            scale = draw(st.one_of(st.none(), st.floats(1e-3, 1e3)))
            found[path] = a_pair(draw(st.integers(1, 5)), seed + i, what == "core", scale)
        elif what == "sparse":
            sparse[path] = a_sparse(seed + i)
    dtypes = draw(st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), max_size=3))
    extra = {f"head.{i}": numbers(3, i, seed=seed + i, dtype=dtype) for i, dtype in enumerate(dtypes)}
    return Adapter(found, extra, sparse)


@st.composite
def sides(draw: st.DrawFn, paths: list[str]) -> Adapter:
    """Return what these modules may have changed by: factors, products, and factors larger than their product."""
    seed = draw(st.integers(0, 10**6))
    made = {
        "thin": a_pair(1, seed, scale=1.0),
        "fat": a_pair(5, seed, scale=0.5),
        "product": from_delta(numbers(D_OUT, D_IN, seed=seed)),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(made)), max_size=len(paths)))
    return compact(Adapter({paths[i]: made[name] for i, name in enumerate(chosen)}))


@st.composite
def assignments(draw: st.DrawFn, wire: Wire | None = None) -> Assignment:
    """Return an assignment of which a client may know some kinds, and some tensors, itself."""
    adapter = draw(adapters())
    names = sorted(adapter.tensors())
    known = {"positions", *draw(st.sets(st.sampled_from(["A", "B"]), max_size=2))}
    if names:
        known |= draw(st.sets(st.sampled_from(names), max_size=3))
    formats = st.sampled_from(FORMATS)
    return Assignment(
        client=draw(st.sampled_from(["ann", "ward-7", 'Zoë "q" 狗'])),
        round=draw(st.integers(0, 10**4)),
        adapter=adapter,
        lr=draw(st.floats(0, 1)),
        first_step=draw(st.integers(0, 10**6)),
        memory={"variate/x": numbers(3, 4, seed=5)} if draw(st.booleans()) else {},
        side=draw(sides([*adapter.pairs, *adapter.sparse])),
        frozen=frozenset(draw(st.sets(st.sampled_from(["A", "B"]), max_size=1))),
        known=frozenset(known),
        wire=wire or Wire(draw(formats), draw(formats)),
    )


def a_handed(wire: Wire = Wire(), rank: int = 4, round: int = 3, client: str = "ann", **over) -> Assignment:
    """Return the assignment of the hostile and lossy cases: two pairs and a head."""
    pairs = {path: a_pair(rank, i, scale=2.0) for i, path in enumerate(PATHS[:2])}
    made = Assignment(client, round, Adapter(pairs, {"head": numbers(3, 4, seed=9)}), 1e-3, wire=wire)
    return replace(made, **over)


def measured(rows: int = 12, **over) -> Measurements:
    return replace(Measurements(Mean(31.25, 77.0), rows, rows * 7, 8, 90, 2, seconds={"forward": 0.25}), **over)


def an_answer(handed: Assignment, seed: int = 1, size: float = 0.1, private=lambda name: False) -> Update:
    """Return what this client might return: everything that trains has moved."""
    trained = handed.trained(private)
    moved = {n: t + size * numbers(*t.shape, seed=seed + i).to(t.dtype) for i, (n, t) in enumerate(trained.items())}
    unsent = frozenset(handed.adapter.tensors()) - moved.keys()
    return Update(handed.client, handed.adapter.holding(moved), measured(), unsent=unsent)


def mine(handed: Assignment) -> Adapter:
    """Return the adapter that a client makes itself: of the same form, with other numbers where it is handed some."""
    had = handed.adapter.tensors()
    known = {n for n in had if {n, kind(n)} & handed.known}
    return handed.adapter.holding({n: torch.zeros_like(t) for n, t in had.items() if n not in known})
