"""Our messages in Flower's records: few arrays of raw bytes, never one for each tensor.

    RecordDict ── "about"  ConfigRecord  kind and charter                       downwards
               └─ "blob"   ArrayRecord   head, body                             downwards: equal bodies are kept once
                                         all                                    upwards

Flower cuts an array into objects of 5 MB, names them by their hash, and keeps and sends equal ones once. A blob's head
names its client, so it goes apart: then the numbers, which are the same for everybody, are the same objects too.
"""

import struct
from typing import TYPE_CHECKING

from sheepfold.errors import WireError

if TYPE_CHECKING:
    from flwr.app import Array, ArrayRecord, RecordDict

ABOUT = "about"
BLOB = "blob"
SCALAR = "uint8"
FORMAT = "sheepfold"
OTHER = "is the server's release of sheepfold another?"


def parcel(kind: str, charter: str, blob: bytes) -> "RecordDict":
    """Return the record of a message from the server; it holds on to the blob and copies none of it."""
    from flwr.app import ConfigRecord, RecordDict

    head = head_bytes(blob)
    view = memoryview(blob)
    arrays = {"head": _array(view[:head]), "body": _array(view[head:])}
    return RecordDict({ABOUT: ConfigRecord({"kind": kind, "charter": charter}), BLOB: _record(arrays)})


def answer(blob: bytes) -> "RecordDict":
    """Return the record of a message from a client."""
    from flwr.app import RecordDict

    return RecordDict({BLOB: _record({"all": _array(memoryview(blob))})})


def opened(record: "RecordDict") -> tuple[str, str, bytes]:
    """Return the kind, the charter and the blob of a message from the server. Raises WireError for what is none."""
    try:
        about, arrays = record.config_records[ABOUT], record.array_records[BLOB]
        kind, charter = about["kind"], about["charter"]
        blob = b"".join(arrays[name].data for name in ("head", "body"))
    except KeyError as error:
        raise WireError(f"no message of sheepfold's: {error.args[0]} is missing; {OTHER}") from None
    if not isinstance(kind, str) or not isinstance(charter, str):
        raise WireError(f"no message of sheepfold's: kind and charter are no texts; {OTHER}")
    return kind, charter, blob


def head_bytes(blob: bytes) -> int:
    """Return how many bytes of a blob come before its numbers; all of one that is no blob of ours."""
    if len(blob) < 8:
        return len(blob)
    (length,) = struct.unpack("<Q", blob[:8])
    return min(8 + int(length), len(blob))


def _array(view: memoryview) -> "Array":
    from flwr.app import Array

    array = Array(dtype=SCALAR, shape=(len(view),), stype=FORMAT, data=b"")
    array.data = view  # type: ignore[assignment]  # its constructor takes bytes alone, which would be a copy
    return array


def _record(arrays: dict[str, "Array"]) -> "ArrayRecord":
    from flwr.app import ArrayRecord

    record = ArrayRecord()
    record.update(arrays)  # its constructor copies
    return record
