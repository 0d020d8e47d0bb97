"""What a reader should know before asking: what is loaded, and questions worth asking."""

from typing import TYPE_CHECKING

from sheepfold.data.rows import Record

if TYPE_CHECKING:
    from sheepfold.answering.model import Answering
    from sheepfold.answering.source import Source


def loaded(answering: "Answering") -> str:
    """Return in one line what answers: base, adapters, rounds, device."""
    source, base = answering.source, answering.base
    own = [name for name in source.names if name.startswith("client:")]
    others = [name for name in source.names if name != "base" and name not in own]
    adapters = others + ([f"{len(own)} of clients' own"] if own else [])
    parts = [f"base {source.model.base}", f"adapters: {', '.join(adapters)}" if adapters else "no adapter"]
    if source.run is not None:
        experiment, rounds = source.run.experiment(), source.rounds or 0
        named = experiment.federation.strategy
        method = named if isinstance(named, str) else "+".join(named)
        parts.append(f"{rounds} round{'' if rounds == 1 else 's'} of {method}")
    return " · ".join([*parts, f"{base.device}, {str(base.model.dtype).removeprefix('torch.')}"])


def examples(source: "Source", most: int = 8) -> list[Record]:
    """Return held-out rows of the run's data, of as many categories as there are; [] where that would mean work.

    Only the built-in corpus is at hand without reading files or a hub.
    """
    if source.run is None or source.data.source != "corpus":
        return []
    from sheepfold.data.prepare import partition_only

    data = partition_only(source.data)
    held = list(data.holdout) or [row for rows in data.clients.values() for row in rows.eval]
    first: dict[str, Record] = {}
    for row in held:
        record = data.records[int(row)]
        first.setdefault(record.category, record)
    return list(first.values())[:most]
