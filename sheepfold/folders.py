"""Files and folders that are whole or absent: filled under a temporary name, then moved into place."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from sheepfold.errors import CheckpointError


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, it holds its old content or its new one; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def _flush(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def fresh_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `target` where the block ends well, and disappears where it does not.

    Raises CheckpointError where the target is there and not empty, or the disk refuses.
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with writing(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target}: is there and not empty; choose a new folder, or empty this one")
        partial.mkdir(parents=True)
    try:
        with writing(target):
            yield partial
            _as_open_as_new_files(partial)
            if target.exists():
                target.rmdir()
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _as_open_as_new_files(folder: Path) -> None:
    """Give every file the mode that new files have here; safetensors leaves its own at 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what a disk says no with into one line about the target."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error.strerror or error}); choose another place"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(f"{target}: cannot be written ({error}); choose another place") from None
