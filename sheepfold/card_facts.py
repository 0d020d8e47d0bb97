"""What a model card's tables hold: what was asked (the experiment) and what came of it (the run's folder)."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheepfold.display import size
from sheepfold.report.benchmarks import read_benchmarks

if TYPE_CHECKING:
    from sheepfold.config import Experiment
    from sheepfold.journal import RunFolder
    from sheepfold.offsite.settings import OffsiteSettings

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headings, and rows as wide."""
WHO = ("base", "local", "federated", "personal", "centralised")


def asked(experiment: "Experiment") -> dict[str, Table]:
    """Return the training's settings; clients that are named there are counted instead."""
    adapter, train, federation = experiment.adapter, experiment.train, experiment.federation
    amount = f"{train.epochs or 1} epochs" if train.steps is None else f"{train.steps} steps"
    limits = [f"weight decay {train.weight_decay:g}", f"gradient norm {train.grad_norm or 'unbounded'}"]
    rows = [
        ("strategy", _named(_words(federation.strategy), federation.strategy_args)),
        ("weights in the fold", _weights(experiment)),
        *([("base", f"quantised to {bits} bits while clients trained")] if (bits := experiment.model.bits) else []),
        ("adapter", _lora(experiment)),
        ("targets", _words(adapter.targets)),
        *([("offsite-tuning", _offsite(experiment.offsite))] if experiment.offsite else []),
        ("a client's round", f"{amount} of {train.batch_rows} rows"),
        ("optimizer", f"{_named(train.optimizer, train.optimizer_args)}, {', '.join(limits)}"),
        ("learning rate", f"{train.lr:g}, {train.schedule} in a round, {train.round_schedule} over rounds"),
        *([("local rule", _named(train.local_rule, train.local_rule_args))] if train.local_rule else []),
        ("prompt template", f"{experiment.data.template}, at most {experiment.data.max_tokens} tokens"),
        ("seed", str(experiment.seed)),
    ]
    return {"Training": (("", ""), rows)}


def _weights(experiment: "Experiment") -> str:
    from sheepfold.strategies import strategy

    federation = experiment.federation
    if any(":" in name for name in _words(federation.strategy).split(", ")):  # own code, which may not be at hand now
        return federation.weights
    return strategy(federation).weights


def _lora(experiment: "Experiment") -> str:
    adapter = experiment.adapter
    if adapter.method != "lora":
        return _named(adapter.method, adapter.options)
    if adapter.start:
        return f"LoRA, from {Path(adapter.start).name}"
    ranks = adapter.ranks
    rank = f"rank {adapter.rank}" if ranks is None else "own ranks" if isinstance(ranks, Mapping) else f"ranks {ranks}"
    return f"LoRA, {rank}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g}"


def _offsite(offsite: "OffsiteSettings") -> str:
    ends = f"layers below {max(offsite.emu_l, 1)} and from {offsite.emu_r} on (at least the last)"
    aligned = ", aligned" if offsite.align else ""
    return f"{_words(offsite.train)} of {ends}; clients had an emulator, drop ratio {offsite.drop_ratio:g}{aligned}"


def _words(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def _named(name: str, arguments: Mapping[str, Any]) -> str:
    return name + (f" ({', '.join(f'{k} {v}' for k, v in arguments.items())})" if arguments else "")


def measured(run: "RunFolder", lines: Sequence[Mapping[str, Any]], round: int) -> dict[str, Table]:
    """Return what the run's folder holds as of a round: losses, closing means, benchmarks, data, bytes, origin."""
    upto = [line for line in lines if line["round"] <= round]
    tables = {f"Held-out loss{whose} (nats per token)": _losses(upto, key) for key, whose in _judged(upto).items()}
    if (run.path / "closing.json").is_file():
        tables["Closing table (means)"] = _closing(_json(run.path / "closing.json"))
    if benchmarks := list(_benchmarks(run.path)):
        tables["Benchmarks"] = (("task", "measure", "value", "adapter"), benchmarks)
    return tables | {"Data and clients": _data(run, upto), "Origin": _origin(run, upto[-1])}


def _judged(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return which evaluations the journal holds, and whose they are."""
    both = any("held_out_full" in line for line in lines)
    return {"held_out_full": " of the full model", "held_out": " of its emulator"} if both else {"held_out": ""}


def _losses(lines: Sequence[Mapping[str, Any]], key: str) -> Table:
    judged = [line for line in lines if key in line]
    first, last = judged[0], judged[-1]
    start, end = first[key]["loss"], last[key]["loss"]
    rows = [(key.replace("_", " "), _figure(start.get(key)), _figure(end.get(key))) for key in start | end]
    return ("", "start", f"round {last['round']}"), rows


def _closing(closing: Mapping[str, Any]) -> Table:
    means = closing_means(closing)
    found = [w for w in WHO if any(w in row for row in means.values())]
    lines = [
        (f"{measure}, {rows.replace('_', ' ')}", *(_figure(row.get(w)) for w in found))
        for (measure, rows), row in means.items()
    ]
    return ("", *found), lines


def closing_means(closing: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """Return (measure, rows) -> who -> the mean over clients, where rows are own_rows or everybodys.

    On everybody's rows `local` is the mean over the clients' lone adapters.
    """
    means: dict[tuple[str, str], dict[str, float]] = {}
    for measure, scores in closing["scores"].items():
        shared = scores.get("shared", {})
        own = [who for name, who in scores.items() if name != "shared"]
        alone = [v for name, v in shared.items() if name.startswith("local:")]
        everybodys = {w: [shared[w]] for w in WHO if w in shared} | {"local": alone}
        for rows, values in (("own_rows", {w: [s[w] for s in own if w in s] for w in WHO}), ("everybodys", everybodys)):
            found = {w: m for w, each in values.items() if (m := _mean(each)) is not None}
            means |= {(measure, rows): found} if found else {}
    return means


def _mean(values: Iterable[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _benchmarks(folder: Path) -> Iterable[tuple[str, str, str, str]]:
    """Yield (task, measure, value, adapter) of every result in the run's folder, but of clients' own adapters.

    The parts of a task, as MMLU's subjects, stand in the report; a file that holds no results is a problem there.
    """
    for found in read_benchmarks(folder / "eval"):
        if found.value is not None and not found.inside and not found.subject.startswith("client:"):
            yield found.task, found.measure, _figure(found.value), found.subject or "not stated"


def _data(run: "RunFolder", lines: Sequence[Mapping[str, Any]]) -> Table:
    data = run.data()
    cohorts = [len(line["cohort"]) for line in lines if "cohort" in line] or [0]
    took_part = {client for line in lines for client in line.get("clients", {})}
    kinds = {kind: sum(c[kind] for c in data["clients"].values()) for kind in ("train", "eval", "test")}
    most = f"{min(cohorts)}" if min(cohorts) == max(cohorts) else f"{min(cohorts)}-{max(cohorts)}"
    settings = run.experiment().data
    rows = [
        ("source", Path(settings.source).name if Path(settings.source).is_absolute() else settings.source),
        ("clients", f"{len(data['clients']):,}, {len(took_part):,} of them took part"),
        ("clients a round", most),
        ("rows", ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)),
        ("partition", f"{Path(settings.partition.by).name}, seed {settings.partition.seed}"),
        *_traffic(lines, len(took_part)),
    ]
    return ("", ""), rows


def _traffic(lines: Sequence[Mapping[str, Any]], clients: int) -> Iterable[tuple[str, str]]:
    for what, key in (("sent up", "uplink_bytes"), ("sent down", "downlink_bytes")):
        total = sum(line.get(key, 0) for line in lines)
        each = f", {size(total / clients)} a client that took part" if clients else ""
        yield what, f"{size(total)} ({total:,} bytes){each}"


def _origin(run: "RunFolder", last: Mapping[str, Any]) -> Table:
    experiment, data = run.experiment(), run.data()
    rows = [
        ("base", f"{experiment.model.base}, revision {experiment.model.revision or 'not fixed'}"),
        ("base fingerprint", data["base"]),
        ("data fingerprint", data["fingerprint"]),
        ("experiment (sha256 of experiment.yaml)", config_hash(run)),
        (f"adapter in the journal, round {last['round']}", last["adapter"]),
    ]
    return ("", ""), rows


def config_hash(run: "RunFolder") -> str:
    """Return the sha256 of the resolved experiment: experiment.yaml, to the byte."""
    return hashlib.sha256((run.path / "experiment.yaml").read_bytes()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}
