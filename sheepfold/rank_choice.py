"""What `adapter.ranks` can say, and what each way of saying it means.

    16                                one rank for everybody, as adapter.rank says it
    {attention: 30, mlp: 200}         one rank for each group of modules, for everybody
    [4, 8, 16]                        dealt to the clients in their order, and again from the start
    {ward-1: 4, default: 8}           by client
    heavy_tail                        drawn for each client from FlexLoRA's four types
    {distribution: normal, types: [2, 8, 48]}                     drawn from types of your own; shares do as well:
    {distribution: [0.5, 0.3, 0.2], types: [2, 8, 48]}
    {by-memory: {ward-1: 4, default: 6}, types: [2, 8, 48]}       the largest type that fits the GiB a client declares

In a list, beside a client and among types, a rank is a number or a mapping: `attention`, `mlp`, a module's name
(q_proj, or a longer end of its path, which goes before its group) and `default` for the rest.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sheepfold.errors import suggest

T = TypeVar("T")
Rank = int | Mapping[str, int]

DEFAULT = "default"
GROUPS = ("attention", "mlp")

FLEXLORA_TYPES: tuple[Rank, ...] = (
    {"attention": 8, "mlp": 8},
    {"attention": 200, "mlp": 200},
    {"attention": 30, "mlp": 200},
    {"attention": 30, "mlp": 30},
)
"""FlexLoRA's Type_0 to Type_3, as its main.py numbers them; in order of size 8/8 < 30/30 < 30/200 < 200/200."""


def evenly(types: int) -> tuple[float, ...]:
    """Return equal shares."""
    return (1 / types,) * types


def mostly(share: float, place: int, types: int) -> tuple[float, ...]:
    """Return `share` at one place, 0 or -1, and the rest in equal parts; all of it where there is one type."""
    shares = [(1 - share) / max(types - 1, 1)] * types
    shares[place] = share if types > 1 else 1.0
    return tuple(shares)


def normal(types: int) -> tuple[float, ...]:
    """Return the density N(1.5, 0.7) at the places 0..3, normalised; another number of types is spread over 0..3."""
    places = [3 * i / max(types - 1, 1) for i in range(types)]
    density = [math.exp(-(((place - 1.5) / 0.7) ** 2) / 2) for place in places]
    return tuple(d / sum(density) for d in density)


BY_SIZE: Mapping[str, Callable[[int], tuple[float, ...]]] = {
    "homo": partial(mostly, 1.0, 0),
    "random": evenly,
    "heavy_tail": partial(mostly, 0.85, 0),
    "heavy_tail_strong": partial(mostly, 0.85, -1),
    "normal": normal,
}
"""Distribution -> the shares of the types, from the smallest to the largest, for any number of types.

Source: FlexLoRA's README. Its homo is the baseline, rank 8 for all. Its normal comes without numbers: N(1.5, 0.7) is
its code's, which lists the types as 0 3 2 1, in order of size.
"""
BY_NUMBER: Mapping[str, tuple[float, ...]] = {
    "heavy_tail@release": (0.80, 0.10, 0.05, 0.05),
    "heavy_tail_strong@release": (0.05, 0.80, 0.10, 0.05),
    "normal@release": normal(4),
}
"""Distribution -> the shares of Type_0 to Type_3, or of four types of your own as they are listed.

Source: get_peft in FlexLoRA's main.py, which has 80 % where the README has 85 %, and takes the normal density at the
type's number, so that the two largest types get 44 % each.
"""


@dataclass(frozen=True, slots=True)
class Given:
    """Ranks that are said outright."""

    ranks: Mapping[str, Rank] | tuple[Rank, ...]
    """By client, or to deal."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A type drawn for each client."""

    law: str | tuple[float, ...]
    """A distribution's name, or the shares of the types as they are listed."""
    types: tuple[Rank, ...] = FLEXLORA_TYPES

    @property
    def shares(self) -> tuple[float, ...]:
        """How likely each type is, in order of size for the distributions of BY_SIZE."""
        if isinstance(self.law, str):
            return BY_SIZE[self.law](len(self.types)) if self.law in BY_SIZE else BY_NUMBER[self.law]
        return tuple(share / sum(self.law) for share in self.law)


@dataclass(frozen=True, slots=True)
class Fitted:
    """The largest type that a client's memory holds."""

    gib: Mapping[str, float] | tuple[float, ...]
    """What clients declare: by client, or to deal."""
    types: tuple[Rank, ...] = FLEXLORA_TYPES


def validate(choice: Any) -> Any:
    """Return the choice with its lists as tuples and its clients' names as text; raise ValueError for what is wrong.

    The error is for pydantic, which makes it the experiment file's one line. Only the choice itself is looked at: what
    has to do with clients and modules is for `client_ranks` to find.
    """
    if choice is not None:
        parse(choice)
    return _plain(choice)


def may_mix(choice: Any) -> bool:
    """Return whether a choice can give two clients different ranks, as far as it says without clients and modules."""
    if choice is None:
        return False
    form = parse(choice)
    if isinstance(form, Fitted):
        return _distinct(form.types) > 1 and len(set(_values(form.gib))) > 1
    if isinstance(form, Given):
        return _distinct(_values(form.ranks)) > 1
    return _distinct(one for one, share in zip(form.types, form.shares, strict=True) if share) > 1


def parse(choice: Any) -> Given | Drawn | Fitted:
    """Return what the choice asks for, or raise ValueError with what was found and what was expected."""
    choice = _plain(choice)
    if isinstance(choice, str):
        return Drawn(_law(choice, FLEXLORA_TYPES))
    if isinstance(choice, tuple):
        return Given(_each(choice, _rank, ""))
    if not isinstance(choice, Mapping) or (choice.keys() & GROUPS and choice.keys() <= {*GROUPS, DEFAULT}):
        return Given((_rank(choice, ""),))
    form = next((key for key in ("distribution", "by-memory") if key in choice), None)
    if form is None and "types" in choice:
        raise ValueError("types are for distribution and by-memory; found neither")
    if form is None:
        return Given(_each(choice, _rank, ""))
    if odd := [str(key) for key in choice if key not in (form, "types")]:
        raise ValueError(f"unknown key {odd[0]!r} beside {form}; {suggest(odd[0], ['types'])}")
    types = _each(choice["types"], _rank, "types: ") if "types" in choice else FLEXLORA_TYPES
    if not isinstance(types, tuple):
        raise ValueError(f"types: found {choice['types']!r}; expected a list")
    if form == "by-memory":
        return Fitted(_each(choice[form], _gib, "by-memory: "), types)
    return Drawn(_law(choice[form], types), types)


def _plain(value: Any) -> Any:
    """Return the value with tuples for lists; a client may be named by a number, which YAML does not read as text."""
    if isinstance(value, Mapping):
        return {str(name) if type(name) is int else name: _plain(inner) for name, inner in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _each(values: Any, read: Callable[[Any, str], T], where: str) -> dict[str, T] | tuple[T, ...]:
    if not isinstance(values, tuple | Mapping) or not values:
        raise ValueError(f"{where}found {values!r}; expected a list, or a mapping from client, of one entry or more")
    if isinstance(values, tuple):
        return tuple(read(value, where) for value in values)
    if odd := [name for name in values if not isinstance(name, str)]:
        raise ValueError(f"{where}found the name {odd[0]!r}; expected text, so put it in quotes")
    return {name: read(value, f"{where}{name}: ") for name, value in values.items()}


def _rank(value: Any, where: str) -> Rank:
    if not isinstance(value, Mapping):
        if type(value) is not int or value < 1:
            raise ValueError(f"{where}found {value!r}; expected a rank of 1 or more, or a mapping from module groups")
        return value
    for name, rank in value.items():
        if type(rank) is not int or rank < 1 or not isinstance(name, str):
            raise ValueError(f"{where}found {name}: {rank!r}; expected a group or module and its rank of 1 or more")
    if not value:
        raise ValueError(f"{where}found an empty mapping; expected ranks such as {{attention: 30, mlp: 200}}")
    return dict(value)


def _gib(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{where}found {value!r}; expected GiB of memory, above 0")
    return float(value)


def _law(law: Any, types: Sequence[Rank]) -> str | tuple[float, ...]:
    """Return the distribution's name or shares, checked against the types."""
    if law == "by-memory":
        raise ValueError("by-memory needs what clients declare, such as {by-memory: {ward-1: 4, default: 6}} in GiB")
    if isinstance(law, str):
        if law not in BY_SIZE and law not in BY_NUMBER:
            raise ValueError(f"no distribution {law!r}; {suggest(law, [*BY_SIZE, *BY_NUMBER])}")
        if law in BY_NUMBER and len(types) != len(BY_NUMBER[law]):
            raise ValueError(f"{law} is over four types, found {len(types)}; {law.partition('@')[0]} takes any number")
        return law
    if not isinstance(law, tuple) or any(type(share) not in (int, float) or not 0 <= share <= 1 for share in law):
        raise ValueError(f"distribution: found {law!r}; expected a name, or shares such as [0.5, 0.3, 0.2]")
    if len(law) != len(types):
        raise ValueError(f"distribution: found {len(law)} shares and {len(types)} types; give each type its share")
    if abs(sum(law) - 1) > 1e-6:
        raise ValueError(f"distribution: the shares sum to {sum(law):.6g}; expected 1")
    return law


def _values(values: Mapping[str, T] | tuple[T, ...]) -> Iterable[T]:
    return values.values() if isinstance(values, Mapping) else values


def _frozen(asked: Rank) -> Any:
    return asked if isinstance(asked, int) else tuple(sorted(asked.items()))


def _distinct(ranks: Iterable[Rank]) -> int:
    return len({_frozen(asked) for asked in ranks})
