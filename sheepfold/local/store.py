"""What clients keep for themselves from round to round, on disk: one small file a client and round.

    clients/<client>/000012.safetensors     what it kept after round 12

A state knows after which round each client's update counted last, and goes with its newest file up to then: what a
client kept of an update that came too late, was lost or rejected is never read, nor what it kept before a run died that
had not saved its state yet. Only the clients of a pass are in memory.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from torch import Tensor

from sheepfold.errors import CheckpointError
from sheepfold.state import write_atomic

LONGEST_NAME = 120
"""Characters of a folder's name; longer client names are cut and made unique by a hash."""


class ClientStore:
    """Clients' own tensors, by client and round."""

    def __init__(self, folder: Path | None = None) -> None:
        """Keep them in this folder; None: in a temporary one, for as long as the store lives."""
        self._temporary = TemporaryDirectory(prefix="sheepfold-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(folder or "")

    def get(self, client: str, round: int) -> dict[str, Tensor]:
        """Return what the client had kept when `round` rounds were completed; nothing where it never took part.

        Raises CheckpointError for a damaged file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        kept = [path for path in self._files(client) if _round(path) <= round]
        if not kept:
            return {}
        try:
            return dict(load(kept[-1].read_bytes()))
        except (SafetensorError, OSError, ValueError) as error:
            before = _round(kept[-1])
            raise CheckpointError(f"{kept[-1]}: damaged ({error}); resume from a round before {before}") from None

    def recall(self, client: str, last: int) -> dict[str, Tensor]:
        """Return what the client had kept after its last update that counted, and forget what came of later ones.

        last: rounds completed by then. Raises CheckpointError for a damaged file.
        """
        for path in self._files(client):
            if _round(path) > last:
                path.unlink()
        return self.get(client, last)

    def put(self, client: str, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a client's tensors as of `round` completed rounds. Raises CheckpointError where the disk refuses."""
        from safetensors.torch import save

        folder = self._folder(client)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be made ({error.strerror}); free some space") from None
        whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        write_atomic(folder / f"{round:06d}.safetensors", save(whole))

    def prune(self, clients: Iterable[str], rounds: Collection[int]) -> None:
        """Drop the files of these clients that none of these rounds, nor a later one, goes back to."""
        for client in clients:
            files = self._files(client)
            needed = {max((p for p in files if _round(p) <= r), default=None) for r in rounds}
            for path in files[:-1]:
                if path not in needed:
                    path.unlink()

    def rewind(self, round: int) -> None:
        """Drop what was kept after this round."""
        for path in self.folder.glob("*/*.safetensors"):
            if _round(path) > round:
                path.unlink()

    def clients(self, names: Iterable[str]) -> Iterator[str]:
        """Yield those of these clients that have something here."""
        return (name for name in names if self._files(name))

    def _folder(self, client: str) -> Path:
        return self.folder / folder_name(client)

    def _files(self, client: str) -> list[Path]:
        return sorted(self._folder(client).glob("*.safetensors"))


def folder_name(client: str) -> str:
    """Return a client's name as a folder can have it."""
    name = quote(client, safe="")
    name = f"%2E{name[1:]}" if name.startswith(".") else name  # a folder that `ls` shows
    if len(name) > LONGEST_NAME or not name:
        return f"{name[:LONGEST_NAME]}~{hashlib.blake2b(client.encode(), digest_size=8).hexdigest()}"
    return name


def _round(path: Path) -> int:
    return int(path.stem)
