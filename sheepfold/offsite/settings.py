"""The options of offsite-tuning, and what cannot go together with it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sheepfold.section import Positive, Section, Share

if TYPE_CHECKING:
    from sheepfold.config import Experiment

Group = Literal["layers", "embeddings", "head", "norm"]
Judged = Literal["emu", "full"]


class AlignData(Section):
    """Rows that the server has, and no client; they become tokens as the clients' rows do (data.template and so on)."""

    source: str
    """As data.source: corpus, a named set, a hub id, a local file or folder, or module:function."""
    path: str | None = None
    """A local file or folder with the named source's rows."""
    split: str = "train"
    """Which split of a hub data set."""
    fields: Mapping[str, str] = Field(default_factory=dict)
    """Field map, as data.fields."""
    rows: Positive | None = None
    """Take at most this many rows."""
    seed: int = 42
    """Seed of the built-in corpus."""


class AlignSettings(Section):
    """Distillation of the whole middle into what the emulator keeps of it, before round 1."""

    data: AlignData
    """Declared rows of the server's own; a run refuses rows that a client has too."""
    steps: Positive = 500
    """Optimizer steps."""
    batch_rows: Positive = 16
    """Rows per step."""
    optimizer: str = "adamw"
    """adamw, sgd, or any class of torch.optim by name."""
    optimizer_args: Mapping[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, such as momentum."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over the steps, from its peak to zero (linear, cosine)."""
    grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """L2 bound on the gradient; null: no bound."""
    kd_weight: Annotated[float, Field(ge=0)] = 0.9
    """Weight of the distance between the middles' hidden states, relative to the whole middle's RMS."""
    lm_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the emulator's own language model loss."""
    seed: int = 0
    """Seed of the rows' order."""

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if not self.kd_weight + self.lm_weight:
            raise ValueError("kd_weight 0 and lm_weight 0 leave nothing to learn; set one of them")
        return self


class OffsiteSettings(Section):
    """Clients get an emulator of model.base, and train its ends; the server plugs them into model.base."""

    emu_l: Annotated[int, Field(ge=0)] = 1
    """Bottom adapter layers: [0, emu_l), at least one."""
    emu_r: Positive = 10
    """Top adapter layers: from this one on, at least the last one."""
    drop_ratio: Share = 0.5
    """Share of the layers between that the emulator lacks; the first and the last of them stay."""
    layers: str | None = None
    """Path of the model's list of layers, such as model.layers; null: it is found."""
    train: Annotated[tuple[Group, ...], Field(min_length=1)] = ("layers",)
    """What is trained and sent: layers (the adapter layers), embeddings, head, norm (all else outside the layers)."""
    evaluate: Annotated[tuple[Judged, ...], Field(min_length=1)] = ("emu", "full")
    """Which model is judged on held-out rows: emu (the emulator), full (model.base with what was learned in it)."""
    align: AlignSettings | None = None
    """Distil the whole middle into the emulator's; null: its layers stay as they are."""

    @model_validator(mode="after")
    def _align_has_something_to_do(self) -> Self:
        if self.align is not None and not self.drop_ratio:
            raise ValueError("align has no effect with drop_ratio 0, whose emulator is the model itself; remove it")
        return self


def problem(experiment: "Experiment") -> str | None:
    """Return what an experiment has that cannot go with its offsite-tuning; None where all can."""
    offsite, method = experiment.offsite, experiment.adapter.method
    if offsite is None:
        return None
    if experiment.task != "causal_lm":
        return f"offsite with task {experiment.task}: emulators are of causal language models; remove offsite"
    if method not in ("lora", "full"):
        return f"offsite with adapter.method {method!r}: only lora, rslora and full have a place in the full model"
    if experiment.train.engine not in ("cohort", "peft_model", "auto"):
        return f"offsite with train.engine {experiment.train.engine}: set cohort or peft_model"
    if method == "lora" and set(offsite.train) != {"layers"}:
        return (
            f"offsite.train {', '.join(offsite.train)}: with adapter.method {method!r} the adapter layers get LoRA, "
            "and nothing is trained whole; set adapter.method full, or train: [layers]"
        )
    if experiment.adapter.start:
        return "adapter.start has no effect with offsite, whose layers have other numbers; remove it"
    return None
