"""Every client gets the ranks that were asked for, at every module, whoever else there is."""

from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfold.errors import ConfigError
from sheepfold.memory import BYTES_PER_NUMBER
from sheepfold.rank_choice import FLEXLORA_TYPES, Drawn
from sheepfold.ranks import GIB, adapter_numbers, client_ranks, group, memory_need, mixed, site_ranks

BLOCK = {
    "self_attn.q_proj": (512, 512),
    "self_attn.k_proj": (512, 256),
    "self_attn.v_proj": (512, 256),
    "self_attn.o_proj": (512, 512),
    "mlp.gate_proj": (512, 1024),
    "mlp.up_proj": (512, 1024),
    "mlp.down_proj": (1024, 512),
}
SHAPES = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}
CLIENTS = ["ann", "bob", "cleo", "dora", "emil"]
MANY = [f"client-{i}" for i in range(4000)]
ranks_of = partial(client_ranks, rank=8, clients=CLIENTS, shapes=SHAPES, seed=0)


def equal(rank):
    """The ranks of a client with one rank everywhere."""
    return dict.fromkeys(SHAPES, rank)


def pair(ranks):
    """A client's ranks at attention and at the MLP, each the same throughout."""
    (attention,), (mlp,) = ({rank for site, rank in ranks.items() if part in site} for part in ("self_attn", "mlp"))
    return attention, mlp


def test_without_a_choice_everybody_has_the_one_rank():
    ranks = ranks_of(None)
    assert ranks == {client: equal(8) for client in CLIENTS}
    assert not mixed(ranks)


@pytest.mark.parametrize("choice", [4, [4], {"default": 4}, {"attention": 4, "mlp": 4}, {"default": {"default": 4}}])
def test_one_rank_can_be_said_in_many_ways(choice):
    assert ranks_of(choice) == ranks_of(None, rank=4)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=len(CLIENTS)))
def test_a_list_is_dealt_in_client_order_and_again_from_the_start(dealt):
    ranks = ranks_of(dealt)
    assert list(ranks) == CLIENTS
    assert [ranks[client] for client in CLIENTS] == [equal(dealt[i % len(dealt)]) for i in range(len(CLIENTS))]
    assert mixed(ranks) == (len(set(dealt)) > 1)


def test_clients_are_named_and_the_rest_has_the_default():
    ranks = ranks_of({"bob": 4, "dora": {"attention": 30, "mlp": 200}, "default": 8})
    assert [pair(ranks[client]) for client in CLIENTS] == [(8, 8), (4, 4), (8, 8), (30, 200), (8, 8)]
    assert ranks_of(dict.fromkeys(CLIENTS, 2)) == ranks_of(2)


@given(
    st.dictionaries(
        st.sampled_from(["attention", "mlp", "q_proj", "down_proj", "mlp.up_proj", "layers.1.self_attn.q_proj"]),
        st.integers(1, 99),
        min_size=1,
    ),
    st.integers(100, 200),
)
def test_the_longest_end_of_a_path_decides_then_its_group_then_the_default(asked, rest):
    def said(site):
        for key in ("layers.1.self_attn.q_proj", "mlp.up_proj", "q_proj", "down_proj"):
            if key in asked and site.endswith(key):
                return key
        own = "attention" if "self_attn" in site else "mlp"
        return own if own in asked else "default"

    table = asked | {"default": rest}
    if asked.keys() <= {said(site) for site in SHAPES}:
        assert site_ranks(table, SHAPES, "test") == {site: table[said(site)] for site in SHAPES}
    else:
        with pytest.raises(ConfigError, match="decides no adapted module's rank"):
            site_ranks(table, SHAPES, "test")


FAMILIES = {
    "Llama": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "Mistral": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "Qwen2": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "Gemma": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "GPT2": ("attn.c_attn attn.c_proj", "c_fc mlp.c_proj"),
    "OPT": ("q_proj k_proj v_proj out_proj", "fc1 fc2"),
    "Phi": ("q_proj k_proj v_proj self_attn.dense", "fc1 fc2"),
    "GPTNeoX": ("query_key_value attention.dense", "dense_h_to_4h dense_4h_to_h"),
    "Falcon": ("query_key_value self_attention.dense", "dense_h_to_4h dense_4h_to_h"),
    "Bloom": ("query_key_value self_attention.dense", "dense_h_to_4h dense_4h_to_h"),
    "Bert": ("query key value attention.output.dense", "intermediate.dense 0.output.dense 1.output.dense"),
    "DistilBert": ("q_lin k_lin v_lin out_lin", "lin1 lin2"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_block_is_attention_or_mlp_in_the_families_people_use(family):
    import torch
    import transformers

    from sheepfold.targets import find_targets

    size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    size |= {"ffn_dim": 24, "hidden_dim": 24, "word_embed_proj_dim": 8} if family in ("OPT", "DistilBert") else {}
    config = getattr(transformers, f"{family}Config")(vocab_size=32, **size)
    with torch.device("meta"):
        sites = list(find_targets(transformers.AutoModel.from_config(config), "all-linear"))
    expected = dict(zip(("attention", "mlp"), (names.split() for names in FAMILIES[family]), strict=True))
    assert len(sites) >= 8
    for site in sites:
        said = [name for name, ends in expected.items() if any(site.endswith(end) for end in ends)]
        assert group(site) == (said[0] if said else ""), site
    assert {group(site) for site in sites} >= {"attention", "mlp"}
    outside = {site for site in sites if not group(site)}
    assert outside <= {"decoder.project_in", "decoder.project_out", "pooler.dense"}


@pytest.mark.parametrize("law", ["homo", "random", "heavy_tail", "heavy_tail_strong", "normal"])
def test_a_readme_distribution_is_drawn_over_flexloras_types_in_order_of_size(law):
    found = Counter(pair(own) for own in ranks_of(law, clients=MANY).values())
    assert shares_of(found, [(8, 8), (30, 30), (30, 200), (200, 200)]) == pytest.approx(Drawn(law).shares, abs=0.025)


@pytest.mark.parametrize("law", ["heavy_tail@release", "heavy_tail_strong@release", "normal@release"])
def test_a_release_distribution_is_drawn_over_flexloras_types_by_number(law):
    found = Counter(pair(own) for own in ranks_of(law, clients=MANY).values())
    assert shares_of(found, [(8, 8), (200, 200), (30, 200), (30, 30)]) == pytest.approx(Drawn(law).shares, abs=0.025)


def shares_of(found, types):
    """The share of every type; 0.025 is more than three standard deviations of 4,000 draws."""
    assert found.keys() <= set(types)
    return [found[one] / found.total() for one in types]


def test_shares_of_your_own_go_by_the_list():
    choice = {"distribution": [0.5, 0.3, 0.2], "types": [48, 2, 8]}
    found = Counter(pair(own) for own in ranks_of(choice, clients=MANY).values())
    assert shares_of(found, [(48, 48), (2, 2), (8, 8)]) == pytest.approx([0.5, 0.3, 0.2], abs=0.025)


@given(st.permutations([2, {"attention": 8, "mlp": 8}, {"attention": 8, "mlp": 48}, 48]), st.integers(0, 2**40))
def test_the_order_in_which_types_are_listed_does_not_matter_to_a_named_distribution(types, seed):
    first = [2, {"attention": 8, "mlp": 8}, {"attention": 8, "mlp": 48}, 48]
    for law in ("normal", "heavy_tail"):
        listed = [{"distribution": law, "types": order} for order in (first, types)]
        assert ranks_of(listed[0], seed=seed) == ranks_of(listed[1], seed=seed)


@given(st.permutations(CLIENTS), st.integers(1, len(CLIENTS)), st.integers(0, 2**40))
def test_a_clients_type_does_not_depend_on_who_else_there_is(order, count, seed):
    everybody = ranks_of("random", seed=seed)
    some = ranks_of("random", clients=order[:count], seed=seed)
    assert some == {client: everybody[client] for client in order[:count]}


def test_another_seed_draws_other_types():
    assert ranks_of("random", clients=MANY[:50]) != ranks_of("random", clients=MANY[:50], seed=1)


@pytest.mark.parametrize("choice", [None, [4, 8], "normal", {"by-memory": [4, 8]}, {"client-7": 4, "default": 8}])
def test_clients_of_one_type_share_one_mapping(choice):
    ranks = ranks_of(choice, clients=MANY)
    assert len({id(own) for own in ranks.values()}) == len({tuple(own.values()) for own in ranks.values()}) <= 4


def test_memory_is_the_base_the_adapter_in_training_and_the_activations():
    numbers = sum(4 * (d_in + d_out) for d_in, d_out in SHAPES.values())
    assert adapter_numbers(SHAPES, equal(4)) == numbers
    assert memory_need(SHAPES, equal(4), base_bytes=1000, activation_bytes=10) == 1010 + BYTES_PER_NUMBER * numbers


@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=len(CLIENTS)), st.permutations([1, 4, 16, 64]))
def test_by_memory_gives_the_largest_type_that_fits(gib, types):
    def room(own):
        return max(own.values()) * GIB // 10  # 0.1, 0.4, 1.6, 6.4 GiB

    ranks = ranks_of({"by-memory": gib, "types": types}, room=room)
    for i, client in enumerate(CLIENTS):
        declared = gib[i % len(gib)] * GIB
        best = max(rank for rank in types if rank * GIB // 10 <= declared)
        assert ranks[client] == equal(best)


def test_by_memory_asks_for_the_adapter_alone_where_nothing_else_is_known():
    exactly = memory_need(SHAPES, equal(8)) / GIB
    ranks = ranks_of({"by-memory": {"ann": exactly, "bob": exactly * 0.99, "default": 50}, "types": [2, 8]})
    assert [pair(ranks[client]) for client in CLIENTS] == [(8, 8), (2, 2), (8, 8), (8, 8), (8, 8)]
    rich = ranks_of({"by-memory": {"default": 50}})
    assert {pair(own) for own in rich.values()} == {(200, 200)}


def test_one_type_for_all_is_not_mixed_and_ranks_that_differ_by_module_are_not_either():
    assert not mixed({})
    assert not mixed({"a": {"x": 1}, "b": {"x": 1}})
    assert not mixed(ranks_of({"attention": 30, "mlp": 200}))
    assert mixed({"a": {"x": 1}, "b": {"x": 2}})


K_PROJ = "model.layers.0.self_attn.k_proj, which is 512 -> 256: its update has rank 256 at most"
BAD = [
    (300, f"adapter.ranks 300 of client 'ann': rank 300 for {K_PROJ}; choose a smaller rank, or targets without this"),
    ({"bob": 300, "default": 8}, f"adapter.ranks 300 of client 'bob': rank 300 for {K_PROJ}"),
    ({"distribution": "normal", "types": [8, {"attention": 300, "mlp": 8}]}, "type {attention: 300, mlp: 8}: rank 300"),
    ({"bib": 4, "default": 8}, "no client 'bib'; did you mean 'bob'? known: bob, ann, by-memory, cleo, default"),
    ({"by_memory": {"ann": 4}}, "no client 'by_memory'; did you mean 'by-memory'?"),
    ({"ann": 4, "bob": 8}, "nothing for 3 of 5 clients, such as 'cleo'; name them all, or add default"),
    ({"by-memory": {"ann": 4}}, "nothing for 4 of 5 clients, such as 'bob'"),
    ([1, 2, 3, 4, 5, 6], "a list of 6 for 5 clients, which it is dealt to in their order"),
    ({"attention": 8}, "no rank for model.layers.0.mlp.gate_proj; name its module or its group, or add default"),
    ({"ann": {"q_prj": 4, "default": 8}, "default": 8}, "{q_prj: 4, default: 8} of client 'ann': 'q_prj' decides no"),
    ({"default": {"lm_head": 4, "default": 8}}, "'lm_head' decides no adapted module's rank; known: attention, down_"),
    (
        {"by-memory": {"default": 1e-4}, "types": [9, 4]},
        "client 'ann' declares 0.0001 GiB, and the smallest type needs",
    ),
    ("norml", "adapter.ranks: no distribution 'norml'; did you mean 'normal'?"),
]


@pytest.mark.parametrize(("choice", "message"), BAD, ids=[str(choice) for choice, _ in BAD])
def test_what_these_clients_and_modules_cannot_have_is_one_line(choice, message):
    with pytest.raises(ConfigError) as error:
        ranks_of(choice)
    assert str(error.value).startswith("adapter.ranks")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_one_rank_is_held_against_the_matrices_too():
    with pytest.raises(ConfigError, match=f"^adapter.rank: rank 300 for {K_PROJ}"):
        ranks_of(None, rank=300)


def test_a_type_that_exceeds_a_matrix_is_refused_even_if_nobody_draws_it():
    assert "{attention: 200, mlp: 200}" in said_of({"distribution": [1, 0, 0, 0], "types": list(FLEXLORA_TYPES)})


def said_of(choice):
    with pytest.raises(ConfigError) as error:
        ranks_of(choice, shapes=dict.fromkeys(SHAPES, (128, 128)))
    return str(error.value)


def test_among_a_thousand_clients_the_line_stays_short():
    with pytest.raises(ConfigError) as error:
        ranks_of({"client_7": 4, "default": 8}, clients=MANY)
    assert "did you mean 'client-7'?" in str(error.value)
    assert len(str(error.value)) <= 300
