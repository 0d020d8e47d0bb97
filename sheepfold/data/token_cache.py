"""Token rows on disk: one Arrow IPC file a fingerprint, written whole or not at all, read through a memory map.

A file that is damaged, cut short, or not ours counts as missing, so it is made again.
"""

import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from sheepfold.data.rows import TokenRows
from sheepfold.errors import DataError

CHECKSUM = b"sheepfold.crc32"


def folder(setting: str | None) -> Path:
    """Return the cache folder: the setting, else $SHEEPFOLD_CACHE, else ~/.cache/sheepfold."""
    return Path(setting or os.environ.get("SHEEPFOLD_CACHE") or "~/.cache/sheepfold").expanduser()


def save(path: Path, rows: TokenRows) -> None:
    """Write the rows; other processes see the old file or the new one, never half of it. Raises DataError."""
    import pyarrow as pa

    columns = {
        "ids": pa.LargeListArray.from_arrays(rows.offsets, pa.array(rows.ids, type=pa.int32())),
        "is_target": pa.LargeListArray.from_arrays(rows.offsets, pa.array(rows.is_target.view(np.uint8))),
        "prompt_tokens": pa.array(rows.prompt_tokens, type=pa.int32()),
        "cut": pa.array(rows.cut.view(np.uint8)),
    }
    schema = pa.schema([(name, column.type) for name, column in columns.items()])
    batch = pa.RecordBatch.from_arrays(list(columns.values()), schema=schema.with_metadata({CHECKSUM: _checksum(rows)}))
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(half), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        os.replace(half, path)
    except OSError as error:
        with suppress(OSError):
            half.unlink()
        raise DataError(
            f"token cache {path.parent}: cannot be written ({error.strerror or error}); set `cache` (or "
            "$SHEEPFOLD_CACHE) to a folder with free space that you may write to"
        ) from None


def load(path: Path, train_on_inputs: bool = False) -> TokenRows | None:
    """Return the rows of a file as views of its memory map, None where it is missing or damaged."""
    import pyarrow as pa

    try:
        if not path.is_file():
            return None
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        rows = _rows(batch, train_on_inputs)
    except (pa.ArrowException, OSError, KeyError, IndexError, ValueError, TypeError):
        return None
    stored = (batch.schema.metadata or {}).get(CHECKSUM)
    return rows if stored == _checksum(rows) else None


def _rows(batch: Any, train_on_inputs: bool) -> TokenRows:
    ids, is_target = batch.column("ids"), batch.column("is_target")
    return TokenRows(
        ids=ids.values.to_numpy(zero_copy_only=True),
        is_target=is_target.values.to_numpy(zero_copy_only=True).view(bool),
        offsets=ids.offsets.to_numpy(zero_copy_only=True),
        prompt_tokens=batch.column("prompt_tokens").to_numpy(zero_copy_only=True),
        cut=batch.column("cut").to_numpy(zero_copy_only=True).view(bool),
        train_on_inputs=train_on_inputs,
    )


def _checksum(rows: TokenRows) -> bytes:
    """Return a CRC over everything that is stored: Arrow files have none of their own."""
    arrays: Iterable[np.ndarray] = (rows.ids, rows.is_target, rows.offsets, rows.prompt_tokens, rows.cut)
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return str(crc).encode()
