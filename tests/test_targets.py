"""The modules that are adapted are PEFT's for the same arguments, and a fresh adapter changes nothing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
)

from sheepfold.errors import ConfigError, ModelError
from sheepfold.targets import TABLE, find_targets, linear_shape, new_adapter, peft_table

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
FFN = {"intermediate_size": 24}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, **FFN, num_key_value_heads=1),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2),
    "opt": OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=12, max_position_embeddings=32),
    "phi": PhiConfig(**SMALL, **FFN),
    "qwen2": Qwen2Config(**SMALL, **FFN, num_key_value_heads=1),
    "gemma": GemmaConfig(**SMALL, **FFN, num_key_value_heads=1, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**SMALL, **FFN),
    "bloom": BloomConfig(vocab_size=32, hidden_size=16, n_head=2, n_layer=2),
}


def build(family):
    return AutoModelForCausalLM.from_config(FAMILIES[family])


def sites_of_peft(family, targets):
    """The modules that PEFT itself replaces, in module order."""
    config = LoraConfig(target_modules=targets, task_type="CAUSAL_LM", r=2)
    model = get_peft_model(build(family), config).base_model.model
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_and_all_linear_choose_what_peft_chooses(family):
    assert list(find_targets(build(family), "auto")) == sites_of_peft(family, None)
    assert list(find_targets(build(family), "all-linear")) == sites_of_peft(family, "all-linear")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ("o_proj", "mlp.down_proj")),
        ("llama", ("model.layers.1.self_attn.q_proj",)),
        ("llama", ("proj", "q_proj")[1:]),
        ("gpt2", ("c_proj",)),
        ("opt", ("fc1", "out_proj", "project_in")),
    ],
)
def test_a_list_matches_the_ends_of_paths_as_peft_does(family, targets):
    assert list(find_targets(build(family), targets)) == sites_of_peft(family, list(targets))


def test_the_table_read_from_source_is_the_table_that_peft_imports():
    from peft.utils import constants

    assert peft_table() == getattr(constants, TABLE)


def test_an_entry_that_matches_nothing_lists_what_exists():
    with pytest.raises(ModelError, match=r"'q_prj' matches no module; did you mean 'q_proj'\? known: .*up_proj"):
        find_targets(build("llama"), ("v_proj", "q_prj"))


def test_part_of_a_name_is_not_a_match():
    with pytest.raises(ModelError, match="'proj' matches no module"):
        find_targets(build("llama"), ("proj",))


def test_an_entry_for_a_module_that_is_not_linear_is_refused():
    with pytest.raises(ModelError, match=r"'mlp' matches model.layers.0.mlp, a LlamaMLP.*linear layers only: .*q_proj"):
        find_targets(build("llama"), ("mlp",))


def test_a_family_without_a_default_says_what_to_set():
    model = AutoModelForCausalLM.from_config(Phi3Config(**SMALL, **FFN, pad_token_id=0))
    with pytest.raises(ModelError, match=r"no default for the family 'phi3'; set adapter.targets to all-linear"):
        find_targets(model, "auto")


def test_a_word_that_is_neither_auto_nor_all_linear_is_refused():
    with pytest.raises(ConfigError, match="'everything': expected auto, all-linear"):
        find_targets(build("llama"), "everything")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fresh_adapter_has_the_shapes_of_its_sites_and_changes_nothing(family):
    sites = find_targets(build(family), "all-linear")
    adapter = new_adapter(sites, rank=4, alpha=8, seed=0)
    assert list(adapter.pairs) == list(sites)
    for path, pair in adapter.pairs.items():
        d_in, d_out = linear_shape(sites[path])
        assert (pair.A.shape, pair.B.shape, pair.scale) == ((4, d_in), (d_out, 4), 2.0)
        assert pair.A.dtype == torch.float32
        assert pair.norm() == 0
        assert 0 < pair.A.abs().max() <= d_in**-0.5
    x = torch.randn(3, 16)
    for name, site in sites.items():
        if linear_shape(site)[0] == 16:
            assert site(x).shape == (3, adapter.pairs[name].B.shape[0])


def test_a_draw_belongs_to_its_seed_and_module_alone():
    sites = find_targets(build("llama"), "all-linear")
    some = {name: site for name, site in sites.items() if "q_proj" in name}
    whole, part = new_adapter(sites, 2, 4, seed=1), new_adapter(some, 2, 4, seed=1)
    torch.manual_seed(123)
    assert all(torch.equal(part.pairs[name].A, whole.pairs[name].A) for name in some)
    assert new_adapter(sites, 2, 4, seed=1).hash() == whole.hash() != new_adapter(sites, 2, 4, seed=2).hash()
    first, second = list(part.pairs.values())
    assert not torch.equal(first.A, second.A)


def test_a_rank_beyond_the_smaller_side_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"adapter.rank 9: .*k_proj is 16 -> 8: its update has rank 8 at most"):
        new_adapter(find_targets(build("llama"), ("k_proj",)), rank=9, alpha=16, seed=0)
