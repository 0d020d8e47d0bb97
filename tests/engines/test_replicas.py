"""One client's batch over two replicas is the batch on one device."""

import pytest
import torch

from sheepfold import assembly, simulation
from sheepfold.config import AdapterSettings, TrainSettings
from sheepfold.engines.peft_model import PeftModelEngine
from sheepfold.engines.replicas import ReplicaEngine
from sheepfold.errors import ConfigError
from sheepfold.state import BatchPlan
from tests import small
from tests.runs import experiment

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    with small.one_thread():
        yield


def trained(kind, dtype, method="lora", dropout=0.0, steps=4, **more):
    """Return what two clients of unlike ranks reach."""
    base = small.model(dtype)
    train = TrainSettings(engine="peft_model", steps=steps, batch_rows=5, micro_rows=2, lr=1e-3)
    sites = list(small.sites(base)) if method == "lora" else []
    settings = AdapterSettings(method=method, dropout=dropout)
    rest = {"seed": 1, "plan": BatchPlan(1, 2, 120), **more}
    engine = kind(base, sites, small.tokens(), small.client_rows(), train, settings, **rest)
    starts = {"ann": 4, "bob": 2}
    lora = {c: small.adapter(base, r, r, dtype=dtype) for c, r in starts.items()} if method == "lora" else {}
    return list(engine.train(small.assignments(lora or {c: engine.initial() for c in starts})))


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize(("method", "dropout"), [("lora", 0.0), ("lora", 0.2), ("full", 0.0), ("ia3", 0.0)])
def test_replicas_train_as_one_device_does(method, dropout, devices):
    ours = trained(ReplicaEngine, torch.float64, method, dropout, devices=[CPU] * devices)
    alone = trained(PeftModelEngine, torch.float64, method, dropout)
    assert max(small.gap(a.adapter, b.adapter) for a, b in zip(ours, alone, strict=True)) < 1e-10
    assert [a.measurements.processed_tokens for a in ours] == [b.measurements.processed_tokens for b in alone]
    losses = [(a.measurements.loss.value, b.measurements.loss.value) for a, b in zip(ours, alone, strict=True)]
    assert all(abs(a - b) < 1e-10 for a, b in losses)


def test_replicas_train_as_one_device_does_in_float32():
    ours = trained(ReplicaEngine, torch.float32, steps=20, devices=[CPU, CPU])
    alone = trained(PeftModelEngine, torch.float32, steps=20)
    assert max(small.gap(a.adapter, b.adapter) for a, b in zip(ours, alone, strict=True)) < 5e-5


def test_every_replica_gets_rows(monkeypatch):
    seen = []
    first = PeftModelEngine.descend

    def descend(self, model, part, *rest):
        seen.append((id(model), len(part.rows)))
        return first(self, model, part, *rest)

    monkeypatch.setattr(PeftModelEngine, "descend", descend)
    trained(ReplicaEngine, torch.float64, devices=[CPU, CPU], plan=BatchPlan(1, 5, 120))
    assert len({model for model, _ in seen}) >= 2
    assert max(rows for _, rows in seen) == 3  # of a step's five rows


def test_every_replica_runs_its_blocks_again_where_the_plan_says_so(monkeypatch):
    again = {}
    first = PeftModelEngine.descend

    def descend(self, model, part, *rest):
        again[id(model)] = model.base_model.model.model.layers[0].gradient_checkpointing
        return first(self, model, part, *rest)

    monkeypatch.setattr(PeftModelEngine, "descend", descend)
    plan = BatchPlan(1, 2, 120, recompute=True)
    ours = trained(ReplicaEngine, torch.float64, devices=[CPU, CPU], plan=plan)
    assert list(again.values()) == [True, True]
    alone = trained(PeftModelEngine, torch.float64)
    assert max(small.gap(a.adapter, b.adapter) for a, b in zip(ours, alone, strict=True)) < 1e-10


def test_a_run_over_two_devices_is_the_run_on_one(tmp_path):
    over = {"train.engine": "peft_model", "train.micro_rows": 2, "train.lr": 1e-3}
    one = simulation.run(experiment(tmp_path / "one", **over))
    two = simulation.run(experiment(tmp_path / "two", **over, **{"train.batch_devices": ["cpu", "cpu"]}))
    assert small.gap(one.adapter, two.adapter) < 5e-5


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^train\.batch_devices: device 'cuda:77'"):
        assembly.check(experiment(tmp_path, **{"train.batch_devices": ["cpu", "cuda:77"]}))


def test_devices_of_one_process_are_refused_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^train\.batch_devices: they are one process's, and here are 2; start one"):
        assembly.check(experiment(tmp_path, **{"train.batch_devices": ["cpu", "cpu"]}))


def test_another_first_device_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not the first of"):
        experiment(tmp_path, **{"device": "cuda", "train.batch_devices": ["cpu", "cpu"]})
