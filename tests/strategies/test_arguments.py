"""strategy_args: whose an argument is, and sections of methods that wait for their turn."""

import pytest

from sheepfold.config import FederationSettings
from sheepfold.errors import ConfigError
from sheepfold.strategies import AROUND, FOLDS, strategy


def made(names, **arguments):
    return strategy(FederationSettings(strategy=names, strategy_args=arguments))


def own(mu=1.0, **further):
    """A method of one's own that takes anything."""
    assert further == {"fold_twice": True}
    return strategy(FederationSettings())


def test_one_changed_line_switches_the_method():
    """All sections stay in the file; each run looks at its own."""
    arguments = {"fedprox": {"mu": 0.1}, "fedadam": {"server_lr": 0.5}, "fedex": {"residual_rank": 4}}
    alone = {"fedprox": {"mu": 0.1}, "fedadam": {"server_lr": 0.5}, "fedex": {"residual_rank": 4}, "fedavg": {}}
    for name, mine in alone.items():
        assert made(name, **arguments).name == made(name, **mine).name
    assert made("fedprox", **arguments).local is not None
    assert made("fedavg", **arguments).local is None
    with pytest.raises(ConfigError, match="mu"):
        made("fedprox", fedadam={"server_lr": 0.5})  # what waits is nobody else's


@pytest.mark.parametrize("name", sorted({*FOLDS, *AROUND} - {"fedavg"}))
def test_a_misspelt_argument_of_a_method_that_waits_is_refused_now(name):
    with pytest.raises(ConfigError, match=rf"^federation.strategy_args.{name}.oops: no argument of {name}; ") as why:
        made("fedavg", **{name: {"oops": 1}})
    assert "\n" not in str(why.value)


def test_the_nearest_name_comes_first():
    with pytest.raises(ConfigError, match=r"fedkd.temprature: no argument of fedkd; did you mean 'temperature'\?"):
        made("fedavg", fedkd={"teacher": "x", "temprature": 2})
    with pytest.raises(ConfigError, match=r"fedprox.mue: no argument of fedprox; did you mean 'mu'\?"):
        made("fedprox", fedprox={"mue": 2})
    with pytest.raises(ConfigError, match=r"flora.rank: no argument of flora; it takes none"):
        made("fedavg", flora={"rank": 2})
    with pytest.raises(ConfigError, match=r"fedprox.of: no argument of fedprox"):
        made("fedavg", fedprox={"of": "fedavg"})
    with pytest.raises(ConfigError, match=r"fedex.weights: no argument of fedex"):
        made("fedavg", fedex={"weights": "rows"})


@pytest.mark.parametrize("arguments", [{"mu": 1, "fedprox": {"mu": 2}}, {"fedprox": {"mu": 2}, "mu": 1}])
def test_an_argument_that_is_given_twice_says_so(arguments):
    with pytest.raises(ConfigError, match=r"strategy_args.mu: there by itself and in the section of fedprox; keep one"):
        made("fedprox", **arguments)


def test_a_section_beside_single_arguments_adds_up():
    assert made("fedadam", server_lr=0.1, fedadam={"beta1": 0.5}).name == "fedadam + fedavg"


def test_a_method_that_is_no_section_is_no_argument():
    with pytest.raises(ConfigError, match=r"strategy_args.fedprox: no argument of fedavg; there are none"):
        made("fedavg", fedprox=0.1)


def test_a_method_of_one_s_own_sees_its_section_itself():
    name = "tests.strategies.test_arguments:own"
    assert made(name, **{name: {"fold_twice": True}}).name == "fedavg"
