"""The model that the harness asks: its own HFLM around a model that is in memory already.

Prompts, log-likelihoods and answers are the harness's; ours are which adapter answers, the template around a prompt,
what fits, and that the padding of a batch changes no answer under virtual tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from sheepfold.data.rows import Record
from sheepfold.data.turns import Template
from sheepfold.evaluation import soft_prompts
from sheepfold.models import max_positions


class Model(HFLM):  # type: ignore[misc]  # the harness has no types
    """A transformers model under one adapter. `template` None: the harness's plain prompts."""

    _model: Any

    def __init__(self, model: Any, tokenizer: Any, batch_rows: int, template: Template | None) -> None:
        taken, limit = soft_prompts.virtual_tokens(model), max_positions(model.config)
        room = limit - taken if taken and limit is not None else None  # None: as the harness finds it
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_rows, max_length=room)
        self.template = template

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True, scored: bool = False
    ) -> str:
        """Return a benchmark's prompt as an instruction in the template.

        The description, which the harness hands over as a system message, begins the instruction. scored: an answer's
        likelihood is asked for, so that what the template begins answers with (`answer_lead`) belongs to the prompt; an
        answer that the model gives itself begins with it.
        """
        assert self.template is not None
        *asked, last = [message["content"] for message in chat_history]
        begun = "" if add_generation_prompt else last
        instruction = "".join(asked if begun else [*asked, last])
        prompt = _first_prompt(self.template, instruction)
        lead = str(getattr(self.template, "answer_lead", "")) if scored or begun else ""
        return prompt + lead + begun

    def fits(self, request: Any) -> bool:
        """Return whether a request fits the model's positions, its answer included."""
        if request.request_type == "generate_until":
            text, settings = request.args[:2]
            return bool(len(self.tok_encode(text)) <= self.max_length - self.new_tokens(settings))
        if request.request_type == "loglikelihood":
            given, answer = request.args[:2]
            # As many as the positions and one more: the last token of an answer is never put in.
            return not given or bool(sum(map(len, self._encode_pair(given, answer))) <= self.max_length + 1)
        return True  # loglikelihood_rolling goes over a text in windows

    def new_tokens(self, settings: dict[str, Any]) -> int:
        """Return the longest answer that a task's generation settings allow."""
        return int(normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """As the harness's, without its bar."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """As the harness's, without its bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """As the harness's, without its bar."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        """As the harness's; under virtual tokens the same answers in any batch (see soft_prompts.py).

        context: (rows, longest prompt), padded on the left; returns it with the new tokens behind.
        """
        if not soft_prompts.virtual_tokens(self._model):
            return super()._model_generate(context, max_length, stop, **settings)  # type: ignore[no-any-return]
        mask, width, whole = settings.pop("attention_mask"), context.shape[1], self._model
        lengths = mask.sum(1) if soft_prompts.needs_equal_lengths(whole) else torch.full((len(context),), width)
        found = torch.full((len(context), max_length), self.tokenizer.pad_token_id).to(context)
        found[:, :width] = context
        self._model = _Soft(whole)
        try:
            for length in lengths.unique().tolist():
                rows = (lengths == length).nonzero().flatten().to(context.device)
                asked, seen = context[rows, width - length :], mask[rows, width - length :]
                most = length + max_length - width
                out = super()._model_generate(asked, most, stop, attention_mask=seen, **settings)
                found[rows, width : width + out.shape[1] - length] = out[:, length:]
        finally:
            self._model = whole
        return found

    def templates(self, scored: bool) -> Any:
        """Return apply_chat_template for a task whose answers are scored, or given."""
        return partial(self.apply_chat_template, scored=scored)


class _Soft:
    """A PEFT model with virtual tokens, whose `generate` is asked as soft_prompts.py says."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_length: int, **settings: Any) -> Any:
        plain, inputs = soft_prompts.asked(self.model, input_ids, attention_mask, settings.get("num_beams", 1))
        return plain.generate(**inputs, max_new_tokens=max_length - input_ids.shape[1], **settings)


def _first_prompt(template: Template, instruction: str) -> str:
    prompt = getattr(template, "prompt", None)  # a chat template's, which may rewrite turns that have an answer
    record = Record(instruction, "")
    return str(prompt(record)) if prompt is not None else template.turns(record)[0][0]
