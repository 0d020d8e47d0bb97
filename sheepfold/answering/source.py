"""What can answer, and under which names: a run, an adapter folder, or a base by itself.

a run              base, federated, best (where kept), client:<name> for each adapter of a client's own
an adapter folder  base, adapter
a base             base
"""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheepfold import peft_io
from sheepfold import state as states
from sheepfold.adapter_methods import WHOLE
from sheepfold.config import DataSettings, ModelSettings
from sheepfold.errors import CheckpointError, ConfigError, ModelError, suggest
from sheepfold.journal import RunFolder
from sheepfold.local.store import folder_name
from sheepfold.offsite.emulator import read
from sheepfold.offsite.plug import plug
from sheepfold.tasks import task_of
from sheepfold.tasks.base import Task
from sheepfold.tasks.causal_lm import CAUSAL_LM

if TYPE_CHECKING:
    from sheepfold.adapter import Adapter

BASE, FEDERATED, BEST, ADAPTER, CLIENT = "base", "federated", "best", "adapter", "client:"


@dataclass(frozen=True)
class Source:
    """A base, and adapters by name; nothing is loaded yet."""

    name: str
    """The run's name, or the folder's, or the base's."""
    model: ModelSettings
    data: DataSettings
    """The template and system message that prompts are written with."""
    seed: int
    names: tuple[str, ...]
    """What answers can be asked of, the bare base first."""
    default: str
    """What answers where nothing is named."""
    run: RunFolder | None = None
    folder: Path | None = None
    """An adapter's own folder or weights file, where it is no run's."""
    adapter_config: Path | None = None
    task: Task = CAUSAL_LM
    _read: dict[str, "Adapter"] = field(default_factory=dict, compare=False, repr=False)

    def check(self, name: str) -> str:
        """Return the name, if there is one like it; raises ConfigError with the nearest ones."""
        if name not in self.names:
            raise ConfigError(f"{self.name}: no adapter {name[:80]!r}; {suggest(name[:80], self.names)}")
        return name

    def is_lora(self, name: str) -> bool:
        """Return whether this is the base, or LoRA and nothing else."""
        if self.check(name) == BASE:
            return True
        if self.run is not None:
            return self._method == "lora"
        return _is_plain_lora(self.place(name), self.adapter_config)

    def adapter(self, name: str) -> "Adapter":
        """Return a LoRA adapter as a value; those that all share are read once.

        Raises CheckpointError or ModelError where it cannot be read.
        """
        self.check(name)
        if name.startswith(CLIENT):
            return peft_io.read_peft(self.place(name))
        if name not in self._read:  # once: a run that goes on would make one name mean two adapters
            self._read[name] = self._shared(name)
        return self._read[name]

    def _shared(self, name: str) -> "Adapter":
        if self.run is None:
            return peft_io.read_peft(self.place(name), self.adapter_config)
        whole = states.load(self.run.best if name == BEST else self.run.latest).whole()
        if self.run.experiment().offsite is None:
            return whole
        return plug(whole, read(self.run.emulator).cut)

    def adapter_hash(self, name: str) -> str | None:
        """Return what tells an adapter from all others; None for the bare base.

        For LoRA the hash of its numbers; for other methods that of its folder's weight files.
        """
        if self.check(name) == BASE:
            return None
        return self.adapter(name).hash() if self.is_lora(name) else _hash_of_files(self.place(name))

    def place(self, name: str) -> Path:
        """Return the folder that an adapter was written to, as PEFT or transformers read it."""
        if self.run is None:
            assert self.folder is not None, name
            return self.folder
        if name.startswith(CLIENT):
            return self.run.personal / folder_name(name.removeprefix(CLIENT))
        return self.run.path / (BEST if name == BEST else "adapter")

    @cached_property
    def rounds(self) -> int | None:
        """How many rounds the run has completed; None where it is no run."""
        return None if self.run is None else self.run.lines()[-1]["round"]

    @cached_property
    def _method(self) -> str:
        assert self.run is not None
        return self.run.experiment().adapter.method

    @property
    def is_full(self) -> bool:
        """Whether the clients trained all weights, so that an adapter is a model of its own."""
        return self.run is not None and self._method in WHOLE


def find(
    place: str | os.PathLike[str] | None,
    *,
    base: str | None = None,
    adapter_config: Path | None = None,
    template: str | None = None,
) -> Source:
    """Return what a command was pointed at: a run's folder, an adapter's folder or weights file, or a base.

    base: the base, where it is not what the run or the adapter's configuration says; by itself, the base alone.
    adapter_config: where an adapter's configuration is not beside its weights. template: instead of the run's. Raises
    ConfigError, CheckpointError or ModelError, in one line, for what is not there.
    """
    if place is None and base is None:
        raise ConfigError("name a run's folder, an adapter's folder or a base, such as runs/demo")
    path = Path(place) if place is not None else None
    if path is not None and (path / "experiment.yaml").is_file():
        if adapter_config is not None:
            raise ConfigError(f"--adapter-config has no effect on {path}, which is a run's folder; leave it out")
        return _of_run(path, base, template)
    if path is not None and (path.is_file() or _holds_adapter(path)):
        return _of_adapter(path, base, adapter_config, template)
    if adapter_config is not None:
        raise ConfigError(f"--adapter-config {adapter_config}: there is no adapter; name its folder or weights too")
    if path is not None and base is not None:
        raise ConfigError(f"{path}: neither a run's folder nor an adapter's; leave out --base, or name an adapter")
    name = str(place if place is not None else base)
    if path is not None and not path.exists() and path.parent != Path(".") and path.parent.is_dir():
        raise CheckpointError(f"{path}: no such run, adapter or base; {suggest(path.name, _beside(path))}")
    data = DataSettings(template=template or "auto")
    return Source(Path(name).name, ModelSettings(base=name), data, 0, (BASE,), BASE)


def _of_run(path: Path, base: str | None, template: str | None) -> Source:
    run = RunFolder(path)
    experiment = run.experiment()
    if not run.latest.is_file():
        raise CheckpointError(f"{path}: the run has no state yet; wait for its first evaluation, or run it again")
    model = experiment.model.model_copy(update={"base": base, "revision": None}) if base else experiment.model
    data = experiment.data.model_copy(update={"template": template}) if template else experiment.data
    best = (BEST,) if run.best.is_file() else ()
    # From names to folders, never back: long names are cut in the folder's.
    known = run.data()["clients"] if run.personal.is_dir() else ()
    clients = sorted(CLIENT + name for name in known if (run.personal / folder_name(name)).is_dir())
    names = (BASE, FEDERATED, *best, *clients)
    return Source(path.resolve().name, model, data, experiment.seed, names, FEDERATED, run, task=task_of(run))


def _of_adapter(path: Path, base: str | None, config: Path | None, template: str | None) -> Source:
    if _told(path, config, "task_type") == "SEQ_CLS":
        raise ConfigError(
            f"{path}: a classifier's adapter (task_type SEQ_CLS) gives labels, and has no answers to write"
        )
    if base is None:
        base = _told_base(path, config)
    data = DataSettings(template=template or "auto")
    name = path.resolve().stem if path.is_file() else path.resolve().name
    return Source(name, ModelSettings(base=base), data, 0, (BASE, ADAPTER), ADAPTER, None, path, config)


def _holds_adapter(path: Path) -> bool:
    names = (peft_io.CONFIG, peft_io.WEIGHTS, peft_io.PICKLED)
    return any((path / name).is_file() for name in names)


def _config_file(path: Path, config: Path | None) -> Path:
    return config or (path / peft_io.CONFIG if path.is_dir() else path.parent / peft_io.CONFIG)


def _told(path: Path, config: Path | None, key: str) -> Any:
    try:
        return json.loads(_config_file(path, config).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _told_base(path: Path, config: Path | None) -> str:
    told = _told(path, config, "base_model_name_or_path")
    if not isinstance(told, str) or not told:
        raise ConfigError(f"{path}: its configuration names no base; say it with --base")
    return told


def _is_plain_lora(path: Path, config: Path | None) -> bool:
    try:
        adapter = peft_io.read_peft(path, config)
    except ModelError as error:
        if "plain LoRA" in str(error) or "expected LORA" in str(error):
            return False  # PEFT itself loads it
        raise
    return not adapter.extra


def _hash_of_files(folder: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _beside(path: Path) -> list[str]:
    return [folder.name for folder in path.parent.iterdir() if folder.is_dir()][:50]
