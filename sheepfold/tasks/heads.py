"""Which modules of a classifier are its head, and how a new one is drawn.

    bert        classifier                        distilbert   pre_classifier, classifier
    roberta     classifier (dense, out_proj)      deberta      pooler, classifier

The head is what transformers puts beside the encoder. PEFT's SEQ_CLS goes by names that end in `classifier` or `score`,
so a new pooler would be lost there; here all of the head is trained, sent and saved.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sheepfold.errors import ModelError, suggest
from sheepfold.rng import torch_stream


def head_modules(model: Any, named: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Return the modules that are trained whole, in module order, with the names of their tensors.

    named: by path, or by the end of one; None: whatever stands beside the encoder. Raises ModelError for a name that
    no module has, or whose modules have no weights.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if named is None:
        body = model.base_model_prefix
        chosen = [name for name, _ in model.named_children() if name != body and _tensors(model, name)]
    else:
        chosen = [n for n in modules if any(n == entry or n.endswith(f".{entry}") for entry in named)]
        for entry in named:
            if not any((n == entry or n.endswith(f".{entry}")) and _tensors(model, n) for n in chosen):
                known = {n.rpartition(".")[2] for n in modules if _tensors(model, n)}
                raise ModelError(f"adapter.modules_to_save: {entry!r} matches no module; {suggest(entry, known)}")
        chosen = [n for n in chosen if not any(n.startswith(f"{other}.") for other in chosen)]
    return {name: _tensors(model, name) for name in chosen}


def _tensors(model: Any, module: str) -> list[str]:
    return [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters()]


@torch.no_grad()
def draw(model: Any, names: Sequence[str], seed: int, base: str) -> None:
    """Fill these tensors anew, from streams of their own: linear weights normal, biases zero, norms one.

    The spread is the configuration's initializer_range (0.02), as transformers has it. Raises ModelError for layers of
    another kind.
    """
    std = float(getattr(model.config, "initializer_range", 0.02))
    for name in names:
        path, _, leaf = name.rpartition(".")
        layer, tensor = model.get_submodule(path), model.get_parameter(name)
        if leaf == "bias" and isinstance(layer, nn.Linear | nn.LayerNorm):
            tensor.zero_()
        elif leaf == "weight" and isinstance(layer, nn.LayerNorm):
            tensor.fill_(1.0)
        elif leaf == "weight" and isinstance(layer, nn.Linear):
            drawn = torch.empty(tensor.shape).normal_(0.0, std, generator=torch_stream(seed, "head", name))
            tensor.copy_(drawn)
        else:
            raise ModelError(
                f"model.base {base!r}: the weights lack {name}, of a {type(layer).__name__}, and a new head has linear "
                "layers and norms alone; choose a base that has this tensor"
            )
