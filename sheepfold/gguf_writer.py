"""Our own GGUF writer: Llama and Mistral models with a byte-level BPE tokenizer.

A GGUF file names its pre-tokenizer (how text is cut before merging) instead of describing it, so only tokenizers that
one of llama.cpp's names describes exactly are written; any other is refused, since llama.cpp would cut text elsewhere
and answer worse, in silence.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sheepfold.errors import ModelError, require

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
ELSEWHERE = "use llama.cpp's own converter (--llama-cpp FOLDER)"
NEWLINE = "\u010a"
"""A line feed, in the alphabet of byte-level BPE."""

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LINES = {"type": "Split", "pattern": {"Regex": "\\n"}, "behavior": "Isolated", "invert": False}
_LLAMA3 = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
PRE_TOKENIZERS: Mapping[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_BYTES], False),
    "smollm": ([_DIGITS, _BYTES], False),
    "llama-bpe": (
        [
            {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
        True,
    ),
}
"""llama.cpp's name -> how text is cut, as tokenizer.json has it, and whether whole tokens win over merges"""


def check_installed() -> None:
    """Raise ConfigError unless the gguf package is there."""
    require("--to gguf", "gguf", "gguf")


def write(path: Path, config: Any, tokenizer: Any, state: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> None:
    """Write a model's state, by transformers' names, as a GGUF file. Raises ModelError for what it cannot hold."""
    import gguf

    _check_model(config)
    vocabulary = _vocabulary(tokenizer, config)
    arch = gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _add_shape(writer, config, name, dtype)
    _add_tokenizer(writer, tokenizer, vocabulary)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = state.get("lm_head.weight") is not None and torch.equal(
        state["lm_head.weight"], state["model.embed_tokens.weight"]
    )
    for key, tensor in state.items():
        if key == "lm_head.weight" and tied:
            continue  # a file without an output head uses the embedding
        theirs = names.get_name(key, try_suffixes=(".weight",))
        if theirs is None:
            raise ModelError(f"{key}: has no place in a GGUF of the Llama family; {ELSEWHERE}")
        _add_tensor(writer, theirs, rotated(key, tensor, config), dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rotated(key: str, tensor: Tensor, config: Any) -> Tensor:
    """Return a weight as llama.cpp wants it: rows of q and k in pairs (0, h/2), (1, h/2 + 1), ... of each head.

    transformers turns a head's first half against its second half; llama.cpp turns neighbours.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads is None:
        return tensor
    rows, columns = tensor.shape
    return tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _check_model(config: Any) -> None:
    kind = (config.architectures or [type(config).__name__])[0]
    if kind not in ARCHITECTURES:
        raise ModelError(f"{kind}: our GGUF writer knows {' and '.join(ARCHITECTURES)}; {ELSEWHERE}")
    rope = getattr(config, "rope_parameters", None) or {}
    odd = {
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (getattr(config, "attention_bias", False), False),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "sliding_window": (getattr(config, "sliding_window", None), None),
    }
    for option, (found, wanted) in odd.items():
        if found != wanted:
            raise ModelError(f"{kind}: {option} is {found!r}, and our GGUF writer knows {wanted!r} alone; {ELSEWHERE}")


def _add_shape(writer: Any, config: Any, name: str, dtype: torch.dtype) -> None:
    import gguf

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = gguf.LlamaFileType
    file_type = {torch.float32: kinds.ALL_F32, torch.float16: kinds.MOSTLY_F16, torch.bfloat16: kinds.MOSTLY_BF16}
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type[dtype])


def _add_tensor(writer: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Add a tensor; vectors (norms) stay in float32, as llama.cpp expects."""
    import gguf

    if tensor.ndim < 2 or dtype == torch.float32:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    elif dtype == torch.float16:
        writer.add_tensor(name, tensor.to(dtype).contiguous().numpy())
    else:  # numpy has no bfloat16: its bytes
        raw = tensor.to(dtype).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _vocabulary(tokenizer: Any, config: Any) -> dict[str, Any]:
    """Return the tokenizer as tokenizer.json has it, with llama.cpp's name of its pre-tokenizer under 'pre'."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    model = settings["model"]
    why = None
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("unk_token") is not None:
        why = f"a {model['type']} tokenizer that is not byte-level BPE"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        why = "BPE with marks or dropout of its own"
    elif settings.get("normalizer") is not None:
        why = f"a tokenizer that rewrites text first ({settings['normalizer']['type']})"
    elif odd := [t["content"] for t in settings["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]]:
        why = f"special token {odd[0]!r} takes spaces with it"
    elif (pre := pre_tokenizer(settings)) is None:
        why = "a pre-tokenizer that llama.cpp has no name for, as far as we know"
    if why is not None:
        raise ModelError(f"--to gguf: {why}; {ELSEWHERE}")
    return settings | {"pre": pre, "size": config.vocab_size}


def pre_tokenizer(settings: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name for how a tokenizer cuts text; None where there is no exact one.

    A cut at each line feed needs no name of its own where no token holds a line feed and more: merging then stops there
    anyway, and what stands left and right of it is cut in the same places.
    """
    told = settings.get("pre_tokenizer") or {"type": "none"}
    steps = told["pretokenizers"] if told["type"] == "Sequence" else [told]
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
    model = settings["model"]
    if all(token == NEWLINE or NEWLINE not in token for token in model["vocab"]):
        steps = [step for step in steps if step != _LINES]
    whole = bool(model.get("ignore_merges"))
    return next((name for name, known in PRE_TOKENIZERS.items() if known == (steps, whole)), None)


def _add_tokenizer(writer: Any, tokenizer: Any, settings: Mapping[str, Any]) -> None:
    import gguf

    kinds = gguf.TokenType
    tokens: dict[int, tuple[str, Any]] = {i: (token, kinds.NORMAL) for token, i in settings["model"]["vocab"].items()}
    for added in settings["added_tokens"]:
        tokens[added["id"]] = (added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    filled = [tokens.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(settings["size"])]
    merges = settings["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(settings["pre"])
    writer.add_token_list([token for token, _ in filled])
    writer.add_token_types([kind for _, kind in filled])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(number)
    first, last = _framed(tokenizer)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _framed(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether the tokenizer puts BOS before a text, and EOS behind it. Raises ModelError for anything else."""
    bare, framed = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    at = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    before, behind = framed[:at], framed[at + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or behind not in ([], [tokenizer.eos_token_id]):
        raise ModelError(f"--to gguf: the tokenizer frames a text by {before} and {behind}; {ELSEWHERE}")
    return bool(before), bool(behind)
