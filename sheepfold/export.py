"""What leaves a run: a PEFT folder, or the base with the adapter merged in, both for plain transformers.

merged: W + scale * B @ A, in float32, then in the dtype asked for
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sheepfold import peft_io
from sheepfold.adapter import Adapter
from sheepfold.errors import AdapterMismatch, CheckpointError, ConfigError, suggest
from sheepfold.folders import fresh_folder, writing
from sheepfold.loading import quiet
from sheepfold.models import Base, config_only, load_base
from sheepfold.targets import is_conv1d
from sheepfold.tasks import task
from sheepfold.tasks.base import Task
from sheepfold.tasks.causal_lm import CAUSAL_LM

if TYPE_CHECKING:
    from sheepfold.assembly import Parts
    from sheepfold.config import Experiment
    from sheepfold.journal import RunFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card says of an export."""

    base: str
    run: str
    method: str
    """The strategy that folded the adapter."""
    rounds: int
    dropout: float = 0.0
    """The adapter's dropout in training; PEFT keeps it for whoever trains on."""
    task: Task = CAUSAL_LM

    def loading(self, what: str) -> str:
        """Return the Python that loads a model of the task: its class's import, and `... = ...from_pretrained(...)`."""
        labels = ""
        if self.task.labels:
            labels = f", num_labels={len(self.task.labels)}, id2label={dict(enumerate(self.task.labels))!r}"
        return f'{self.task.auto_class}.from_pretrained({what}{labels}, dtype="float32")'

    def text(self, kind: str, how: str) -> str:
        """Return the README.md of an export; kind: 'adapter' or 'merged model', how: the Python that loads it."""
        library = "peft" if kind == "adapter" else "transformers"
        # builtin:tiny is no hub id, and the hub's card format takes nothing else here.
        origin = "" if ":" in self.base else f"base_model: {self.base}\n"
        return (
            f"---\nlibrary_name: {library}\n{origin}tags: [federated-learning, lora, sheepfold]\n---\n"
            f"# {self.run}\n\n"
            f"A LoRA {kind} of `{self.base}`, federated with sheepfold: {self.method}, {self.rounds} rounds. "
            "Training data stayed with the clients.\n\n"
            f"```python\n{how}\n```\n"
        )


def save_adapter(parts: "Parts", adapter: Adapter, folder: str | os.PathLike[str], rounds: int) -> None:
    """Write a running experiment's adapter: LoRA as a PEFT folder, other methods as their own save_pretrained does."""
    card = card_of(parts.experiment, rounds, parts.task)
    if adapter.pairs:
        export_peft(adapter, folder, parts.base.model, card, parts.experiment.model.revision)
        return
    carrier: Any = parts.engine.carrier  # type: ignore[union-attr]  # only the peft_model engine has no pairs
    with quiet(), writing(Path(folder)):
        carrier.write(adapter)
        carrier.model.save_pretrained(folder)
        if parts.experiment.adapter.method == "full":
            parts.base.tokenizer.save_pretrained(folder)


def export_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    merged: bool = False,
    best: bool = False,
    client: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a run's last (or best) adapter as a new folder, alone or merged into its base; return the folder.

    client: that client's own adapter instead. Raises CheckpointError for a folder that is no run's, has no such state
    or client, or cannot be written to.
    """
    from sheepfold import state as states
    from sheepfold.journal import RunFolder

    numbers, folder = _dtype(dtype), RunFolder(Path(run))
    experiment = folder.experiment()
    if best and not folder.best.is_file():
        raise CheckpointError(f"{run}: no best evaluation is kept, since stop.key is not set; export without --best")
    if best and client is not None:
        raise ConfigError("--best and --client: clients' own adapters are kept as of the last round; leave one out")
    state = states.load(folder.best if best else folder.latest)
    whole = state.whole() if client is None else _own_adapter(folder, client)
    if not whole.pairs:
        raise CheckpointError(
            f"{run}: adapter.method {experiment.adapter.method} has no LoRA pairs; its folders adapter/ and best/, "
            "written when the run ends, are already what plain PEFT and transformers load"
        )
    asked = task(experiment, tuple(folder.data().get("labels", ())))
    card = card_of(experiment, state.round, asked)
    if merged:
        export_merged(load_base(experiment.model, "cpu", task=asked), whole, out, numbers, card)
    else:
        with fresh_folder(out) as fresh:
            model = config_only(experiment.model, "cpu", asked).model
            export_peft(whole, fresh, model, card, experiment.model.revision)
    return Path(out)


def _own_adapter(run: "RunFolder", client: str) -> Adapter:
    from urllib.parse import unquote

    from sheepfold.local.store import folder_name

    folder = run.personal / folder_name(client)
    if not folder.is_dir():
        known = [unquote(path.name) for path in run.personal.glob("*")]
        raise CheckpointError(
            f"{run.path}: client {client!r} has no adapter of its own; "
            + (suggest(client, known) if known else "nobody has one beside the global one (see `personal`)")
        )
    if not (folder / "adapter_config.json").is_file() or run.experiment().adapter.method != "lora":
        raise CheckpointError(
            f"{folder}: is already what plain PEFT and transformers load; --client exports LoRA alone"
        )
    return peft_io.read_peft(str(folder))


def export_peft(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    model: nn.Module,
    card: Card,
    revision: str | None = None,
) -> None:
    """Write a PEFT folder with a model card. `model` is the base, for its shapes and names; meta will do."""
    conv1d = any(is_conv1d(module) for module in model.modules())
    peft_io.write_peft(
        adapter,
        folder,
        card.base,
        short_targets(adapter, model),
        fan_in_fan_out=conv1d,
        revision=revision,
        dropout=card.dropout,
        task_type=card.task.peft_type,
        whole=list(card.task.whole(model)) if adapter.extra else None,
    )
    how = (
        f"from peft import PeftModel\nfrom transformers import {card.task.auto_class}\n{_import_of(card.base)}\n"
        f"base = {card.loading(_name_of(card.base))}\n"
        'model = PeftModel.from_pretrained(base, "this folder")'
    )
    with writing(Path(folder)):
        Path(folder, "README.md").write_text(card.text("adapter", how), encoding="utf-8")


def export_merged(
    base: Base,
    adapter: Adapter,
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    card: Card | None = None,
) -> None:
    """Write the base with the adapter merged in: safetensors, configuration, tokenizer; the base itself stays as it is.

    The folder must be new or empty. Loaded with dtype float32 it gives the logits of base and adapter together, up to
    float32 rounding. Raises AdapterMismatch for an adapter of another base.
    """
    peft_io.check_fits(adapter, base.model)
    model: Any = base.model
    with fresh_folder(folder) as fresh:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in merged(model, adapter).items()}
        with quiet():
            model.save_pretrained(fresh, state_dict=tensors)
            base.tokenizer.save_pretrained(fresh)
        # What save_pretrained takes from the frozen base: its dtype, its silenced dropout, its ties.
        own = {"dtype": str(dtype).removeprefix("torch."), **base.dropout}
        untied = {} if _tied(model).isdisjoint(adapter.pairs) else {"tie_word_embeddings": False}
        _edit_json(fresh / "config.json", own | untied)
        card = card or Card(base.name, Path(folder).name, "LoRA", 0)
        how = f"from transformers import {card.task.auto_class}\n\n"
        how += f'model = {card.task.auto_class}.from_pretrained("this folder", dtype="float32")'
        (fresh / "README.md").write_text(card.text("merged model", how), encoding="utf-8")


def merged(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Return the model's state with W + scale * B @ A for every adapted weight, those in float32 or wider."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for path, pair in adapter.pairs.items():
        weight = state[f"{path}.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = pair.delta(torch.float64).to(weight.device, wide)
        stored = delta.T if is_conv1d(model.get_submodule(path)) else delta
        state[f"{path}.weight"] = weight.to(wide) + stored
    if odd := sorted(adapter.extra.keys() - state.keys()):
        raise AdapterMismatch(
            f"{odd[0]}: the adapter holds it whole, and the base has no such tensor; use its own base"
        )
    return state | dict(adapter.extra)


def short_targets(adapter: Adapter, model: nn.Module) -> list[str]:
    """Return the adapted modules' last names where they match nothing else in the model, else the full paths.

    PEFT reads both; other tools, and people, read short names better.
    """
    last = {path.rpartition(".")[2] for path in adapter.pairs}
    found = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if found == set(adapter.pairs) else adapter.pairs)


def _import_of(base: str) -> str:
    """Return the import line that a base's name needs: the built-in one is a folder of this package."""
    return "from sheepfold.models import BUILTIN\n" if base == "builtin:tiny" else ""


def _name_of(base: str) -> str:
    return "BUILTIN" if base == "builtin:tiny" else repr(base)


def card_of(experiment: "Experiment", rounds: int, asked: Task) -> Card:
    """Return what an experiment's exports say of it."""
    strategy = experiment.federation.strategy
    method = strategy if isinstance(strategy, str) else " + ".join(strategy)
    return Card(experiment.model.base, experiment.name, method, rounds, experiment.adapter.dropout, asked)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name!r}: {suggest(name, DTYPES)}")
    return DTYPES[name]


def _tied(model: Any) -> set[str]:
    """Return the output head's path, where its weight is the input embedding's too."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return set()
    return {name for name, module in model.named_modules() if module is head}


def _edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | changes, indent=2, sort_keys=True) + "\n", encoding="utf-8")
