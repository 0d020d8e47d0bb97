"""What leaves a run: PEFT folders, or the base with an adapter merged in, for plain transformers or llama.cpp.

merged: W + scale * B @ A, in float32, then in the dtype asked for
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sheepfold import peft_io
from sheepfold import state as states
from sheepfold.adapter import Adapter
from sheepfold.adapter_methods import WHOLE
from sheepfold.answering import source as sources
from sheepfold.answering.source import BEST, CLIENT, Source
from sheepfold.card import Card, card_of, card_of_adapter, card_of_run, loading
from sheepfold.errors import AdapterMismatch, CheckpointError, ConfigError, suggest
from sheepfold.folders import fresh_folder, replace_file, writing
from sheepfold.loading import quiet
from sheepfold.models import Base, config_only, load_base
from sheepfold.targets import is_conv1d, tied_head

if TYPE_CHECKING:
    from sheepfold.assembly import Parts
    from sheepfold.journal import RunFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FORMS = ("peft", "merged", "gguf", "adapters")


@dataclass(frozen=True, slots=True)
class Leaving:
    """One adapter on its way out."""

    source: Source
    name: str
    """Which of the source's adapters."""
    adapter: Adapter
    card: Card

    def about(self, base: Base | None = None) -> dict[str, str]:
        """Return what tells this export from all others, for its card; base: the weights that go into it."""
        other = {} if base is None else self._other_weights(base)
        return {"adapter hash": self.adapter.hash()} | other

    def base(self, say: Callable[[str], None]) -> Base:
        """Load the base, whole; it is said where its weights are not those that the run was trained on.

        No reason to refuse: a hub base and a copy of it in a folder have two fingerprints and the same weights, and an
        adapter that learned over a quantised base is meant for the whole one (QLoRA, arXiv:2305.14314).
        """
        loaded = load_base(self.source.model, "cpu", bits=0, task=self.source.task)
        for told in self._other_weights(loaded).values():
            say(f"{loaded.name}: its weights are {told}; measure what you export")
        return loaded

    def _other_weights(self, base: Base) -> dict[str, str]:
        run, bits, told = self.source.run, self.source.model.bits, {}
        if run is not None and (trained := run.data()["base"]) != base.fingerprint:
            told["base weights"] = (
                f"not known to be those that the run was trained on (fingerprint {base.fingerprint}, the run's "
                f"{trained})"
            )
        if bits and not base.bits:
            told["base in training"] = f"whole here, and were quantised to {bits} bits while clients trained"
        return told


def export(
    place: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = "peft",
    best: bool = False,
    client: str | None = None,
    dtype: str = "float32",
    base: str | None = None,
    adapter_config: Path | None = None,
    llama_cpp: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write what a run or an adapter's folder holds as a new folder, and return that folder.

    to: peft (one adapter), merged (the whole model), gguf (the same for llama.cpp) or adapters (every adapter of a run,
    one folder each). best, client: which adapter of a run, where not the last round's. dtype: of a merged model. base,
    adapter_config: see answering.source.find. llama_cpp: a checkout whose converter writes the gguf. say: is
    told where a run is merged into other weights than it was trained on. Raises SheepfoldError, in one line, for what
    is not there or cannot be written.
    """
    if to not in FORMS:
        raise ConfigError(f"--to {to!r}: {suggest(to, FORMS)}")
    if to in ("peft", "adapters") and dtype != "float32":
        raise ConfigError(
            f"--dtype {dtype} has no effect with --to {to}, which writes adapters as they are; leave it out"
        )
    if to != "gguf" and llama_cpp is not None:
        raise ConfigError(f"--llama-cpp has no effect with --to {to}; leave it out")
    if to == "adapters" and (best or client is not None):
        raise ConfigError("--to adapters writes all of them; leave out --best and --client")
    numbers = _dtype(dtype)
    source = sources.find(place, base=base, adapter_config=adapter_config)
    if len(source.names) == 1:
        raise CheckpointError(f"{place}: not a run's folder, nor an adapter's; name the folder that a run wrote")
    if to == "adapters":
        from sheepfold.multi_adapter import export_adapters

        return export_adapters(source, out)
    leaving = take(source, _which(source, best, client))
    if to == "peft":
        with fresh_folder(out) as fresh:
            export_one(leaving, fresh, config_only(source.model, "cpu", source.task).model)
    elif to == "merged":
        loaded = leaving.base(say)
        export_merged(loaded, leaving.adapter, out, numbers, leaving.card, leaving.about(loaded))
    else:
        from sheepfold.gguf_export import export_gguf

        export_gguf(leaving, out, numbers, Path(llama_cpp) if llama_cpp is not None else None, say)
    return Path(out)


def _which(source: Source, best: bool, client: str | None) -> str:
    """Return the name of the adapter asked for."""
    if best and client is not None:
        raise ConfigError("--best and --client: clients' own adapters are kept as of the last round; leave one out")
    if not best and client is None:
        return source.default
    if source.run is None:
        raise ConfigError(f"{source.name}: is one adapter, not a run; leave out --best and --client")
    if best and BEST not in source.names:
        raise CheckpointError(
            f"{source.run.path}: no best evaluation is kept, since stop.key is not set; export without --best"
        )
    if client is not None and CLIENT + client not in source.names:
        known = [name.removeprefix(CLIENT) for name in source.names if name.startswith(CLIENT)]
        raise CheckpointError(
            f"{source.run.path}: client {client!r} has no adapter of its own; "
            + (suggest(client, known) if known else "nobody has one beside the global one (see `personal`)")
        )
    return BEST if best else CLIENT + str(client)


def take(source: Source, name: str, card: Card | None = None) -> Leaving:
    """Return an adapter of a source with its card. Raises CheckpointError where it is not LoRA."""
    if not source.is_lora(name):
        raise CheckpointError(
            f"{source.place(name)}: holds no LoRA pairs alone; the folder, written when the run ends, is already what "
            "plain PEFT and transformers load"
        )
    return Leaving(source, name, source.adapter(name), card or cards_for(source, [name])[name])


def cards_for(source: Source, names: Sequence[str]) -> dict[str, Card]:
    """Return the cards of a source's adapters, with all that is known by now; the journal is read once for all.

    The base is the source's, which may not be the one that the run names: the card's origin says that one.
    """
    if source.run is None:
        return dict.fromkeys(names, card_of_adapter(source.model, source.name))
    model = source.model
    last = replace(card_of_run(source.run), base=model.base, revision=model.revision)
    own = replace(last, which="of one client, its own")
    cards = {name: own if name.startswith(CLIENT) else last for name in names}
    if BEST in names:
        best = states.load(source.run.best).round
        card = card_of_run(source.run, best, f"as of round {best}, its best evaluation")
        cards[BEST] = replace(card, base=model.base, revision=model.revision)
    return cards


def write_cards(run: "RunFolder") -> None:
    """Write a finished run's model_card.md, and the README.md of every adapter that it wrote."""
    source = sources.find(run.path)
    kind = "full model" if source.is_full else "adapter"
    for name, card in cards_for(source, source.names[1:]).items():
        about = {"adapter hash": str(source.adapter_hash(name))}
        files = {source.place(name) / "README.md": "this folder"}
        if name == source.default:
            files[run.path / "model_card.md"] = source.place(name).name
        with writing(run.path):
            for file, here in files.items():
                replace_file(file, card.text(kind, loading(card, kind, here), about).encode())


def save_adapter(parts: "Parts", adapter: Adapter, folder: str | os.PathLike[str], rounds: int) -> None:
    """Write a running experiment's adapter: LoRA as a PEFT folder, other methods as their own save_pretrained does.

    Its README.md says what is known by then; `write_cards` says the rest when the run has ended.
    """
    card = card_of(parts.experiment, rounds, parts.task)
    closed = parts.closed
    if closed is not None:
        adapter = closed.plug(adapter)
    if adapter.pairs:
        export_peft(adapter, folder, parts.base.model if closed is None else closed.outline.model, card)
        return
    engine = parts.engine if closed is None else closed.engine
    carrier: Any = engine.carrier  # type: ignore[union-attr]  # only the peft_model engine has no pairs
    with quiet(), writing(Path(folder)):
        if parts.experiment.train.sharding != "none" and parts.experiment.adapter.method == "full":
            save_model(replace(parts.base, model=carrier.model), Path(folder), state_dict=dict(adapter.extra))
            return  # no process has the whole model, and the adapter is all of it
        carrier.write(adapter)
        if parts.experiment.adapter.method in WHOLE:
            save_model(replace(parts.base, model=carrier.model), Path(folder))
        else:  # PEFT writes where the base was read from: a path of this machine
            carrier.model.save_pretrained(folder)
            _edit_json(Path(folder, peft_io.CONFIG), {"base_model_name_or_path": parts.base.name})


def save_model(base: Base, folder: Path, **other: Any) -> None:
    """Write a whole model as it is now, and its tokenizer.

    other: arguments of save_pretrained. The configuration's dropout, silenced when the base was loaded, is written as
    it was published.
    """
    model: Any = base.model
    with quiet():
        model.save_pretrained(folder, **other)
        base.tokenizer.save_pretrained(folder)
    _edit_json(folder / "config.json", base.dropout)


def export_one(leaving: Leaving, folder: Path, model: nn.Module) -> None:
    """Write one adapter on its way out as a PEFT folder, if it fits the base. Raises AdapterMismatch where not."""
    peft_io.check_fits(leaving.adapter, model)
    export_peft(leaving.adapter, folder, model, leaving.card, leaving.about())


def export_peft(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    model: nn.Module,
    card: Card,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write a PEFT folder with a model card. `model` is the base, for its shapes and names; meta will do."""
    conv1d = any(is_conv1d(module) for module in model.modules())
    peft_io.write_peft(
        adapter,
        folder,
        card.base,
        short_targets(adapter, model),
        fan_in_fan_out=conv1d,
        revision=card.revision,
        dropout=card.dropout,
        task_type=card.task.peft_type,
        whole=list(card.task.whole(model)) if adapter.extra else None,
    )
    with writing(Path(folder)):
        text = card.text("adapter", loading(card, "adapter"), about or {"adapter hash": adapter.hash()})
        Path(folder, "README.md").write_text(text, encoding="utf-8")


def export_merged(
    base: Base,
    adapter: Adapter,
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    card: Card | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the base with the adapter merged in: safetensors, configuration, tokenizer; the base itself stays as it is.

    The folder must be new or empty. Loaded with dtype float32 it gives the logits of base and adapter together, up to
    float32 rounding. Raises AdapterMismatch for an adapter of another base.
    """
    peft_io.check_fits(adapter, base.model)
    model: Any = base.model
    with fresh_folder(folder) as fresh:
        save_model(base, fresh, state_dict=_cast(merged(model, adapter), dtype))
        # what save_pretrained takes from the frozen base: its dtype, its ties
        own = {"dtype": str(dtype).removeprefix("torch.")}
        untied = {} if tied_head(model).isdisjoint(adapter.pairs) else {"tie_word_embeddings": False}
        _edit_json(fresh / "config.json", own | untied)
        card = card or Card(base.name, Path(folder).name)
        about = about or {"adapter hash": adapter.hash()}
        text = card.text("merged model", loading(card, "merged model"), about)
        (fresh / "README.md").write_text(text, encoding="utf-8")


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


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return floating-point tensors in another dtype; those that share memory go on sharing it, so are written once."""
    made: dict[Any, Tensor] = {}
    cast = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place not in made:
            made[place] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        cast[name] = made[place]
    return cast


def short_targets(adapter: Adapter, model: nn.Module) -> list[str]:
    """Return the adapted modules' last names where they match nothing else in the model, else the full paths.

    PEFT reads both; other tools, and people, read short names better.
    """
    last = {path.rpartition(".")[2] for path in adapter.pairs}
    found = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if found == set(adapter.pairs) else adapter.pairs)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name!r}: {suggest(name, DTYPES)}")
    return DTYPES[name]


def _edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | changes, indent=2, sort_keys=True) + "\n", encoding="utf-8")
