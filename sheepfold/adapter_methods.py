"""Names of adapter methods: ours, PEFT's, FederatedScope-LLM's, and the argument lists that it gives them.

prefix ─▶ prefix_tuning · p-tuning ─▶ p_tuning · prompt ─▶ prompt_tuning · rslora ─▶ lora with alpha * sqrt(rank)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sheepfold.errors import suggest

SHORT = {"prefix": "prefix_tuning", "ptuning": "p_tuning", "prompt": "prompt_tuning"}
"""Short name -> PEFT's."""
SOFT = ("prefix_tuning", "p_tuning", "prompt_tuning", "cartridge")
"""Methods whose virtual tokens take positions before a row's own."""
CACHED = ("prefix_tuning", "cartridge")
"""Those among them that act through the attention cache."""
RANKED = ("lora", "dora")
"""Methods that adapter.rank, alpha, dropout and targets are for."""
SEEDS = "seeds"
"""All weights, as sums of random directions: no method of PEFT's."""
OVER_QUANTISED = ("lora", "dora", "ia3", "vera", "pvera", "randlora", "road", "oft", "ln_tuning", *SOFT)
"""Methods that leave a base's weights alone, or that PEFT writes for quantised ones: others would take codes for
weights, some of them in silence (HRA over 8 bits)."""
WHOLE = ("full", SEEDS)
"""Methods whose result is a whole model."""
MOST_CANDIDATES = 1_000_000
_LORA = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}


def method_name(name: str) -> str:
    """Return PEFT's spelling of a method's name, in lower case."""
    plain = name.strip().lower().replace("-", "_")
    return SHORT.get(plain, plain)


def settled(values: Any) -> Any:
    """Return the adapter section with PEFT's name for its method; what is no mapping comes back as it is.

    An argument list of FederatedScope-LLM (`[{adapter_method: prefix, num_virtual_tokens: 20}]`) becomes such a
    section. rslora becomes LoRA whose alpha is sqrt(rank) times as large: alpha / sqrt(r) = alpha * sqrt(r) / r
    (rsLoRA, arXiv:2312.03732, definition 3.2), so that every method and engine that knows LoRA knows it. Raises
    ValueError for lists, packages and combinations that mean nothing here.
    """
    if isinstance(values, list | tuple):
        if len(values) != 1 or not isinstance(values[0], Mapping):
            raise ValueError("expected a section, or FederatedScope-LLM's list of one mapping with adapter_method")
        values = values[0]
    if not isinstance(values, Mapping):
        return values
    if "adapter_method" in values:
        values = _of_list(values)
    if not isinstance(values.get("method", "lora"), str):
        return values
    named = {**values, "method": method_name(values.get("method", "lora"))}
    return _stabilised(named) if named["method"] == "rslora" else named


def _of_list(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section that FederatedScope-LLM's arguments stand for."""
    package = values.get("adapter_package", "peft")
    if package != "peft":
        raise ValueError(f"adapter_package {package!r}: only peft is there")
    method = values["adapter_method"]
    own = {key: value for key, value in values.items() if key not in ("adapter_package", "adapter_method")}
    if isinstance(method, str) and method_name(method) in (*RANKED, "rslora"):
        return {"method": method, **{_LORA.get(key, key): value for key, value in own.items()}}
    return {"method": method, "options": own}


def _stabilised(values: dict[str, Any]) -> dict[str, Any]:
    for other in ("ranks", "start"):
        if values.get(other) is not None:
            raise ValueError(
                f"method 'rslora' and {other} are both set: rslora scales by one rank; use lora, scaled by alpha / rank"
            )
    try:
        rank, alpha = int(values.get("rank", 8)), float(values.get("alpha", 16.0))
    except (TypeError, ValueError):
        return {**values, "method": "lora"}  # the section's own checks say what is wrong with them
    return {**values, "method": "lora", "alpha": alpha * math.sqrt(rank) if rank > 0 else alpha}


def check_soft(method: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError where a method with virtual tokens is not told how many."""
    if method not in SOFT:
        return
    tokens = options.get("num_virtual_tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        found = "is not set" if tokens is None else f"is {tokens!r}"
        raise ValueError(f"options.num_virtual_tokens {found}; {method} needs a number of tokens, such as 20")


def engine(method: str) -> str:
    """Return the train.engine that `auto` stands for."""
    return {"lora": "cohort", SEEDS: "zeroth_order"}.get(method, "peft_model")


@dataclass(frozen=True, slots=True)
class SeedOptions:
    """adapter.options of method seeds."""

    candidates: int = 4096
    """Directions of the whole run."""
    eps: float = 5e-4
    """How far a step looks along its direction, on both sides."""


def seed_options(options: Mapping[str, Any]) -> SeedOptions:
    """Return the options of method seeds. Raises ValueError for ones that are not there, or mean nothing."""
    known = SeedOptions.__dataclass_fields__
    if odd := next((name for name in options if name not in known), None):
        raise ValueError(f"options.{odd}: method seeds has none; {suggest(str(odd), known)}")
    read = SeedOptions(**options)
    if type(read.candidates) is not int or not 1 <= read.candidates <= MOST_CANDIDATES:
        raise ValueError(f"options.candidates: found {read.candidates!r}; expected 1 to {MOST_CANDIDATES:,}")
    if type(read.eps) not in (int, float) or not 0 < read.eps < math.inf:
        raise ValueError(f"options.eps: found {read.eps!r}; expected a number above 0")
    return read


def virtual_tokens(method: str, options: Mapping[str, Any]) -> int:
    """Return how many positions a method takes before a row's own."""
    return int(options["num_virtual_tokens"]) if method in SOFT else 0
