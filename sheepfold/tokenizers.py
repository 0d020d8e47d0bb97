"""Tokenizers of bases: loaded as published, with an EOS and a pad token, never with new embedding rows.

Old LLaMA repositories name a class that no release of transformers had (`LLaMATokenizer`) and leave their
special tokens blank; transformers 5 then reads tokenizer.json and falls over the blanks, or reads
tokenizer.model into other ids.
"""

from typing import Any

from sheepfold.errors import ModelError
from sheepfold.loading import first_line, quiet

LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""LLaMA's special tokens, ids 1, 2 and 0; source: arXiv:2302.13971's released tokenizer.model."""


def read_tokenizer(
    where: str, base: str, revision: str | None = None, config: Any = None, *, needs_eos: bool = True
) -> Any:
    """Return the tokenizer of a folder or hub id, with EOS (where it needs one) and pad set.

    `config` is the model's, and gives EOS where the tokenizer has none. Raises ModelError where there is no
    tokenizer, or no token that could end an answer.
    """
    try:
        with quiet():
            tokenizer = _read(where, revision)
    except Exception as error:  # transformers raises anything from OSError to RecursionError here
        raise ModelError(
            f"model.base {base!r}: no usable tokenizer in {where} ({first_line(error)}); {_way_on(error)}"
        ) from None
    if len(tokenizer) - len(tokenizer.all_special_tokens) < 2:  # transformers 5 makes an empty one of no files at all
        raise ModelError(
            f"model.base {base!r}: no usable tokenizer in {where} (it knows special tokens and no words); "
            "set model.tokenizer to a hub id or folder that has one"
        )
    if needs_eos:
        _set_eos(tokenizer, config, base)
    _set_pad(tokenizer)
    return tokenizer


def _read(where: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer, LlamaTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import cached_file

    told = get_tokenizer_config(where, revision=revision, trust_remote_code=False)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    # A token published as "" sends transformers 5 into endless recursion: drop it, or name LLaMA's own.
    blank = [key for key in (*LLAMA_TOKENS, "pad_token") if told.get(key) == ""]
    if told.get("tokenizer_class") != "LLaMATokenizer":
        return AutoTokenizer.from_pretrained(where, **options, **dict.fromkeys(blank))
    if cached_file(where, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False):
        tokenizer = AutoTokenizer.from_pretrained(where, **options, **dict.fromkeys(blank))
        words = tokenizer.get_vocab()
        for key in blank:
            if (token := LLAMA_TOKENS.get(key)) in words:  # a token that is not there would need a new row
                setattr(tokenizer, key, token)
        return tokenizer
    options |= {key: LLAMA_TOKENS.get(key) for key in blank}
    # From tokenizer.model alone the class matters: another one splits the first word differently.
    return LlamaTokenizer.from_pretrained(where, add_bos_token=told.get("add_bos_token", True), **options)


def _set_eos(tokenizer: Any, config: Any, base: str) -> None:
    if tokenizer.eos_token_id is not None:
        return
    told = getattr(config, "eos_token_id", None)
    first = told[0] if isinstance(told, (list, tuple)) else told
    token = tokenizer.convert_ids_to_tokens(first) if first is not None else None
    if token is None:
        raise ModelError(
            f"model.base {base!r}: neither tokenizer nor config.json has an EOS token, so no answer could "
            "end; set eos_token in tokenizer_config.json"
        )
    tokenizer.eos_token = token


def _set_pad(tokenizer: Any) -> None:
    # Any token that has an embedding row will do: what is padding is known from lengths, never from the id,
    # so a row's own EOS stays visible even where pad is EOS. unk first, as Shepherd pads LLaMA with id 0.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _way_on(error: Exception) -> str:
    if any(name in str(error) for name in ("sentencepiece", "tiktoken", "protobuf")):
        return "a tokenizer.model alone needs `pip install sentencepiece protobuf`; or set model.tokenizer"
    return "set model.tokenizer to a hub id or folder that has one"
