"""The model card: what an adapter is, what it was made of and by, what was measured, and what to keep in mind.

    README.md of an export, model_card.md of a run:  hub front matter ── words and code ── tables of facts

Every figure comes from the run's folder (experiment.yaml, data.json, rounds.jsonl, closing.json, eval/*.json), so a
card can be written again later, with what was measured since. Clients are counted, not named.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from sheepfold import card_facts
from sheepfold.adapter_methods import WHOLE
from sheepfold.card_facts import Table
from sheepfold.config import CardSettings, ModelSettings
from sheepfold.tasks import task_of
from sheepfold.tasks.base import Task
from sheepfold.tasks.causal_lm import CAUSAL_LM

if TYPE_CHECKING:
    from sheepfold.config import Experiment
    from sheepfold.journal import RunFolder

KINDS: Mapping[str, tuple[str, str]] = {
    "adapter": ("peft", "This is {kind} adapter of `{base}`"),
    "adapters": ("peft", "{kinds} adapters of `{base}`, one a folder"),
    "merged model": ("transformers", "`{base}` with {kind} adapter merged in"),
    "full model": ("transformers", "`{base}` with all its weights fine-tuned"),
    "GGUF model": ("gguf", "`{base}` with {kind} adapter merged in, as GGUF"),
}
"""What an export is -> the library that loads it, and how the card's first sentence begins."""
UNSAID = "not stated"
PLAIN_WORDS = """\
- Rows stayed with the clients. What they sent, round for round, were changes of the adapter, and whoever runs the
  server sees each of them: a change tells something of the rows that it was learned from.
- No differential privacy and no secure aggregation took part. The adapter may repeat training text, rare rows above
  all, as any fine-tuned model may.
- It was measured on the rows and tasks named here and on nothing else. Whatever the base may do wrong, it may do too.
"""


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card says of an export."""

    base: str
    run: str
    method: str | None = None
    """The strategy that folded the adapter; None where no run is known."""
    rounds: int = 0
    in_one_place: str = ""
    """What was done, where the rows were in one place: such as '5 epochs on 1,710 rows'."""
    dropout: float = 0.0
    """The adapter's dropout in training; PEFT keeps it for whoever trains on."""
    revision: str | None = None
    said: CardSettings = field(default_factory=CardSettings)
    """Licences and words that only people know."""
    kind: str = "LoRA"
    """What was trained: LoRA, or another method's name."""
    which: str = ""
    """Which of the run's adapters this is, such as 'as of round 4, its best evaluation'."""
    datasets: tuple[str, ...] = ()
    """Hub ids of the training data, where it is on the hub."""
    task: Task = CAUSAL_LM
    tables: Mapping[str, Table] = field(default_factory=dict)
    """heading -> what was done and measured"""

    def text(self, kind: str, how: str, about: Mapping[str, str] | None = None) -> str:
        """Return the README.md of an export.

        kind: one of KINDS; how: a fenced block that loads it; about: further facts of this export, such as its hash.
        """
        rounds = f"{self.rounds} round{'' if self.rounds == 1 else 's'}"
        made = f", federated with sheepfold: {self.method}, {rounds}" if self.method else ""
        unknown = "" if self.in_one_place else " How it was trained is not stated."
        if self.in_one_place:
            made = f", trained in one place with sheepfold: {self.in_one_place}"
        kind_of = f"{'an' if self.kind[0] in 'aeio' else 'a'} {self.kind}"
        sentence = KINDS[kind][1].format(kind=kind_of, kinds=self.kind, base=self.base)
        parts = [
            f"# {self.run}",
            f"{sentence}{made}."
            + (f" It is the adapter {self.which}." if self.which else "")
            + (" Training data stayed with the clients." if self.method else unknown),
            *([f"Intended use: {self.said.intended_use}"] if self.said.intended_use else []),
            how.strip(),
            "## Licences\n\n" + _rows(("", ""), list(self.licences().items())),
        ]
        tables = {"This export": (("", ""), list(about.items()))} | dict(self.tables) if about else self.tables
        parts += [f"## {heading}\n\n{_rows(*table)}" for heading, table in tables.items()]
        if self.method:
            parts.append(f"## Limits\n\n{PLAIN_WORDS.strip()}")
        return self._front(kind) + "\n" + "\n\n".join(parts) + "\n"

    def licences(self) -> dict[str, str]:
        """Return the licence of the adapter, the base and the data, as far as anyone said."""
        return {
            "adapter": self.said.license or UNSAID,
            "base": self.said.base_license or stated_license(self.base, self.revision) or UNSAID,
            "training data": self.said.data_license or UNSAID,
            **({"authors": ", ".join(self.said.authors)} if self.said.authors else {}),
        }

    def _tag(self) -> str:
        """Return the method as the hub's tags spell it: lora, ia3, prefix-tuning, full-fine-tuning, ..."""
        return "full-fine-tuning" if self.kind in WHOLE else self.kind.lower().replace("_", "-")

    def _front(self, kind: str) -> str:
        values: dict[str, object] = {
            "library_name": KINDS[kind][0],
            "pipeline_tag": self.task.pipeline,
            "tags": [self._tag(), "sheepfold", *(["federated-learning"] if self.method else [])],
        }
        if is_hub_id(self.base):
            values |= {"base_model": self.base, "base_model_relation": "adapter" if "adapter" in kind else "finetune"}
        if self.datasets:
            values["datasets"] = list(self.datasets)
        if own := self.said.license:  # the hub's own ids have no spaces; any other licence is named beside `other`
            known = re.fullmatch(r"[a-z0-9.-]+", own)
            values |= {"license": own} if known else {"license": "other", "license_name": own}
        return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def is_hub_id(base: str) -> bool:
    """Return whether a base's name is one of the hub's, and no folder or built-in base."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None and base[0] != "." and not Path(base).exists()


def stated_license(base: str, revision: str | None = None) -> str | None:
    """Return the licence that the base's README.md names in its front matter, from its folder or the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    from sheepfold.models import BUILTIN

    if base == "builtin:tiny":
        file: Path | str | object = BUILTIN / "README.md"
    elif is_hub_id(base):
        file = try_to_load_from_cache(base, "README.md", revision=revision)
    else:
        file = Path(base).expanduser() / "README.md"
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---", Path(file).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None  # a stranger's README is no reason to fail: its licence is then not stated
    found = (values.get("license_name") or values.get("license")) if isinstance(values, dict) else None
    return str(found) if found else None


def card_of(experiment: "Experiment", rounds: int, asked: Task) -> Card:
    """Return what an experiment, whose task this is, says of its exports by itself: all but data and measurements."""
    source, strategy = experiment.data.source, experiment.federation.strategy
    return Card(
        base=experiment.model.base,
        run=experiment.name,
        method=strategy if isinstance(strategy, str) else " + ".join(strategy),
        rounds=rounds,
        dropout=experiment.adapter.dropout,
        kind="LoRA" if experiment.adapter.method == "lora" else experiment.adapter.method,
        revision=experiment.model.revision,
        said=experiment.card,
        datasets=(source,) if "/" in source and is_hub_id(source) and not experiment.data.path else (),
        task=asked,
        tables=card_facts.asked(experiment),
    )


def card_of_run(run: "RunFolder", round: int | None = None, which: str = "") -> Card:
    """Return what a run's folder says of an adapter of it, as of a round (None: the last)."""
    experiment, lines = run.experiment(), run.lines()
    asked = task_of(run)
    if not lines:
        return card_of(experiment, 0, asked)
    round = lines[-1]["round"] if round is None else round
    card = card_of(experiment, round, asked)
    return replace(card, which=which, tables=card_facts.measured(run, lines, round) | dict(card.tables))


def card_of_adapter(model: ModelSettings, name: str) -> Card:
    """Return what is known of an adapter that came without its run."""
    return Card(model.base, name, revision=model.revision)


def loading(card: Card, kind: str, folder: str = "this folder") -> str:
    """Return the block of a card that loads an adapter (by PEFT) or a whole model (by transformers)."""
    auto, labels = card.task.auto_class, card.task.labels
    imported = f"from transformers import {auto}\n"
    if kind != "adapter":  # its configuration holds the labels
        return _python(f'{imported}\nmodel = {auto}.from_pretrained("{folder}", dtype="float32")')
    head = f", num_labels={len(labels)}, id2label={dict(enumerate(labels))!r}" if labels else ""
    builtin = card.base == "builtin:tiny"  # a folder of this package
    base = "BUILTIN" if builtin else repr(card.base)
    return _python(
        f"from peft import PeftModel\n{imported}"
        + ("from sheepfold.models import BUILTIN\n" if builtin else "")
        + f'\nbase = {auto}.from_pretrained({base}{head}, dtype="float32")\n'
        f'model = PeftModel.from_pretrained(base, "{folder}")'
    )


def _python(code: str) -> str:
    return f"```python\n{code}\n```"
