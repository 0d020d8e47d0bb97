"""Every client's rank at every module, from what `adapter.ranks` says (rank_choice.py), the clients and the modules."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from sheepfold.errors import ConfigError, suggest
from sheepfold.rank_choice import BY_SIZE, DEFAULT, Fitted, Given, Rank, parse

T = TypeVar("T")
Ranks = Mapping[str, int]
"""Module path -> rank."""
Shapes = Mapping[str, tuple[int, int]]
"""Module path -> (d_in, d_out)."""

GIB = 2**30

PATHS = {
    "attention": r"(^|\.)\w*(attn|attention)\w*(\.|$)",
    "mlp": r"(^|\.)(\w*(mlp|ffn|feed_?forward|denserelu|moe)\w*|fc\d|(?<=\d\.)(intermediate|output))(\.|$)",
}
"""Group of modules -> what the paths of its modules hold; the first that is found counts.

OPT's block has fc1 and fc2, BERT's has `intermediate` and, beside `attention.output`, `output`.
"""


def client_ranks(
    choice: Any,
    rank: int,
    clients: Sequence[str],
    shapes: Shapes,
    seed: int,
    room: Callable[[Ranks], int] | None = None,
) -> dict[str, Ranks]:
    """Return every client's rank at every module; clients of one type share one mapping.

    choice and rank are `adapter.ranks` and, where that is None, `adapter.rank`. room gives the bytes of memory that a
    client of some ranks needs, for by-memory (None: its adapter alone, see memory_need). A draw is named by (seed,
    client), so a client's type does not depend on who else there is. Raises ConfigError, in one line, for a choice that
    is malformed, leaves a client or module out, names one that is not there, or exceeds a matrix or the memory.
    """
    if choice is None:
        return dict.fromkeys(clients, site_ranks(rank, shapes, "adapter.rank"))
    try:
        form = parse(choice)
    except ValueError as error:
        raise ConfigError(f"adapter.ranks: {error}") from None
    if isinstance(form, Given):
        asked = _handed_out(form.ranks, clients)
        made: dict[str, Ranks] = {}
        for client, one in asked.items():
            if _shown(one) not in made:
                made[_shown(one)] = site_ranks(one, shapes, f"adapter.ranks {_shown(one)} of client {client!r}")
        return {client: made[_shown(one)] for client, one in asked.items()}
    types = [site_ranks(one, shapes, f"adapter.ranks, type {_shown(one)}") for one in form.types]
    if isinstance(form, Fitted):
        return _fitted(_handed_out(form.gib, clients), types, room or partial(memory_need, shapes))
    if form.law in BY_SIZE:
        types.sort(key=lambda ranks: (adapter_numbers(shapes, ranks), list(ranks.values())))
    shares = form.shares
    return {client: types[_draw(shares, seed, client)] for client in clients}


def site_ranks(asked: Rank, shapes: Shapes, who: str) -> dict[str, int]:
    """Return the rank of every module where one rank, or a mapping, is asked for.

    Raises ConfigError, which `who` opens, where a module gets no rank, where a rank exceeds the smaller side of its
    matrix, and where a key of the mapping decides nothing.
    """
    table = {DEFAULT: asked} if isinstance(asked, int) else asked
    keys = {site: _key(site, table) for site in shapes}
    for site, (d_in, d_out) in shapes.items():
        if keys[site] not in table:
            raise ConfigError(f"{who}: no rank for {site}; name its module or its group, or add default")
        if (rank := table[keys[site]]) > min(d_in, d_out):
            raise ConfigError(
                f"{who}: rank {rank} for {site}, which is {d_in} -> {d_out}: its update has rank {min(d_in, d_out)} at "
                "most; choose a smaller rank, or targets without this module"
            )
    if idle := [key for key in table if key != DEFAULT and key not in keys.values()]:
        known = {site.rpartition(".")[2] for site in shapes} | ({group(site) for site in shapes} - {""})
        raise ConfigError(
            f"{who}: {idle[0]!r} decides no adapted module's rank; {suggest(idle[0], known)}; remove it, or adapt such "
            "modules too (adapter.targets)"
        )
    return {site: table[keys[site]] for site in shapes}


def group(site: str) -> str:
    """Return the group that a module belongs to by its path, attention or mlp, or ''."""
    return next((name for name, path in PATHS.items() if re.search(path, site, re.IGNORECASE)), "")


def adapter_numbers(shapes: Shapes, ranks: Ranks) -> int:
    """Return how many numbers an adapter of these ranks has: the sum of r (d_in + d_out)."""
    return sum(rank * sum(shapes[site]) for site, rank in ranks.items())


def memory_need(shapes: Shapes, ranks: Ranks, base_bytes: int = 0, activation_bytes: int = 0) -> int:
    """Return an estimate of the bytes that a client needs to train: the frozen base, its adapter, its activations.

    A number of the adapter takes 16: itself, its gradient and AdamW's two moments, in float32.
    """
    from sheepfold.memory import BYTES_PER_NUMBER  # brings torch, which reading an experiment does without

    return base_bytes + BYTES_PER_NUMBER * adapter_numbers(shapes, ranks) + activation_bytes


def mixed(ranks: Mapping[str, Ranks]) -> bool:
    """Return whether any two clients have different ranks."""
    types = list({id(own): own for own in ranks.values()}.values())
    return any(own != types[0] for own in types)


def _handed_out(values: Mapping[str, T] | tuple[T, ...], clients: Sequence[str]) -> dict[str, T]:
    """Return what each client gets: from a tuple in client order, from a mapping by name, else its default."""
    if isinstance(values, tuple):
        if len(values) > max(len(clients), 1):
            raise ConfigError(
                f"adapter.ranks: a list of {len(values)} for {len(clients)} clients, which it is dealt to in their "
                "order; leave out the entries that nobody gets"
            )
        return {client: values[i % len(values)] for i, client in enumerate(clients)}
    if odd := sorted(values.keys() - {*clients, DEFAULT}):
        known = suggest(odd[0], [*clients, DEFAULT, "distribution", "by-memory"])
        raise ConfigError(textwrap.shorten(f"adapter.ranks: no client {odd[0]!r}; {known}", 300, placeholder=" ..."))
    if DEFAULT not in values and (left := [client for client in clients if client not in values]):
        raise ConfigError(
            f"adapter.ranks: nothing for {len(left)} of {len(clients)} clients, such as {left[0]!r}; name them all, or "
            "add default"
        )
    return {client: values[client if client in values else DEFAULT] for client in clients}


def _fitted(gib: Mapping[str, float], types: Sequence[Ranks], need: Callable[[Ranks], int]) -> dict[str, Ranks]:
    """Return the type of the largest need that each client's memory holds."""
    by_need = sorted(((need(ranks), i) for i, ranks in enumerate(types)), reverse=True)
    chosen = {}
    for client, declared in gib.items():
        fits = [types[i] for needed, i in by_need if needed <= declared * GIB]
        if not fits:
            raise ConfigError(
                f"adapter.ranks: client {client!r} declares {declared:g} GiB, and the smallest type needs "
                f"{by_need[-1][0] / GIB:.3g} GiB; add a smaller type, or leave the client out"
            )
        chosen[client] = fits[0]
    return chosen


def _draw(shares: Sequence[float], seed: int, client: str) -> int:
    from sheepfold.rng import stream  # brings numpy, which reading an experiment does without

    return int(stream(seed, "rank", client).choice(len(shares), p=shares))


def _key(site: str, table: Mapping[str, int]) -> str:
    """Return the key that decides a module's rank: the longest end of its path, its group, or default."""
    ends = [key for key in table if site == key or site.endswith(f".{key}")]
    own = group(site)
    return max(ends, key=len) if ends else own if own and own in table else DEFAULT


def _shown(asked: Rank) -> str:
    return str(asked) if isinstance(asked, int) else f"{{{', '.join(f'{key}: {rank}' for key, rank in asked.items())}}}"
