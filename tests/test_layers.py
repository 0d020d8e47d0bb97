"""A model cut to some of its blocks is those blocks: in memory, read from its folder, and token by token."""

import functools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.errors import ConfigError, ModelError
from sheepfold.layers import keep_layers, kept_indices, layer_list
from tests import encoders, small

SIX = {"num_hidden_layers": 6, "initializer_range": 0.2}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
LLAMA = small._SHAPE | SIX
MOE = LLAMA | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SPARSE = LLAMA | {
    "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | WINDOWS),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | WINDOWS | {"head_dim": 8}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", MOE | {"mlp_only_layers": [1, 2]}),
    "deepseek": ("DeepseekV3ForCausalLM", SPARSE),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 4}),
    "gemma": ("GemmaForCausalLM", LLAMA | {"head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", LLAMA | {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 3}),
    "gpt2": ("GPT2LMHeadModel", small._GPT2 | {"n_layer": 6, "initializer_range": 0.2}),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 32, "num_layers": 6, "num_heads": 4, "vocab_size": 97, "window_size": 4,
         "attention_types": [[["global", "local"], 3]], "max_position_embeddings": 64, "initializer_range": 0.2},
    ),
    "opt": ("OPTForCausalLM", small._OPT | {"num_hidden_layers": 6, "init_std": 0.2}),
    "phi": ("PhiForCausalLM", LLAMA),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    family: (name, config | ({"n_layers": 6} if family == "distilbert" else SIX))
    for family, (name, config) in encoders.FAMILIES.items()
} | {"bare bert": ("BertModel", encoders.BERT | SIX), "masked bert": ("BertForMaskedLM", encoders.BERT | SIX)}
FAMILIES = CAUSAL | ENCODERS
KEPT = {"modernbert": (0, 1, 4)}
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def six_layers(family: str, **over: Any) -> Any:
    name, config = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**(config | over))).eval()


def cut(family: str, kept: tuple[int, ...], **over: Any) -> Any:
    model = six_layers(family, **over)
    keep_layers(model, kept)
    return model


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    return model(input_ids=IDS)[0]


def skipping(model: Any, kept: tuple[int, ...]) -> torch.Tensor:
    """Return what the whole model says when the other blocks hand on what they are given."""

    def skip(_block: Any, args: Any, keywords: Any, out: Any) -> Any:
        given = args[0] if args else keywords["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    for index, block in enumerate(model.get_submodule(layer_list(model))):
        if index not in kept:
            block.register_forward_hook(skip, with_kwargs=True)
    return output(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_is_the_blocks_kept_in_memory_and_in_its_folder(family, tmp_path):
    kept = KEPT.get(family, (1, 3, 5))
    model = cut(family, kept)
    torch.testing.assert_close(output(model), skipping(six_layers(family), kept), rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert again.config.num_hidden_layers == 3
    assert torch.equal(output(again.eval()), output(model))


@pytest.mark.parametrize("family", CAUSAL)
def test_a_cut_model_generates_with_its_cache_what_it_says_without(family):
    model, ids = cut(family, (0, 2, 5)), IDS
    told = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(told, ids)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    assert len(cache.layers) == 3


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "distilbert"])
def test_outlines_are_cut_like_models(family):
    with torch.device("meta"):
        outline = six_layers(family)
    keep_layers(outline, (1, 3, 5))
    assert {n: t.shape for n, t in outline.state_dict().items()} == {
        n: t.shape for n, t in cut(family, (1, 3, 5)).state_dict().items()
    }
    assert all(p.is_meta for p in outline.parameters())


def test_lists_and_numbers_of_the_configuration_follow_the_blocks():
    before, after = six_layers("gemma3").config, cut("gemma3", (0, 2, 3)).config
    assert after.layer_types == [before.layer_types[i] for i in (0, 2, 3)]
    assert set(cut("gemma3", (0, 1)).config.layer_types) == {"sliding_attention"}
    qwen = cut("qwen3", (0, 1, 4, 5)).config
    assert qwen.max_window_layers == 2
    assert qwen.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert cut("qwen3", (3, 4)).config.max_window_layers == 0
    assert cut("qwen3-moe", (0, 2, 5)).config.mlp_only_layers == [1]
    assert cut("deepseek", (1, 3, 5)).config.first_k_dense_replace == 1


def test_a_list_of_tokens_as_long_as_the_model_stays_whole():
    assert cut("llama", (0, 1), eos_token_id=[2, 3, 4, 5, 6, 7]).config.eos_token_id == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_ties_and_number_formats_stay(family, dtype, tmp_path):
    model = six_layers(family).to(dtype)
    keep_layers(model, (2, 4))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    for one in (model, again):
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert {p.dtype for p in one.parameters()} == {dtype}


def test_layers_in_another_list_are_cut_by_name():
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            d_model=32, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=32, decoder_ffn_dim=32,
            encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=97,
        )
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"2 lists of 6 .* model.encoder.layers \(6\), model.decoder.layers .*--list"):
        layer_list(bart)
    assert layer_list(bart, "model.decoder.layers") == "model.decoder.layers"
    with pytest.raises(ModelError, match="which are all that can be cut"):  # num_hidden_layers is the encoder's
        keep_layers(bart, (0, 1), "model.decoder.layers")
    keep_layers(bart, (0, 1), "model.encoder.layers")
    assert (bart.config.encoder_layers, bart.config.decoder_layers) == (2, 6)


def test_lists_that_are_none_are_refused_with_those_there_are():
    with pytest.raises(ModelError, match=r"'encoder.layers': no list .* did you mean 'encoder.layer'\?"):
        layer_list(six_layers("bare bert"), "encoder.layers")
    albert = transformers.AlbertModel(
        transformers.AlbertConfig(vocab_size=97, hidden_size=32, num_attention_heads=4, intermediate_size=32)
    )
    with pytest.raises(ModelError, match=r"no lists of 12 blocks.*encoder.albert_layer_groups \(1\)"):
        keep_layers(albert, (0,))
    with pytest.raises(ModelError, match="its 1 modules are not the 12 blocks"):
        keep_layers(albert, (0,), "encoder.albert_layer_groups")


@pytest.mark.parametrize(
    ("family", "over", "message"),
    [
        ("modernbert", {}, "attn_norm: class is LayerNorm among 6 blocks, and Identity"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"h.1.attn: scaling is 0.17\d+ among 6 blocks, and 0.35"),
        ("qwen3-moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}, "mlp: class is Qwen3MoeSparseMoeBlock"),
    ],
)
def test_blocks_that_are_built_by_their_place_are_refused_and_the_model_stays_whole(family, over, message):
    model = six_layers(family, **over)
    config = model.config.to_dict()
    with pytest.raises(ModelError, match=message):
        keep_layers(model, (1, 3, 5))
    assert model.config.to_dict() == config
    assert torch.equal(output(model), output(six_layers(family, **over)))


def test_a_model_changed_by_hand_is_refused():
    model = six_layers("bare bert")
    model.encoder.layer[3].attention = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"layer.3.attention.self: is not in this model .* cut it before changing it"):
        keep_layers(model, (1, 3, 5))
    assert len(model.encoder.layer) == 6


def test_a_configuration_that_builds_nothing_is_refused():
    model = six_layers("llama")
    model.config.hidden_act = "no such thing"
    with pytest.raises(ModelError, match="LlamaForCausalLM: its configuration with 6 blocks builds no model"):
        keep_layers(model, (0, 1))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "at least one"),
        ((6,), "no block 6; this model has 6, 0 to 5"),
        ((-1,), "no block -1"),
        ((1, 1), "block 1 is named twice"),
        ((3, 1), "block 1 is named behind 3"),
    ],
)
def test_layers_that_make_no_model_are_refused(layers, message):
    with pytest.raises(ConfigError, match=message):
        kept_indices(6, layers)


@given(st.integers(1, 9), st.lists(st.integers(-2, 10), max_size=6))
def test_layers_are_taken_where_they_are_a_rising_choice(total, layers):
    rising = bool(layers) and layers == sorted(set(layers)) and set(layers) <= set(range(total))
    take = functools.partial(kept_indices, total, layers)
    if rising:
        assert take() == tuple(layers)
    else:
        with pytest.raises(ConfigError):
            take()
