"""Methods around methods: which pairs work, and that every other pair says why in one line."""

import pytest

from sheepfold.config import FederationSettings
from sheepfold.errors import ConfigError
from sheepfold.state import load, save
from sheepfold.strategies import AROUND, FOLDS, strategy
from tests.strategies.cohorts import same
from tests.strategies.returns import a_round, a_start, some_rounds

SERVERS = {"fedopt", "fedavgm", "fedadam", "fedyogi", "fedadagrad"}
OURS = SERVERS | {"fedprox", "scaffold", "slora"}
MOVING = ["flora", "flexlora"]
"""Methods whose factors change coordinates."""
METHODS = ["fedavg", "fedit", "fedex", "hetlora", "heterolora", "ffa_lora", "rolora", "fedsa", "fed_sb", *MOVING]
GOES_WITH = {
    **dict.fromkeys(SERVERS, set(METHODS) - set(MOVING)),
    "fedprox": set(METHODS),
    "scaffold": {"fedavg", "fedit", "fedex", "ffa_lora", "rolora"},
    "slora": {"fedavg", "fedit", "fedex", "flexlora", "heterolora"},
}
ARGUMENTS = {"fedprox": {"mu": 0.1}, "slora": {"stage_rounds": 1, "density": 0.5}}
PAIRS = [(around, inner) for around in sorted(OURS) for inner in METHODS]


def made(*names: str):
    arguments = {name: value for part in names for name, value in ARGUMENTS.get(part, {}).items()}
    return strategy(FederationSettings(strategy=names, strategy_args=arguments))


def test_all_methods_are_there():
    assert set(METHODS) <= FOLDS.keys()
    assert AROUND.keys() >= OURS


@pytest.mark.parametrize(("around", "inner"), [pair for pair in PAIRS if pair[1] in GOES_WITH[pair[0]]])
def test_an_allowed_pair_runs_and_resumes(around, inner, tmp_path):
    method = made(around, inner)
    state = some_rounds(method, a_start(), 2)
    save(state, tmp_path / "state")
    read = load(tmp_path / "state", state.setting)
    same(read, state)
    same(a_round(method, read), a_round(method, state))
    assert a_round(method, state).whole().plain().is_finite()


@pytest.mark.parametrize(("around", "inner"), [pair for pair in PAIRS if pair[1] not in GOES_WITH[pair[0]]])
def test_any_other_pair_says_why_in_one_line(around, inner):
    name = "fedadam" if around == "fedopt" else around
    with pytest.raises(ConfigError, match=rf"^federation.strategy \[{name}, {inner}\]: ") as refused:
        made(around, inner)
    assert inner in str(refused.value).split("]: ")[1]
    assert f"{name} goes with fedavg" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "names",
    [
        ("fedprox", "slora", "flexlora"),
        ("slora", "fedprox", "heterolora"),
        ("fedadam", "slora", "fedex"),
        ("fedavgm", "fedprox", "ffa_lora"),
        ("fedyogi", "scaffold", "fedex"),
        ("scaffold", "fedprox", "rolora"),
        ("scaffold", "fedavgm", "fedavg"),
        ("fedadagrad", "fedprox", "slora", "fedavg"),
    ],
)
def test_longer_compositions_run(names):
    method = made(*names)
    assert method.name == " + ".join(names)
    assert some_rounds(method, a_start(), 3).whole().is_finite()


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("slora", "fedadam", "fedavg"), "fedadam inside slora would begin in the middle of the run"),
        (("scaffold", "slora", "fedavg"), "and slora trains other tensors"),
        (("fedadam", "fedavgm", "fedavg"), "two server optimizers; choose one"),
        (("fedadam", "scaffold", "fedavgm", "fedavg"), "two server optimizers; choose one"),
        (("scaffold", "scaffold", "fedavg"), "scaffold is there twice"),
        (("fedadam", "fedprox", "flora"), r"\[fedadam, fedprox, flora\]: flora's factors change coordinates"),
        (("fedavg", "fedprox"), "fedavg says how updates fold, so it comes last"),
    ],
)
def test_longer_compositions_that_cannot_be_say_why(names, why):
    with pytest.raises(ConfigError, match=why):
        made(*names)


@pytest.mark.parametrize("around", sorted(OURS))
def test_by_itself_a_method_changes_fedavg(around):
    assert made(around).name.endswith(" + fedavg")


def test_a_private_tensor_stays_private_in_every_composition():
    for around in GOES_WITH:
        if "fedsa" in GOES_WITH[around]:
            assert made(around, "fedsa").private("q/B")
