"""Answers that wait for their turn lie on disk, so that memory does not grow with the number of clients."""

import shutil
from pathlib import Path

from sheepfold.errors import CheckpointError


class Spool:
    """A folder of blobs by number."""

    def __init__(self, folder: Path) -> None:
        """Use this folder, which is made when the first blob comes; what an earlier process left in it goes."""
        self.folder = folder
        self.clear()

    def put(self, number: int, blob: bytes) -> None:
        """Keep a blob. Raises CheckpointError where the disk refuses."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path(number).write_bytes(blob)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: an answer cannot be kept ({error.strerror}); free some space, then --resume"
            ) from None

    def take(self, number: int) -> bytes:
        """Return a blob, and keep it no longer. Raises CheckpointError where it is gone."""
        try:
            blob = self._path(number).read_bytes()
            self._path(number).unlink()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: an answer cannot be read ({error.strerror}); go on with --resume"
            ) from None
        return blob

    def drop(self, number: int) -> None:
        """Keep a blob no longer, where it is there."""
        self._path(number).unlink(missing_ok=True)

    def clear(self) -> None:
        """Keep nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"
