"""A data owner's policy: what it does not give is refused before anything is loaded, in one line."""

import pytest

from sheepfold.adapter import Adapter
from sheepfold.config import build
from sheepfold.errors import ConfigError, PolicyError
from sheepfold.node.policy import Policy, check_assignment, check_policy, read_policy, refusals
from tests.wire.samples import PATHS, a_handed, a_sparse

CAREFUL = Policy()


def asked(**over):
    values = {}
    for key, value in over.items():
        node = values
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return build(values)


def test_a_plain_experiment_is_welcome():
    check_policy(CAREFUL, asked(), rows=100)
    check_policy(Policy(rows_per_round=64), asked(**{"train.steps": 4, "train.batch_rows": 16}))


REFUSED = {
    "a larger rank": ({"adapter.rank": 17}, {}, r"asks for adapter.rank 17, and .* gives max_rank 16; ask its owner"),
    "a larger rank for some": ({"adapter.ranks": [4, {"attention": 30, "default": 2}]}, {}, r"adapter.ranks 30"),
    "a larger rank in the draw": (
        {"adapter.ranks": "heavy_tail", "federation.strategy": "flora"}, {}, r"adapter.ranks 200"
    ),
    "another method": (
        {"adapter.method": "dora", "train.engine": "peft_model"}, {}, r"adapter.method dora, .*\[lora\]"
    ),
    "whole weights": (
        {"adapter.method": "full", "train.engine": "peft_model"}, {"methods": ("lora", "full")},
        r"adapter.method full, and .* full_weights false",
    ),
    "changes of whole weights": ({"federation.strategy": "slora"}, {}, r"federation.strategy slora, .* full_weights"),
    "a first round of whole weights": ({"federation.strategy": "fed_sb"}, {}, r"federation.strategy fed_sb"),
    "modules sent whole": ({"adapter.modules_to_save": ["lm_head"], "task": "classification"},
                           {"tasks": ("classification",)}, r"adapter.modules_to_save \['lm_head'\]"),
    "more rows": ({"train.steps": 5, "train.batch_rows": 16}, {"rows_per_round": 79}, r"batch_rows 80, .* 79"),
    "more epochs": ({"train.epochs": 3}, {"rows_per_round": 299}, r"train.epochs x this machine's rows 300"),
    "more rows in the end": (
        {"train.steps": 1, "train.batch_rows": 4, "personal.finetune_steps": 30}, {"rows_per_round": 100},
        r"personal.finetune_steps x train.batch_rows 120, .* 100",
    ),
    "another base": ({"model.base": "owner/other"}, {"models": ("builtin:tiny",)}, r"base owner/other, .* models"),
    "another tokenizer": ({"model.tokenizer": "x/y"}, {"models": ("builtin:tiny",)}, r"model.tokenizer x/y, .* models"),
    "a template of its own": ({"data.template": "own.json"}, {}, r"data.template own.json, .* files false"),
    "an adapter's folder": ({"adapter.start": "/runs/old"}, {}, r"adapter.start /runs/old, .* files false"),
    "a file in PEFT's options": (
        {"adapter.method": "vera", "train.engine": "peft_model", "adapter.options": {"state": "/etc/x"}},
        {"methods": ("vera",)}, r"adapter.options.state /etc/x, .* files false",
    ),
    "modules sent whole by PEFT": (
        {"adapter.method": "dora", "train.engine": "peft_model", "adapter.options": {"modules_to_save": ["lm_head"]}},
        {"methods": ("dora",)}, r"adapter.options.modules_to_save \['lm_head'\], .* full_weights false",
    ),
    "a larger rank of PEFT's": (
        {"adapter.method": "lokr", "train.engine": "peft_model", "adapter.options": {"r": 64}},
        {"methods": ("lokr",)}, r"adapter.options.r 64, .* max_rank 16",
    ),
    "another task": ({"task": "classification"}, {}, r"asks for task classification, .* tasks \[causal_lm\]"),
    "answers": ({"evaluation.metrics": ["exact_match"]}, {}, r"evaluation.metrics exact_match, .* generation false"),
    "its own strategy": ({"federation.strategy": "theirs:fold"}, {}, r"federation.strategy theirs:fold, .* code false"),
    "its own rule": ({"train.local_rule": "theirs:rule"}, {}, r"train.local_rule theirs:rule"),
    "the model's code": (
        {"evaluation.allow_code": True, "evaluation.tasks": ["humaneval"]}, {}, r"evaluation.allow_code true"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_given_is_refused(case):
    over, given, why = REFUSED[case]
    with pytest.raises(PolicyError, match=why) as refused:
        check_policy(Policy(**given), asked(**over), rows=100)
    assert "\n" not in str(refused.value)


def test_what_is_given_is_taken():
    given = Policy(
        max_rank=200, methods=("lora", "dora"), full_weights=True, tasks=("causal_lm", "classification"),
        generation=True, code=True, files=True,
    )  # fmt: skip
    for over, own, _ in REFUSED.values():
        if not {"rows_per_round", "models"} & own.keys():
            methods = (*given.methods, *own.get("methods", ()))
            assert not list(refusals(given.model_copy(update={"methods": methods}), asked(**over)))


def test_code_that_comes_with_a_model_never_runs():
    options = {"adapter.method": "prompt", "train.engine": "peft_model"}
    options |= {"adapter.options": {"num_virtual_tokens": 4, "tokenizer_kwargs": {"trust_remote_code": True}}}
    with pytest.raises(PolicyError, match="asks for trust_remote_code, and code that comes with a model never runs"):
        check_policy(Policy(methods=("prompt_tuning",), code=True, files=True), asked(**options))


def test_where_rows_come_from_is_not_the_experiments_to_say():
    check_policy(CAREFUL, asked(**{"data.source": "theirs:rows", "data.partition.by": "theirs:parts"}), rows=10)


def test_fed_sb_inside_the_base_sends_cores_alone():
    check_policy(CAREFUL, asked(**{"federation.strategy": "fed_sb", "federation.strategy_args.start": "base"}))


def test_what_arrives_is_held_against_the_policy_too():
    check_assignment(CAREFUL, a_handed(rank=16))
    with pytest.raises(PolicyError, match=r"rank 17 for layers.0.q_proj, .* max_rank 16"):
        check_assignment(CAREFUL, a_handed(rank=17))
    with pytest.raises(PolicyError, match="changes of whole weights"):
        check_assignment(CAREFUL, a_handed(adapter=Adapter(sparse={PATHS[0]: a_sparse(0)})))


def test_a_policy_file_is_read_and_checked(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("max_rank: 4\nmethods: [lora]\nrows_per_round: 200\n")
    assert read_policy(path) == Policy(max_rank=4, rows_per_round=200)
    path.write_text("max_ranks: 4\n")
    with pytest.raises(ConfigError, match=r"unknown key 'max_ranks'; did you mean 'max_rank'\?"):
        read_policy(path)
    with pytest.raises(ConfigError, match=r"gone.yaml: no such policy file"):
        read_policy(tmp_path / "gone.yaml")
    path.write_text("max_rank: 0\n")
    with pytest.raises(ConfigError, match=r"max_rank: found 0; input should be greater than 0"):
        read_policy(path)
