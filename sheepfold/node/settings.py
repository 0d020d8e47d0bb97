"""A client machine's own file: who it is, which server it joins, where its rows are, and what it gives.

    # node.yaml
    name: ward-7                        # as the server enrolled it
    server: fold.example.org:8443
    ca: ca.crt                          # the server's certificate authority
    key: ward-7.key
    data: rows.jsonl
    policy: {max_rank: 8, rows_per_round: 500}

Paths are taken from the file's own folder. Nothing here is told to the server but the name.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints, ValidationError

from sheepfold.config import read_yaml
from sheepfold.data.files import kind_of
from sheepfold.data.sources import NAMED
from sheepfold.errors import ConfigError
from sheepfold.local.store import folder_name
from sheepfold.node.policy import Policy, read_policy
from sheepfold.section import Section, first_problem

COMES = {"ca": "the server's owner has it, as ca.crt", "key": "`sheepfold certs FOLDER --node NAME` makes one"}
"""Where files come from"""
NAME = r"^[^\x00-\x1f\x7f/\\]+$"


class NodeSettings(Section):
    """One client machine."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=NAME)]
    """As the server enrolled it."""
    server: Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}$")]
    """host:port."""
    ca: Path
    """Certificate of the authority that signed the server's."""
    key: Path
    """This machine's private key, whose public half the server enrolled."""
    data: str
    """Where its rows are: a file, a folder, a named set (dolly, alpaca, ...) or a hub id, as data.source."""
    path: str | None = None
    """A local copy of a named set, as data.path."""
    split: str = "train"
    """Which split of a folder or a hub data set; all: every split, kept apart as train, eval and test rows."""
    fields: Mapping[str, str] | None = None
    """Its columns, as data.fields; null: as the experiment has them."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    model: str | None = None
    """Its own copy of the base, a folder or hub id, to be loaded for model.base; the fingerprints must be equal."""
    policy: Policy = Policy()
    """What it gives: a section, or a policy file's path."""
    folder: Path
    """What it keeps: ledger, token cache, its own state; default: a folder of its name beside the file."""

    @property
    def runs(self) -> Path:
        """A folder a run."""
        return self.folder / "runs"

    @property
    def ledger(self) -> Path:
        """Every message that left."""
        return self.folder / "ledger.jsonl"

    @property
    def log(self) -> Path:
        """What went wrong, in full; it never leaves."""
        return self.folder / "node.log"

    @property
    def cache(self) -> Path:
        """Its rows' tokens."""
        return self.folder / "tokens"

    def unnamed(self, text: str) -> str:
        """Return a text without this machine's own places in it, so that it may be told to others."""
        own = {str(self.folder): "its folder", self.data: "its data", self.path: "its data", self.model: "its model"}
        places = {place: name for place, name in own.items() if place and ("/" in place or "\\" in place)}
        for place in sorted(places, key=len, reverse=True):
            text = text.replace(place, f"({places[place]})")
        return re.sub(r"(?<![\w)/:.])(~|/)[\w.~-]*/[^\s'\":;,)]+", "(a path)", text)


def read_node(path: str | Path) -> NodeSettings:
    """Return a client machine's settings. Raises ConfigError, in one line, for what cannot be its file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"{path}: no such node file; docs/deploy.md has one to start from")
    values, here = read_yaml(path), path.resolve().parent
    policy = values.get("policy")
    if isinstance(policy, str):
        values["policy"] = read_policy(here / Path(policy).expanduser())
    elif policy is None:
        values.pop("policy", None)
    name = values.get("name")
    values.setdefault("folder", folder_name(name) if isinstance(name, str) else ".")
    try:
        found = NodeSettings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error, NodeSettings, EXPECTED)}") from None
    return found.model_copy(update=_placed(found, here))


def _placed(found: NodeSettings, here: Path) -> dict[str, Any]:
    """Return the places that a file names, from its own folder; raise ConfigError for a file that is not there."""
    places: dict[str, Any] = {name: here / getattr(found, name).expanduser() for name in ("ca", "key", "folder")}
    for name in ("ca", "key"):
        if not places[name].is_file():
            raise ConfigError(f"{name}: no such file {places[name]}; {COMES[name]}")
    for name in ("data", "path", "model"):
        value = getattr(found, name)
        if value is not None and _is_local(value, here):
            places[name] = str(here / Path(value).expanduser())
            if not Path(places[name]).exists():
                raise ConfigError(f"{name}: no such file or folder {places[name]}; {EXPECTED[name]}")
    return places


def _is_local(value: str, here: Path) -> bool:
    """Return whether a name means a place on this machine, and not a named set, a hub id or a function."""
    looks = value.startswith(("/", ".", "~")) or kind_of(Path(value)) is not None
    return looks or (":" not in value and value not in ("corpus", *NAMED) and (here / value).exists())


EXPECTED = {
    "name": "it is this machine's name, as the server enrolled it, without slashes",
    "server": "expected host:port, such as fold.example.org:8443",
    "ca": "expected the path of the server's ca.crt",
    "key": "expected the path of this machine's private key",
    "data": "expected a file, a folder, a named set or a hub id with this machine's rows",
    "path": "expected a local copy of the named set",
    "model": "expected a folder or a hub id of the base",
}
"""What a key's value should be."""
