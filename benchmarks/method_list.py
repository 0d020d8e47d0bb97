"""What benchmarks/methods.py compares: every method with its settings, and how large the study is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Options = Mapping[str, Any]
"""Options of the experiment file by dotted key."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large the study is; in each round, `clients` clients take `steps` steps of `batch_rows` rows."""

    rounds: int = 10
    clients: int = 20
    steps: int = 4
    batch_rows: int = 2
    max_tokens: int = 128
    judged: int = 100
    """Clients judged, of those that were sampled and of those that never were."""
    answers: int = 1
    """Rows of each of them that are answered for ROUGE-L; the loss is of all their rows."""
    new_tokens: int = 24


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table; `beside` is the method that it changes, or competes with."""

    options: Options
    beside: str


TYPES = [{"attention": a, "mlp": m} for a, m in ((2, 2), (48, 48), (8, 48), (8, 8))]
"""FlexLoRA's four types at a quarter of their ranks: the base is 128 wide, its keys and values 64."""


def ranks(distribution: str) -> Options:
    """Return one of FlexLoRA's distributions over these types."""
    return {"adapter.ranks": {"distribution": distribution, "types": TYPES}}


def method(*strategy: str, beside: str = "fedit", lr: float = 5e-3, own: Options | None = None, **args: Any) -> Method:
    """Return a method by its strategies, outermost first; by default with AdamW clients of rank 8."""
    options = {"federation.strategy": list(strategy), "train.lr": lr, **(own or {})}
    return Method(options | ({"federation.strategy_args": args} if args else {}), beside)


MIXED, SGD = ranks("normal"), {"train.optimizer": "sgd"}
BASE = "base"
METHODS: Mapping[str, Method] = {
    BASE: method("fedavg"),  # no rounds: the base as it is
    "fedavg": method("fedavg", lr=1.0, own=SGD),
    "fedit": method("fedit", beside="fedavg"),
    "fedit-r2": method("fedit", own={"adapter.rank": 2}),
    "fedprox": method("fedprox", "fedit", mu=0.01),
    "scaffold": method("scaffold", "fedavg", lr=1.0, own=SGD, beside="fedavg"),
    "scaffold-adamw": method("scaffold", "fedit"),
    "fedavgm": method("fedavgm", "fedit", beta1=0.5),
    "fedadam": method("fedadam", "fedit", server_lr=1e-2),
    "fedyogi": method("fedyogi", "fedit", server_lr=1e-2),
    "fedadagrad": method("fedadagrad", "fedit", server_lr=3e-2),
    "flora": method("flora"),
    "flora-mixed": method("flora", own=MIXED, beside="flora"),
    "fedex": method("fedex"),
    "flexlora": method("flexlora", own=MIXED, beside="fedit-r2"),
    "flexlora-heavy_tail": method("flexlora", own=ranks("heavy_tail"), beside="fedit-r2"),
    "flexlora-homo": method("flexlora", own=ranks("homo"), beside="fedit-r2"),
    "hetlora": method("hetlora", own=MIXED, beside="flexlora"),
    "heterolora": method("heterolora", own=MIXED, beside="flexlora"),
    "heterolora-raw": method("heterolora", own=MIXED, beside="heterolora", handle_alpha=False),
    "ffa_lora": method("ffa_lora", lr=1e-2),
    "rolora": method("rolora", lr=1e-2),
    "fedsa": method("fedsa"),
    "fed_sb-gradient": method("fed_sb", lr=3e-3, own={"adapter.rank": 48}, start="gradient"),
    "fed_sb-base": method("fed_sb", lr=1e-2, own={"adapter.rank": 48}, start="base", beside="fed_sb-gradient"),
    "slora": method("slora", "fedit", stage_rounds=3),
    "slora+flexlora": method("slora", "flexlora", own=MIXED, beside="flexlora", stage_rounds=3),
    "fedprox+flexlora": method("fedprox", "flexlora", own=MIXED, beside="flexlora", mu=0.01),
    "ditto": method("fedit", own={"personal.ditto": 0.1}),
    "full": method("fedavg", lr=3e-4, own={"adapter.method": "full", "train.engine": "peft_model"}),
}
FULL, QUICK = Size(), Size(rounds=5, judged=60)
QUICK_METHODS = (
    BASE, "fedavg", "fedit", "scaffold", "fedadam", "flora", "fedex", "flexlora", "heterolora", "ffa_lora", "fedsa",
    "slora",
)  # fmt: skip


def settings(name: str, seed: int, size: Size) -> dict[str, Any]:
    """Return the experiment of a method and a seed, all but where data and base are."""
    return {
        "seed": seed,
        "adapter.targets": "all-linear",
        "data.split": "all",
        "data.partition": {"by": "natural", "column": "client"},
        "data.eval_share": 0.0,
        "data.template": "alpaca_short",
        "data.max_tokens": size.max_tokens,
        "data.cut": "left",  # a long row keeps its answer, so every client has rows to train and to judge on
        "train.steps": size.steps,
        "train.batch_rows": size.batch_rows,
        "federation.rounds": size.rounds,
        "federation.clients_per_round": size.clients,
        "evaluation.metrics": ["rouge_l"],
        "evaluation.generation": {"max_new_tokens": size.new_tokens},
        **METHODS[name].options,
    }


def in_words(name: str) -> str:
    """Return a method's own settings in a few words."""
    options = dict(METHODS[name].options)
    if name == BASE:
        return "untrained"
    words = [" + ".join(options.pop("federation.strategy")), options.pop("train.optimizer", "adamw")]
    words[-1] += f" {options.pop('train.lr'):g}"
    words += [f"{key} {value}" for key, value in options.pop("federation.strategy_args", {}).items()]
    if choice := options.pop("adapter.ranks", None):
        words.append(f"ranks {choice['distribution']}")
    return ", ".join(words + [f"{key.rpartition('.')[2]} {value}" for key, value in options.items()])
