"""Local files and hub data sets, read through `datasets.load_dataset` into rows exactly as they were written.

JSON comes in as text and is parsed here, and CSV cells stay strings: the typed readers would turn a column of
"1990-01-01" into timestamps, "007" into 7, and "None" into nothing. What they convert goes to a folder that is thrown
away, so an edited file is never answered from a cache.
"""

import csv
import glob
import gzip
import io
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepfold.errors import DataError, suggest

KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "eval": "eval",
    "val": "eval",
    "valid": "eval",
    "validation": "eval",
    "dev": "eval",
    "test": "test",
    **dict.fromkeys(("validation_matched", "validation_mismatched", "dev_matched", "dev_mismatched"), "eval"),  # MNLI
    "in_domain_train": "train",  # CoLA; GLUE's dev set is both of its others together
    "in_domain_dev": "eval",
    "out_of_domain_dev": "eval",
}
"""What a file's or hub split's name says about its rows."""
ALL_SPLITS = "all"
WRAPPERS = ("data", "rows", "examples")
"""Keys under which one JSON object may hold all the rows."""

CLIENT_FILE = re.compile(r"local_(training|eval|test)_(.+)")  # the layout of Shepherd and FlexLoRA
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows of one file, or of one split of a hub data set."""

    rows: Sequence[Mapping[str, Any]]
    origin: str
    """The file or hub id."""
    name: str
    """The file's name without its endings."""
    client: str = ""
    """The client whose file it is."""
    split: str = ""
    """train, eval, test, holdout or public: what the name says where all splits are read, or what the rows are for."""


def kind_of(path: Path) -> str | None:
    """Return json, csv, tsv or parquet for a data file's name, else None."""
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    kind = KINDS.get(ending)
    return None if kind == "parquet" and path.name.endswith(".gz") else kind


def stem(path: Path) -> str:
    """Return a file's name without the endings that say how it is stored."""
    return Path(path.name.removesuffix(".gz")).stem


def read_path(path: Path, split: str = "train", header: Sequence[str] = ()) -> list[Chunk]:
    """Return the rows of a file or folder, one chunk a file.

    A folder holds per-client files, or one file a split (of which `split` is taken, or all), or just files.
    header: the columns of tables that may have no header line.
    Raises DataError for what is missing, empty or unreadable, with the file and line.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; check data.source and data.path")
    chunks = list(_folder(path, split, header) if path.is_dir() else _file(path, split, header))
    if not any(len(chunk.rows) for chunk in chunks):
        raise DataError(f"{path}: holds no rows; expected one JSON object, or one line below the header, a row")
    return chunks


def read_hub(name: str, split: str = "train") -> list[Chunk]:
    """Return the rows of a hub data set, `owner/name[:config][@revision]`; raises DataError where it cannot be had."""
    found = HUB_ID.fullmatch(name)
    assert found is not None, name
    import datasets

    wanted = None if split == ALL_SPLITS else split
    try:
        with quiet_datasets():
            loaded = datasets.load_dataset(found["id"], found["config"], split=wanted, revision=found["revision"])
    except Exception as error:  # hub, network, parsing: each library has its own
        raise DataError(
            f"hub data set {name!r}, split {split!r}: {_root_cause(error)}; check id, split and network, "
            "or set data.path to a local copy"
        ) from None
    if split != ALL_SPLITS:
        return [Chunk(loaded.to_list(), name, name)]
    return [Chunk(rows.to_list(), name, part, split=_named_split(part, name)) for part, rows in loaded.items()]


def is_hub_id(name: str) -> bool:
    """Return whether this reads as owner/name[:config][@revision] and not as a data file."""
    return HUB_ID.fullmatch(name) is not None and kind_of(Path(name)) is None


def read_url(url: str) -> list[Chunk]:
    """Return the rows of a JSON file on the web."""
    return [Chunk(_json_rows(_texts([url])[0], url), url, url.rsplit("/", 1)[-1])]


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep the progress bars and log lines of `datasets` out of ours."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _file(path: Path, split: str, header: Sequence[str]) -> Iterator[Chunk]:
    if kind_of(path) is None:
        endings = ", ".join(KINDS)
        raise DataError(f"{path}: data files end in {endings}, all but parquet also with .gz; found {path.name!r}")
    if split not in ("train", ALL_SPLITS):
        raise DataError(
            f"{path}: one file has only the split 'train', found data.split {split!r}; name the file you want"
        )
    yield from _read([(path, "", "")], header)


def _folder(folder: Path, split: str, header: Sequence[str]) -> Iterator[Chunk]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and kind_of(p) and not p.name.startswith("."))
    if not files:
        raise DataError(f"{folder}: no data files ({', '.join(KINDS)}); {_below(folder)}")
    whole = split in ("train", ALL_SPLITS)
    if any(CLIENT_FILE.fullmatch(stem(path)) for path in files) and whole:
        return _read(_client_files(files))
    named = {path: SPLIT_NAMES[stem(path).lower()] for path in files if stem(path).lower() in SPLIT_NAMES}
    if not named and not whole:
        raise DataError(f"{folder}: no file is named after data.split {split!r}; leave data.split out to read them all")
    if not named:
        return _read([(path, "", "") for path in files], header)
    if split == ALL_SPLITS:
        return _read([(path, "", part) for path, part in named.items()], header)
    exact = (split.lower(), split.lower().replace("validation", "dev"))
    chosen = [path for path in named if stem(path).lower() in exact]
    chosen = chosen or [path for path, part in named.items() if part == SPLIT_NAMES.get(split)]
    if not chosen:
        raise DataError(f"{folder}: no split {split!r}; {suggest(split, [stem(path) for path in named])}, {ALL_SPLITS}")
    return _read([(path, "", "") for path in chosen], header)


def _below(folder: Path) -> str:
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir())
    return f"it has the folders {', '.join(inside[:8])}" if inside else "it is empty or holds other files"


def _client_files(files: Sequence[Path]) -> list[tuple[Path, str, str]]:
    """Return (file, client, split) of the per-client layout; Shepherd's global_training.json repeats them."""
    parts = []
    for path in files:
        if found := CLIENT_FILE.fullmatch(stem(path)):
            parts.append((path, found[2], SPLIT_NAMES[found[1]]))
        elif stem(path) == "global_test":
            parts.append((path, "", "holdout"))
    return parts


def _named_split(name: str, origin: str) -> str:
    if name not in SPLIT_NAMES:
        raise DataError(f"{origin}: split {name!r} is neither train, eval nor test; set data.split to the one you want")
    return SPLIT_NAMES[name]


def _read(parts: Sequence[tuple[Path, str, str]], header: Sequence[str] = ()) -> Iterator[Chunk]:
    """Yield the chunk of every (file, client, split)."""
    texts = iter(_texts([str(path) for path, _, _ in parts if kind_of(path) == "json"]))
    for path, client, split in parts:
        if kind_of(path) == "json":
            rows: Sequence[Mapping[str, Any]] = _json_rows(next(texts), str(path))
        elif kind_of(path) == "parquet":
            rows = _load("parquet", [str(path)])
        else:
            rows = _csv_rows(path, header)
        yield Chunk(rows, str(path), stem(path), client, split)


def _texts(files: Sequence[str]) -> list[str]:
    """Return the whole text of every file, in order."""
    if not files:
        return []
    return [row["text"] for row in _load("text", files, sample_by="document")]


def _load(builder: str, files: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    """Return every row of `datasets.load_dataset(builder, data_files=files)`."""
    import datasets

    names = [file if "://" in file else glob.escape(file) for file in files]
    try:
        with quiet_datasets(), tempfile.TemporaryDirectory(prefix="sheepfold-") as cache:
            loaded = datasets.load_dataset(
                builder, data_files=names, split="train", cache_dir=cache, keep_in_memory=True, **options
            )
    except Exception as error:  # pyarrow, pandas, fsspec, the disk: one line for all of them
        if "corresponds to no data" in str(error):
            return []  # how `datasets` says that a file has columns and no rows
        raise DataError(next(filter(None, map(_fault, files)), f"{files[0]}: {_root_cause(error)}")) from None
    rows: list[dict[str, Any]] = loaded.to_list()
    return rows


def _csv_rows(path: Path, without: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return a CSV or TSV file's rows, every cell as the text it is; TSV is unquoted (IANA tab-separated-values).

    without: the columns where the file has no header line, known by a first line of as many cells and none of them.
    """
    tsv = kind_of(path) == "tsv"
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if tsv else {}
    header = _first_cells(path, tsv)
    if without and len(header) == len(without) and not {*header} & {*without}:
        header, options = list(without), options | {"column_names": list(without)}
    _check_header(path, header)
    import datasets

    features = datasets.Features({name: datasets.Value("string") for name in header})
    options |= {"features": features, "keep_default_na": False, "encoding": "utf-8-sig"}
    return _load("csv", [str(path)], **options)


def _first_cells(path: Path, tsv: bool) -> list[str]:
    try:
        with _open(path) as file:
            header = next(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tsv else csv.reader(file), [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(_fault(str(path)) or f"{path}: {error}") from None
    return [name.removeprefix("\ufeff") for name in header]


def _check_header(path: Path, header: Sequence[str]) -> None:
    if not header:
        raise DataError(f"{path}: is empty; expected a header line with the column names")
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}: column {twice[0]!r} occurs twice in the header; rename one")


def _json_rows(text: str, origin: str) -> list[Mapping[str, Any]]:
    """Return the objects of a JSON array, of `{"data": [...]}`, or of one object a line."""
    text = text.removeprefix("\ufeff")
    whole: Any = None
    if text.lstrip()[:1] == "[":
        whole = _parse(text, origin)
    elif text.lstrip()[:2].rstrip() == "{":  # an object over several lines, if it is no JSON Lines
        whole = _one_object(text)
    if whole is None:
        lines = enumerate(text.split("\n"), start=1)
        rows = [_object(_parse(line, origin, n), origin, f"line {n}") for n, line in lines if line.strip()]
    else:
        whole = whole if isinstance(whole, list) else [whole]
        rows = [_object(value, origin, f"element {i}") for i, value in enumerate(whole)]
    if len(rows) == 1 and (inside := [rows[0][key] for key in WRAPPERS if isinstance(rows[0].get(key), list)]):
        return [_object(value, origin, f"element {i}") for i, value in enumerate(inside[0])]
    return rows


def _one_object(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _parse(text: str, origin: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin}: line {line or error.lineno}, column {error.colno}: not valid JSON ({error.msg}); "
            "mend or remove it"
        ) from None
    except RecursionError:
        raise DataError(f"{origin}: line {line or 1}: JSON nested too deeply") from None


def _object(value: Any, origin: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f'{origin}: {where} is a {type(value).__name__}; expected an object such as {{"instruction": ...}}'
        )
    return value


def _open(path: Path) -> io.TextIOWrapper:
    if path.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.GzipFile(path), encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _fault(file: str) -> str | None:
    """Return what is wrong with a file's bytes, where something is."""
    path, line = Path(file), 0
    if "://" in file:
        return None
    if kind_of(path) == "parquet":
        return _parquet_fault(path)
    try:
        with _open(path) as text:
            for line, _ in enumerate(text, start=1):  # noqa: B007 - the last line read is the place
                pass
    except UnicodeDecodeError as error:
        return f"{path}: near line {line + 1}: not UTF-8 ({error.reason}); save the file as UTF-8"
    except gzip.BadGzipFile:
        return f"{path}: ends in .gz but is not gzip-compressed; rename or compress it"
    except EOFError:
        return f"{path}: the gzip file is truncated after line {line}; copy or download it again"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror or error}); check its permissions"
    return f"{path}: is empty; expected a row a line" if line == 0 else None


def _parquet_fault(path: Path) -> str | None:
    import pyarrow.parquet

    try:
        pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # whatever it is, its first line is the best description there is
        return f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); copy or write it again"
    return None


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
