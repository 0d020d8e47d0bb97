"""Optimizers by name, and the step that leaves a client out."""

import pytest
import torch

from sheepfold.config import TrainSettings
from sheepfold.errors import ConfigError
from sheepfold.local import optimizers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamww"}, "no 'adamww' in torch.optim; did you mean 'adamw'"),
        ({"optimizer_args": {"momentun": 0.9}}, "AdamW has no such argument"),
        ({"optimizer_args": {"betas": [0.9, 2.0]}}, "AdamW refuses them"),
        ({"optimizer_args": {"eps": 0.0}}, "must be positive"),
        ({"optimizer": "adafactor"}, "peft_model"),
        ({"optimizer": "lbfgs"}, "the cohort engine takes element-wise"),
    ],
)
def test_what_an_optimizer_cannot_take_is_one_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        optimizers.build(TrainSettings(**settings), elementwise=True)


def test_arguments_reach_the_optimizer():
    build = optimizers.build(
        TrainSettings(optimizer="sgd", weight_decay=0.1, optimizer_args={"momentum": 0.9}), elementwise=True
    )
    group = build([torch.zeros(2, requires_grad=True)], 0.5).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.9, 0.1)


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop"])
def test_a_client_left_out_keeps_its_numbers_and_its_moments(name):
    args = {"momentum": 0.9} if name != "adamw" else {}
    build = optimizers.build(TrainSettings(optimizer=name, optimizer_args=args, weight_decay=0.1), elementwise=True)
    param = torch.ones(3, 4)
    optimizer = build([param], 0.1)
    for _ in range(2):
        param.grad = torch.ones(3, 4)
        optimizer.step()
    before, moments = param.clone(), {k: v.clone() for k, v in optimizers.moments_of(optimizer, param).items()}
    param.grad = torch.ones(3, 4)
    param.grad[1] = torch.nan
    with optimizers.keeping(optimizer, [param], [torch.tensor([False, True, False])]):
        optimizer.step()
    assert torch.equal(param[1], before[1])
    assert not torch.equal(param[0], before[0])
    torch.testing.assert_close(param[0], param[2])
    assert moments
    for key, old in moments.items():
        assert torch.equal(optimizer.state[param][key][1], old[1])
        assert torch.isfinite(optimizer.state[param][key]).all()


def test_every_optimizer_of_torch_either_trains_in_the_reference_engine_or_is_refused_with_the_reason():
    import inspect

    from tests import small

    names = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and n not in ("Optimizer",)]
    refused = []
    for name in sorted(names):
        train = TrainSettings(steps=2, batch_rows=4, lr=1e-3, optimizer=name)
        if name in optimizers.NEEDS_MORE:
            refused.append(name)
            with pytest.raises(ConfigError, match=name):
                small.peft_engine(small.model(), train)
            continue
        engine = small.peft_engine(small.model(), train)
        start = small.adapter(small.model(), 4, 0)
        [update] = engine.train(small.assignments({"ann": start}))
        assert small.gap(update.adapter, start) > 1e-6, name
    assert refused == ["LBFGS", "SparseAdam"]
