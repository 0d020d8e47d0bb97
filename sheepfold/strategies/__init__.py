"""Strategies: one method a file, both halves: what clients do, and how the server folds.

`federation.strategy` names one, or a list of them, outermost first: those of AROUND change a method, and the last one
says how updates fold. [fedprox, flexlora] is FlexLoRA with FedProx clients; fedadam alone is [fedadam, fedavg].
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sheepfold.config import FederationSettings
from sheepfold.errors import ConfigError, suggest
from sheepfold.local.rules import LocalRule, together
from sheepfold.plugins import find
from sheepfold.strategies.base import Strategy
from sheepfold.strategies.fed_sb import fed_sb
from sheepfold.strategies.fedavg import fedavg, fedit
from sheepfold.strategies.fedex import fedex
from sheepfold.strategies.fedkd import fedkd
from sheepfold.strategies.fedkseed import fedkseed
from sheepfold.strategies.fedopt import fedadagrad, fedadam, fedavgm, fedopt, fedyogi
from sheepfold.strategies.fedprox import fedprox
from sheepfold.strategies.fedsa import fedsa
from sheepfold.strategies.ffa_lora import ffa_lora
from sheepfold.strategies.flexlora import flexlora
from sheepfold.strategies.flora import flora
from sheepfold.strategies.heterolora import heterolora
from sheepfold.strategies.hetlora import hetlora
from sheepfold.strategies.rolora import rolora
from sheepfold.strategies.scaffold import scaffold
from sheepfold.strategies.slora import slora

FOLDS: Mapping[str, Callable[..., Strategy]] = {
    "fedavg": fedavg,
    "fedit": fedit,
    "flora": flora,
    "fedex": fedex,
    "flexlora": flexlora,
    "hetlora": hetlora,
    "heterolora": heterolora,
    "ffa_lora": ffa_lora,
    "rolora": rolora,
    "fedsa": fedsa,
    "fed_sb": fed_sb,
    "fedkseed": fedkseed,
}
"""Methods by themselves: they take `weights`, where they weigh clients, and arguments of their own."""

AROUND: Mapping[str, Callable[..., Strategy]] = {
    "fedprox": fedprox,
    "scaffold": scaffold,
    "fedopt": fedopt,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
    "slora": slora,
    "fedkd": fedkd,
}
"""Methods that change another one, their first argument."""

KEY = "federation.strategy"


def strategy(settings: FederationSettings, local: LocalRule | None = None) -> Strategy:
    """Return the strategy of the settings, by name or `module:function`, with a further local rule where one is given.

    Raises ConfigError for unknown names, arguments that no part takes or two parts take, and parts that do not go
    together.
    """
    names = (settings.strategy,) if isinstance(settings.strategy, str) else settings.strategy
    if names[-1] in AROUND:
        names = (*names, "fedavg")
    parts = [find({**FOLDS, **AROUND} if last else AROUND, name, KEY) for name, last in _places(names)]
    arguments = _dealt(names, parts, settings)
    made = _made(names[-1], parts[-1](**arguments[-1]))
    for name, part, own in reversed(list(zip(names[:-1], parts[:-1], arguments[:-1], strict=True))):
        made = _made(name, part(made, **own))
    return replace(made, local=together(made.local, local) if made.local and local else made.local or local)


def _places(names: tuple[str, ...]) -> list[tuple[str, bool]]:
    for name in names[:-1]:
        if name in FOLDS:
            raise ConfigError(f"{KEY}: {name} says how updates fold, so it comes last; found {', '.join(names)}")
        if names.count(name) > 1:
            raise ConfigError(f"{KEY}: {name} is there twice; found {', '.join(names)}")
    return [(name, i == len(names) - 1) for i, name in enumerate(names)]


def _dealt(
    names: tuple[str, ...], parts: list[Callable[..., Strategy]], settings: FederationSettings
) -> list[dict[str, Any]]:
    """Return each part's own arguments: every one of strategy_args goes to the part that takes it.

    A section named as a method is that method's alone, and waits while another one runs; its keys are looked at.
    """
    taken = [list(inspect.signature(part).parameters)[0 if part is parts[-1] else 1 :] for part in parts]
    dealt: list[dict[str, Any]] = [{} for _ in parts]
    for name, value in settings.strategy_args.items():
        if name in {*names, *FOLDS, *AROUND} and isinstance(value, Mapping):
            if name not in names:
                _check_section(name, value, _own(name), {})  # it waits: one changed line compares two methods
                continue
            home = names.index(name)
            ours = name in FOLDS or name in AROUND  # what an own method takes is seen where it is called
            _check_section(name, value, taken[home] if ours else list(value), dealt[home])
            dealt[home] |= value
            continue
        homes = [i for i, own in enumerate(taken) if name in own and name != "weights"]
        if len(homes) != 1:
            known = sorted({n for own in taken for n in own if n != "weights"})
            hint = suggest(name, known) if known else "there are none"
            if homes:
                raise ConfigError(
                    f"{KEY}_args.{name}: {' and '.join(names[i] for i in homes)} take it; say whose, as in "
                    f"{names[homes[0]]}: {{{name}: {value}}}"
                )
            raise ConfigError(f"{KEY}_args.{name}: no argument of {', '.join(names)}; {hint}")
        if name in dealt[homes[0]]:
            _check_section(names[homes[0]], {name: value}, taken[homes[0]], dealt[homes[0]])
        dealt[homes[0]][name] = value
    if settings.weights != "auto":
        if "weights" not in taken[-1]:
            raise ConfigError(f"federation.weights {settings.weights}: {names[-1]} has its own weights; set it to auto")
        dealt[-1]["weights"] = settings.weights
    elif (theirs := inspect.signature(parts[-1]).parameters.get("weights")) and theirs.default is theirs.empty:
        dealt[-1]["weights"] = "rows"
    for name, part, own in zip(names, parts, dealt, strict=True):
        try:
            inspect.signature(part).bind(*([None] if part is not parts[-1] else []), **own)
        except TypeError as error:
            raise ConfigError(f"{KEY} {name!r}: {error}; it takes {inspect.signature(part)}") from None
    return dealt


def _own(name: str) -> list[str]:
    """Return what a method takes, without the method that it changes."""
    skip = 1 if name in AROUND else 0
    return list(inspect.signature({**FOLDS, **AROUND}[name]).parameters)[skip:]


def _check_section(name: str, section: Mapping[str, Any], own: list[str], given: Mapping[str, Any]) -> None:
    """Raise ConfigError for what the method does not take, or has been given already."""
    known = [argument for argument in own if argument != "weights"]
    for key in section:
        if key not in known:
            hint = suggest(key, known) if known else "it takes none"
            raise ConfigError(f"{KEY}_args.{name}.{key}: no argument of {name}; {hint}")
        if key in given:
            raise ConfigError(f"{KEY}_args.{key}: there by itself and in the section of {name}; keep one of them")


def _made(name: str, made: Any) -> Strategy:
    if not isinstance(made, Strategy):
        raise ConfigError(f"{KEY} {name}: returned a {type(made).__name__}, expected a Strategy")
    return made
