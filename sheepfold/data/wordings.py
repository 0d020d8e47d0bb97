"""Fixed prompt wordings, those of the public formats and those of a user's own file.

The public ones are kept to the letter, line ends included:

    alpaca, alpaca_short, vigogne   end with a line end after "### Response:"
    alpaca_legacy                   ends with "### Response:" itself; FederatedScope-LLM's prompt
    vicuna, baize                   end with the speaker's mark, and the answer begins with a space
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sheepfold.data.rows import Record
from sheepfold.data.turns import Turns, record_turns, text_digest
from sheepfold.errors import ConfigError, DataError, suggest


@dataclass(frozen=True, slots=True)
class Wording:
    """A fixed wording. `{instruction}`, `{input}` and, where there is a place for one, `{system}` are filled in."""

    name: str
    prompt_input: str
    """For records with an input."""
    prompt_no_input: str
    response_split: str = ""
    """What stands before the answer: where to cut text that holds the prompt too."""
    prompt_next: str = ""
    """For the second turn of a conversation and those after; '' where the format has none."""
    system: str = ""
    """The system message where neither the settings nor the record have one."""
    answer_lead: str = ""
    """What an answer begins with."""

    @property
    def adds_specials(self) -> bool:
        return True

    def turns(self, record: Record) -> Turns:
        if not record.messages:
            wording = self.prompt_input if record.input else self.prompt_no_input
            prompt = self._fill(wording, instruction=record.instruction, input=record.input, system=self.system)
            return [(prompt, self.answer_lead + record.output)]
        messages, system = list(record.messages), self.system
        if messages[0].role == "system":
            system = self._system(messages.pop(0).content)
        if len(messages) > 2 and not self.prompt_next:
            raise DataError(
                f"data.template {self.name!r} has no wording for a second turn, and a conversation has "
                f"{len(messages) // 2}; take chat, vicuna or baize, or give your file a prompt_next"
            )
        pairs = zip(messages[::2], messages[1::2], strict=True)
        wordings = [self.prompt_no_input] + [self.prompt_next] * (len(messages) // 2 - 1)
        return [
            (self._fill(wording, instruction=ask.content, system=system), self.answer_lead + answer.content)
            for wording, (ask, answer) in zip(wordings, pairs, strict=True)
        ]

    def fingerprint(self, records: Sequence[Record]) -> str:
        return text_digest(record_turns(self, records))

    def with_system(self, system: str | None) -> "Wording":
        """Return the wording with another system message; raise ConfigError where it has no place for one."""
        if system is None:
            return self
        if "{system}" not in self.prompt_no_input:
            raise ConfigError(
                f"data.system has no effect with data.template {self.name!r}; take chat or vicuna, or remove it"
            )
        return replace(self, system=system)

    def _system(self, content: str) -> str:
        if "{system}" not in self.prompt_no_input:
            raise DataError(
                f"data.template {self.name!r} has no place for a conversation's system message ({content[:40]!r}); "
                "take chat or vicuna, or leave those messages out"
            )
        return content

    def _fill(self, wording: str, **values: str) -> str:
        try:
            return wording.format(**values)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise DataError(
                f"data.template {self.name!r}: cannot fill in {wording[:60]!r} ({error}); use {{instruction}} and "
                "{{input}}, and write other braces twice: {{ }}"
            ) from None


def from_file(name: str) -> Wording | None:
    """Return the wording of a JSON file in Shepherd's format, with prompt_next, system and answer_lead beside it."""
    path = Path(name).expanduser()
    if path.suffix != ".json":
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"data.template: no template file {path}; or name one of {', '.join(WORDINGS)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.template {path}: not a readable JSON file ({error})") from None
    needed, known = ("prompt_input", "prompt_no_input"), {*Wording.__dataclass_fields__, "description"} - {"name"}
    if not isinstance(values, Mapping) or any(key not in values for key in needed):
        raise ConfigError(f"data.template {path}: expected an object with {' and '.join(needed)}")
    if wrong := [key for key in values if key not in known]:
        raise ConfigError(f"data.template {path}: unknown key {wrong[0]!r}; {suggest(wrong[0], known)}")
    if wrong := [key for key, value in values.items() if not isinstance(value, str)]:
        raise ConfigError(f"data.template {path}: {wrong[0]} is a {type(values[wrong[0]]).__name__}; expected text")
    return Wording(**{**{key: value for key, value in values.items() if key != "description"}, "name": name})


_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_FIELDS_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
_FIELDS = "### Instruction:\n{instruction}\n\n### Response:"

WORDINGS: dict[str, Wording] = {
    wording.name: wording
    for wording in (
        # tatsu-lab/stanford_alpaca train.py has the wording without the last line end; tloen/alpaca-lora
        # templates/alpaca.json, which Shepherd and FlexLoRA use, has it with one.
        Wording("alpaca", _WITH_INPUT + _FIELDS_INPUT + "\n", _WITHOUT + _FIELDS + "\n", "### Response:"),
        Wording("alpaca_legacy", _WITH_INPUT + _FIELDS_INPUT, _WITHOUT + _FIELDS, "### Response:"),
        # tloen/alpaca-lora templates/alpaca_short.json
        Wording("alpaca_short", _FIELDS_INPUT + "\n", _FIELDS + "\n", "### Response:"),
        # tloen/alpaca-lora templates/vigogne.json
        Wording(
            "vigogne",
            "Ci-dessous se trouve une instruction qui décrit une tâche, associée à une entrée qui fournit un contexte "
            "supplémentaire. Écrivez une réponse qui complète correctement la demande.\n\n"
            "### Instruction:\n{instruction}\n\n### Entrée:\n{input}\n\n### Réponse:\n",
            "Ci-dessous se trouve une instruction qui décrit une tâche. Écrivez une réponse qui complète correctement "
            "la demande.\n\n### Instruction:\n{instruction}\n\n### Réponse:\n",
            "### Réponse:",
        ),
        # Ours: nothing but the texts.
        Wording("plain", "{instruction}\n{input}\n", "{instruction}\n"),
        # lm-sys/FastChat fastchat/conversation.py, vicuna_v1.1: two separators, " " and "</s>". It knows no input,
        # which goes below the instruction.
        Wording(
            "vicuna",
            "{system} USER: {instruction}\n\n{input} ASSISTANT:",
            "{system} USER: {instruction} ASSISTANT:",
            "ASSISTANT:",
            "USER: {instruction} ASSISTANT:",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions.",
            " ",
        ),
        # project-baize/baize-chatbot preprocess.py. Its answers end where the next "[|Human|]" begins; ours also get
        # EOS, so that generation ends by itself.
        Wording(
            "baize",
            "The conversation between human and AI assistant.\n[|Human|] {instruction}\n\n{input}\n[|AI|]",
            "The conversation between human and AI assistant.\n[|Human|] {instruction}\n[|AI|]",
            "[|AI|]",
            "\n[|Human|] {instruction}\n[|AI|]",
            "",
            " ",
        ),
    )
}
