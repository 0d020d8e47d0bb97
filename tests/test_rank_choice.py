"""What `adapter.ranks` can say is read as it is meant, and anything else is one clear line at load time."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sheepfold.config import build, dump, json_schema
from sheepfold.errors import ConfigError
from sheepfold.rank_choice import BY_NUMBER, BY_SIZE, FLEXLORA_TYPES, Drawn, Given, may_mix, parse, validate

RANK = st.integers(1, 300) | st.fixed_dictionaries({"attention": st.integers(1, 9)}, optional={"mlp": st.just(3)})
NAME = st.sampled_from(["ward-1", "ward 2", "größe", "7", "default"])
TYPES = st.lists(RANK, min_size=1, max_size=6)
LAW = st.sampled_from(sorted(BY_SIZE))
CHOICES = (
    RANK
    | st.lists(RANK, min_size=1, max_size=5)
    | st.dictionaries(NAME, RANK, min_size=1)
    | LAW
    | st.sampled_from(sorted(BY_NUMBER))
    | st.fixed_dictionaries({"distribution": LAW, "types": TYPES})
    | st.fixed_dictionaries({"by-memory": st.dictionaries(NAME, st.floats(0.1, 99), min_size=1), "types": TYPES})
)


@pytest.mark.parametrize(
    ("law", "shares"),
    [
        ("homo", (1, 0, 0, 0)),
        ("random", (0.25, 0.25, 0.25, 0.25)),
        ("heavy_tail", (0.85, 0.05, 0.05, 0.05)),
        ("heavy_tail_strong", (0.05, 0.05, 0.05, 0.85)),
    ],
)
def test_the_readmes_shares_go_from_the_smallest_type_to_the_largest(law, shares):
    assert Drawn(law).shares == pytest.approx(shares, abs=1e-15)


def test_normal_is_the_density_over_the_order_of_size():
    density = [math.exp(-((x - 1.5) ** 2) / (2 * 0.7**2)) / math.sqrt(2 * math.pi * 0.7**2) for x in range(4)]
    assert Drawn("normal").shares == pytest.approx([d / sum(density) for d in density], abs=1e-15)
    assert Drawn("normal").shares == pytest.approx((0.0575, 0.4425, 0.4425, 0.0575), abs=5e-5)


@pytest.mark.parametrize(
    ("law", "shares"),
    [
        # 8/8, 200/200, 30/200, 30/30
        ("heavy_tail@release", (0.80, 0.10, 0.05, 0.05)),
        ("heavy_tail_strong@release", (0.05, 0.80, 0.10, 0.05)),
        ("normal@release", (0.0575, 0.4425, 0.4425, 0.0575)),
    ],
)
def test_the_releases_shares_go_by_the_number_of_the_type(law, shares):
    assert Drawn(law).shares == pytest.approx(shares, abs=5e-5)
    assert [tuple(asked.values()) for asked in FLEXLORA_TYPES] == [(8, 8), (200, 200), (30, 200), (30, 30)]


@given(LAW, st.integers(1, 30))
def test_any_number_of_types_shares_out_the_whole(law, types):
    shares = Drawn(law, (1,) * types).shares
    assert len(shares) == types
    assert min(shares) >= 0
    assert sum(shares) == pytest.approx(1)


@given(st.integers(1, 30))
def test_a_heavy_tail_has_85_percent_at_its_end_and_the_rest_in_equal_parts(types):
    low, high = (Drawn(law, (1,) * types).shares for law in ("heavy_tail", "heavy_tail_strong"))
    assert low == tuple(reversed(high))
    assert low[0] == (0.85 if types > 1 else 1)
    assert len(set(low[1:])) <= 1


@given(CHOICES)
def test_a_choice_written_down_is_the_choice(choice):
    experiment = build({"adapter": {"ranks": choice}})
    again = build(yaml.safe_load(dump(experiment)))
    assert again == experiment
    assert parse(again.adapter.ranks) == parse(choice)


@pytest.fixture(scope="module")
def schema():
    return Draft202012Validator(json_schema())


@given(choice=CHOICES)
def test_the_schema_accepts_what_we_accept(schema, choice):
    schema.validate({"adapter": {"ranks": choice}})


def test_clients_that_are_numbers_in_yaml_are_named_by_their_digits():
    assert validate({0: 4, 1: {"q_proj": 2}}) == {"0": 4, "1": {"q_proj": 2}}
    assert validate({"by-memory": {7: 1.5}, "types": [2, 4]}) == {"by-memory": {"7": 1.5}, "types": (2, 4)}


def test_a_mapping_of_module_groups_is_one_rank_for_everybody():
    for asked in ({"attention": 30, "mlp": 200}, {"mlp": 4, "default": 2}):
        assert parse(asked) == Given((asked,))
    assert parse({"default": {"q_proj": 4, "default": 8}}) == Given({"default": {"q_proj": 4, "default": 8}})


@pytest.mark.parametrize(
    ("choice", "mixes"),
    [
        (None, False),
        (16, False),
        ({"attention": 30, "mlp": 200}, False),
        ([8], False),
        ([4, 8], True),
        ([{"attention": 4, "mlp": 8}, {"mlp": 8, "attention": 4}], False),
        ({"default": 8}, False),
        ({"a": 8, "default": 8}, False),
        ({"a": 4, "default": 8}, True),
        ("homo", False),
        ("normal", True),
        ("heavy_tail@release", True),
        ({"distribution": "normal", "types": [8]}, False),
        ({"distribution": [1, 0], "types": [4, 8]}, False),
        ({"distribution": [0.5, 0.5], "types": [4, 8]}, True),
        ({"by-memory": [4, 8]}, True),
        ({"by-memory": {"default": 8}}, False),
        ({"by-memory": [4, 8], "types": [8]}, False),
    ],
)
def test_whether_clients_can_differ_is_known_before_there_are_any(choice, mixes):
    assert may_mix(choice) is mixes


BAD = [
    (0, "found 0; expected a rank of 1 or more, or a mapping from module groups"),
    (True, "found True; expected a rank"),
    (2.5, "found 2.5; expected a rank"),
    ([], "expected a list, or a mapping from client, of one entry or more"),
    ({}, "expected a list, or a mapping from client, of one entry or more"),
    ([4, -1], "found -1; expected a rank of 1 or more"),
    ([4, "eight"], "found 'eight'; expected a rank of 1 or more"),
    ({"ward-1": 0}, "ward-1: found 0; expected a rank of 1 or more"),
    ({"ward-1": {"mlp": 0}}, "ward-1: found mlp: 0; expected a group or module and its rank of 1 or more"),
    ({"ward-1": {}}, "ward-1: found an empty mapping; expected ranks such as {attention: 30, mlp: 200}"),
    ({"attention": 0}, "found attention: 0"),
    ({2.5: 4}, "found the name 2.5; expected text, so put it in quotes"),
    ("heavy_tial", "no distribution 'heavy_tial'; did you mean 'heavy_tail'? known: heavy_tail"),
    ("by-memory", "by-memory needs what clients declare, such as {by-memory: {ward-1: 4, default: 6}} in GiB"),
    ({"distribution": "norml"}, "no distribution 'norml'; did you mean 'normal'? known: normal, heavy_tail"),
    ({"distribution": 3}, "distribution: found 3; expected a name, or shares such as [0.5, 0.3, 0.2]"),
    ({"distribution": [0.5, 0.4], "types": [4, 8]}, "distribution: the shares sum to 0.9; expected 1"),
    ({"distribution": [0.5, 0.5], "types": [8]}, "found 2 shares and 1 types; give each type its share"),
    ({"distribution": [1.5, -0.5], "types": [4, 8]}, "distribution: found (1.5, -0.5); expected a name, or shares"),
    ({"distribution": [float("nan"), 1], "types": [4, 8]}, "distribution: found (nan, 1); expected a name, or shares"),
    ({"distribution": "normal", "types": 8}, "types: found 8; expected a list"),
    ({"distribution": "normal", "types": {"a": 8}}, "types: found {'a': 8}; expected a list"),
    ({"distribution": "normal", "types": [8, 0]}, "types: found 0; expected a rank"),
    ({"distribution": "normal", "type": [8]}, "unknown key 'type' beside distribution; did you mean 'types'?"),
    ({"distribution": "normal@release", "types": [4, 8]}, "is over four types, found 2; normal takes any number"),
    ({"distribution": "normal", "by-memory": [4]}, "unknown key 'by-memory' beside distribution"),
    ({"distribtion": "normal", "types": [8]}, "types are for distribution and by-memory; found neither"),
    ({"by-memory": 4}, "by-memory: found 4; expected a list, or a mapping from client"),
    ({"by-memory": {"ward-1": "8 GB"}}, "by-memory: ward-1: found '8 GB'; expected GiB of memory, above 0"),
    ({"by-memory": [0]}, "by-memory: found 0; expected GiB of memory, above 0"),
]


@pytest.mark.parametrize(("choice", "message"), BAD, ids=[str(choice) for choice, _ in BAD])
def test_what_cannot_be_meant_is_one_line_when_the_file_is_read(choice, message):
    with pytest.raises(ConfigError) as error:
        build({"adapter": {"ranks": choice}}, source="my.yaml")
    assert str(error.value).startswith("my.yaml: adapter.ranks: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 16, "ranks": [4, 8]}, "adapter: rank 16 and ranks are both set; keep one of them"),
        (
            {"start": "a-folder", "ranks": [4, 8]},
            "adapter: ranks has no effect with start, whose folder says the ranks",
        ),
        ({"method": "ia3", "ranks": 4}, "adapter: ranks has no effect with method 'ia3'; remove it"),
        ({"method": "full", "ranks": "normal"}, "adapter: ranks has no effect with method 'full'; remove it"),
    ],
)
def test_ranks_are_said_in_one_place_and_only_for_lora(adapter, message):
    with pytest.raises(ConfigError, match=message):
        build({"adapter": adapter, "train": {"engine": "peft_model"}})
