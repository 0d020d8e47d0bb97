"""Named sets, hub ids, files and own functions in; records with one meaning for every field out.

    source ── files.py ──▶ rows as written ── field map ──▶ [Record]

null, absent and blank `input` all mean "no input" (""). A row without an answer cannot be learned from: it is left out
and counted, never turned into the word None.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sheepfold import plugins
from sheepfold.config import DataSettings
from sheepfold.data import files
from sheepfold.data.files import Chunk
from sheepfold.data.glue import GLUE, HUB, REGRESSION, GlueTask, labelled
from sheepfold.data.records import COLUMNS, Columns, record
from sheepfold.data.rows import Record
from sheepfold.errors import ConfigError, DataError, suggest
from sheepfold.rng import stream

CORPUS_ROWS = 2_000
"""Rows of the built-in corpus where data.rows says nothing."""


@dataclass(frozen=True, slots=True)
class Named:
    """A set that is known by name."""

    hub: str
    """Hub id, or the address of its file."""
    columns: Columns = field(default_factory=dict)
    """Where it keeps its fields, if not under the usual names."""
    tidy: Callable[[Record], Record | str] = lambda record: record
    """What its loader does to a record; a text is the reason why it cannot be used."""
    every_split: bool = False
    """Whether train, eval and test are read together."""
    header: tuple[str, ...] = ()
    """The columns of its tables, where these have no header line."""
    labels: tuple[str, ...] = ()
    """Its labels in the order of their numbers, where it is a classification set."""
    measures: tuple[str, ...] = ()
    """What classifiers of it are scored by, beside accuracy."""


def _answer_is(record: Record) -> Record:
    """FS-LLM trains GSM8K with 'The answer is' where the set has '####', and looks for it in evaluation."""
    return replace(record, output=record.output.replace("####", "The answer is"))


def _language_first(record: Record) -> Record:
    """As FS-LLM does: the docstring alone does not say which language is wanted."""
    return replace(record, instruction=f"{record.category} {record.instruction}")


def _plain_spaces(record: Record) -> Record:
    """As FS-LLM does: the set is strewn with no-break spaces, which break code."""
    without = {name: getattr(record, name).replace("\u00a0", "") for name in ("instruction", "output")}
    return replace(record, **without)


def _of_glue(name: str, task: GlueTask) -> Named:
    hub, tidy = f"{HUB}:{name}", labelled(task.labels)
    return Named(hub, task.columns, tidy, header=task.header, labels=task.labels, measures=task.measures)


_GSM8K: Columns = {"instruction": ("question",), "input": (), "output": ("answer",)}
NAMED: dict[str, Named] = {
    "dolly": Named("databricks/databricks-dolly-15k", {"input": ("context",), "output": ("response",)}),
    "alpaca": Named("tatsu-lab/alpaca"),
    "alpaca-cleaned": Named("yahma/alpaca-cleaned"),
    "gsm8k": Named("openai/gsm8k:main", _GSM8K),
    "gsm8k-answer-is": Named("openai/gsm8k:main", _GSM8K, _answer_is),
    "code-alpaca": Named("sahil2801/CodeAlpaca-20k"),
    "rosetta-alpaca": Named(
        "https://raw.githubusercontent.com/sahil280114/codealpaca/d269da106a579a623a654529b3cb91b5dfa9c72f/"
        "data/rosetta_alpaca.json",
        {"category": ("input",)},  # the language
        _plain_spaces,
    ),
    "code-search-net": Named(
        "code-search-net/code_search_net:all",
        {
            "instruction": ("docstring", "func_documentation_string"),
            "input": ("language",),
            "output": ("code", "func_code_string"),
            "category": ("language",),
        },
        _language_first,
    ),
    "natural-instructions": Named(
        "Muennighoff/natural-instructions",
        {
            "instruction": ("instruction", "definition"),
            "input": ("input", "inputs", "context"),
            "output": ("output", "targets", "response"),
            "category": ("category", "task_name"),
            "client": ("client", "task_name"),
        },
        every_split=True,
    ),
    **{name: _of_glue(name, task) for name, task in GLUE.items()},
}


@dataclass(frozen=True, slots=True)
class Source:
    """The records of a source, and what its files said about each of them."""

    records: list[Record]
    numbers: np.ndarray
    """(records,) int64: each record's zero-based row number in the source as it was read"""
    splits: np.ndarray
    """(records,) str: train, eval, test, holdout or public where the source comes split, else ''"""
    names: np.ndarray
    """(records,) str: the name of the file that each record came from"""
    dropped: Mapping[str, int]
    """Rows that were left out: {reason: how many}"""


def read(data: DataSettings) -> Source:
    """Return the records that the settings name, at most `data.rows` of them, after the subsample.

    Raises ConfigError for settings that contradict each other, DataError for rows that cannot be had or understood.
    """
    _check(data)
    named = NAMED.get(data.source, Named(""))
    if data.source == "corpus":
        from sheepfold.assets import corpus

        chunks = [Chunk(corpus.rows(data.rows or CORPUS_ROWS, data.seed), "corpus", "corpus")]
    elif ":" in data.source and "/" not in data.source and not Path(data.source).exists():
        chunks = _own(data)
    else:
        chunks = _chunks(data, named)
    chunks = _with_others(chunks, data, named)
    source = _records(chunks, _columns(chunks, data, named), named.tidy)
    return _limited(_subsampled(source, data), data.rows)


def read_others(data: DataSettings) -> Source | None:
    """Return the records that no client holds, data.test_split and data.public.source alone; None where there are none.

    Raises what `read` raises.
    """
    _check(data)
    named = NAMED.get(data.source, Named(""))
    if not (chunks := _with_others([], data, named)):
        return None
    return _subsampled(_records(chunks, _columns(chunks, data, named), named.tidy), data)


def _with_others(chunks: Sequence[Chunk], data: DataSettings, named: Named) -> list[Chunk]:
    """Return the rows of the source with the test set and the public rows after them, where these are named."""
    named_here = {"test_split": (data.test_split, "holdout"), "public.source": (data.public.source, "public")}
    for key, (split, use) in named_here.items():
        if split is not None:
            chunks = [*chunks, *_other_rows(data, named, key, split, use, chunks)]
    return list(chunks)


def _check(data: DataSettings) -> None:
    if wrong := [name for name in data.fields if name not in COLUMNS]:
        raise ConfigError(f"data.fields: no field {wrong[0]!r}; {suggest(wrong[0], COLUMNS)}")
    _label_column(data)
    if data.source.lower() in REGRESSION:
        raise ConfigError(
            f"data.source {data.source!r}: STS-B asks for a number, not for a label, and classification has no place "
            f"for it; {', '.join(GLUE)} have labels"
        )
    if data.source == "corpus":
        idle_options = {"path": data.path, "fields": data.fields, "split": data.split != "train"}
        for name, idle in (idle_options | {"test_split": data.test_split, "public.source": data.public.source}).items():
            if idle:
                raise ConfigError(
                    f"data.{name} has no effect with data.source 'corpus'; remove it, or name another source"
                )
    if data.path is not None and data.source not in NAMED and not files.is_hub_id(data.source):
        raise ConfigError(
            f"data.source: no {data.source!r}, whose rows data.path would hold; {suggest(data.source, NAMED)}; or name "
            "the file itself as data.source"
        )
    if data.path is not None and Path(data.source).expanduser().exists() and data.source not in NAMED:
        raise ConfigError(f"data.path {data.path!r} has no effect with data.source {data.source!r}; keep one of them")


def _chunks(data: DataSettings, named: Named) -> list[Chunk]:
    split = _split(data, named)
    if data.path is not None:
        return files.read_path(Path(data.path).expanduser(), split, named.header)
    if named.hub.startswith("https:"):
        return files.read_url(named.hub)
    if named.hub:
        return files.read_hub(named.hub, split)
    path = Path(data.source).expanduser()
    if path.exists() or files.kind_of(path) or data.source.startswith(("/", ".", "~")):
        return files.read_path(path, split)
    if files.is_hub_id(data.source):
        return files.read_hub(data.source, split)
    raise DataError(
        f"data.source: no {data.source!r}; {suggest(data.source, ['corpus', *NAMED])}; or a hub id (owner/name), "
        "a file, a folder, or module:function"
    )


def _other_rows(
    data: DataSettings, named: Named, key: str, split: str, use: str, others: Sequence[Chunk]
) -> list[Chunk]:
    """Return the rows of another split of the source, or of a file, marked with what they are used for.

    Raises ConfigError for rows that are among the `others` already.
    """
    if files.kind_of(Path(split)):
        chunks = files.read_path(Path(split).expanduser(), header=named.header)
    elif _overlap(split, _split(data, named)):
        raise ConfigError(f"data.{key} {split!r}: clients hold this split (data.split); name another one")
    elif key == "public.source" and data.test_split is not None and _overlap(split, data.test_split):
        raise ConfigError(f"data.public.source {split!r}: is the test set too (data.test_split); name another one")
    else:
        try:
            chunks = _chunks(data.model_copy(update={"split": split}), replace(named, every_split=False))
        except DataError as error:
            raise DataError(str(error).replace("data.split", f"data.{key}")) from None
    read = {Path(chunk.origin).resolve(): chunk.split for chunk in others if Path(chunk.origin).is_file()}
    if twice := [chunk.origin for chunk in chunks if Path(chunk.origin).resolve() in read]:
        test = read[Path(twice[0]).resolve()] == "holdout"
        whose = "is the test set too (data.test_split)" if test else "clients hold its rows (data.source)"
        raise ConfigError(f"data.{key} {split!r}: {whose}; name another one")
    return [replace(chunk, split=use) for chunk in chunks]


def _split(data: DataSettings, named: Named) -> str:
    """Return the split that clients hold."""
    return files.ALL_SPLITS if named.every_split and data.split == "train" else data.split


def _overlap(one: str, other: str) -> bool:
    """Return whether two splits share rows, as their names tell it; two slices of one split may be apart."""
    if files.ALL_SPLITS in (one, other):
        return True
    ours, theirs = ([part.strip().partition("[")[::2] for part in split.split("+")] for split in (one, other))
    return any(a == b and (cut == other_cut or not (cut and other_cut)) for a, cut in ours for b, other_cut in theirs)


def _own(data: DataSettings) -> list[Chunk]:
    made = plugins.find({}, data.source, "data.source")(data)
    if isinstance(made, str | Mapping) or not isinstance(made, Iterable):
        raise DataError(
            f"data.source {data.source!r}: returned a {type(made).__name__}; expected rows (dicts or Records)"
        )
    rows = [_as_row(row, data.source) for row in made]
    if not rows:
        raise DataError(f"data.source {data.source!r}: returned no rows")
    return [Chunk(rows, data.source, data.source)]


def _as_row(row: Any, origin: str) -> Mapping[str, Any]:
    if isinstance(row, Record):
        return {name: getattr(row, name) for name in COLUMNS}
    if isinstance(row, Mapping):
        return row
    raise DataError(f"data.source {origin!r}: a row is a {type(row).__name__}; expected a dict or a sheepfold Record")


def _columns(chunks: Sequence[Chunk], data: DataSettings, named: Named) -> dict[str, str]:
    """Return {field: column} for the fields that the rows have; raise DataError for one they must have and do not."""
    known: set[str] = set().union(*(row.keys() for chunk in chunks for row in chunk.rows))
    told = dict(data.fields) | _label_column(data)
    columns = {}
    for name, usual in (COLUMNS | named.columns).items():
        if name in told:
            if told[name] and told[name] not in known:
                raise DataError(f"{_where(chunks)}: no column {told[name]!r} for {name}; {suggest(told[name], known)}")
            columns[name] = told[name]
        else:
            columns[name] = next((column for column in usual if column in known), "")
    wanted = () if columns["messages"] else ("instruction", "output")
    for name in wanted:
        if not columns[name] and name not in told:
            usual = (COLUMNS | named.columns)[name]
            raise DataError(
                f"{_where(chunks)}: no column for {name} (looked for {' and '.join(usual)}); "
                f"{suggest(usual[0], known)}; set data.fields.{name} to one of them"
            )
    return {name: column for name, column in columns.items() if column}


def _label_column(data: DataSettings) -> dict[str, str]:
    """Return the field that `partition.column` maps: category, or client where clients are natural."""
    partition = data.partition
    name = "client" if partition.by == "natural" else "category"
    if partition.column in ("category", "client"):
        return {}
    if data.fields.get(name, partition.column) != partition.column:
        raise ConfigError(
            f"data.fields.{name} {data.fields[name]!r} and data.partition.column {partition.column!r} "
            "name two columns for one thing; keep one of them"
        )
    return {name: partition.column}


def _where(chunks: Sequence[Chunk]) -> str:
    return chunks[0].origin + (f" and {len(chunks) - 1} more" if len(chunks) > 1 else "")


def _records(chunks: Sequence[Chunk], columns: Mapping[str, str], tidy: Callable[[Record], Record | str]) -> Source:
    records, numbers, splits, names = [], [], [], []
    dropped: Counter[str] = Counter()
    number = 0
    for chunk in chunks:
        for row in chunk.rows:
            made = record(row, columns, chunk.client, f"{chunk.origin}, row {number}")
            if isinstance(made, Record):
                made = _tidied(made, tidy, f"{chunk.origin}, row {number}")
            if isinstance(made, Record):
                records.append(made)
                numbers.append(number)
                splits.append(chunk.split)
                names.append(chunk.name)
            else:
                dropped[made] += 1
            number += 1
    if not records:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        raise DataError(
            f"{_where(chunks)}: no usable row ({reasons}); columns in use: {_pairs(columns)}; see data.fields"
        )
    return Source(records, np.array(numbers), np.array(splits), np.array(names), dict(dropped))


def _tidied(made: Record, tidy: Callable[[Record], Record | str], where: str) -> Record | str:
    try:
        return tidy(made)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _pairs(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {column!r}" for name, column in columns.items())


def _subsampled(source: Source, data: DataSettings) -> Source:
    """Keep the share of each category of each split, at least one row, in the source's order."""
    if data.subsample == 1.0:
        return source
    groups: dict[tuple[str, str], list[int]] = {}
    for row, held in enumerate(source.records):
        groups.setdefault((str(source.splits[row]), held.category), []).append(row)
    kept = []
    for (split, category), rows in groups.items():
        count = max(1, round(data.subsample * len(rows)))
        kept += list(stream(data.seed, "subsample", split, category).permutation(rows)[:count])
    return _taken(source, np.sort(np.array(kept)))


def _limited(source: Source, count: int | None) -> Source:
    """Keep the first rows to train on; held-out rows of clients that are then gone go too."""
    trained = np.isin(source.splits, ("", "train"))
    if count is None or trained.sum() <= count:
        return source
    first = np.flatnonzero(trained)[:count]
    clients = {source.records[row].client for row in first}
    others = np.flatnonzero(~trained)
    rest = [row for row in others if source.splits[row] == "public" or source.records[row].client in clients]
    return _taken(source, np.sort(np.concatenate([first, np.array(rest, dtype=np.int64)])))


def _taken(source: Source, rows: np.ndarray) -> Source:
    records = [source.records[row] for row in rows]
    return Source(records, source.numbers[rows], source.splits[rows], source.names[rows], source.dropped)
