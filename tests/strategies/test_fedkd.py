"""FedKD: the fold is fedavg's, what the server does after it is what its formula says, and a resume changes no bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sheepfold import simulation
from sheepfold.adapter import Adapter
from sheepfold.assembly import Parts, assemble, check
from sheepfold.config import Experiment
from sheepfold.distillation.losses import joint
from sheepfold.engines.common import score_of
from sheepfold.errors import CheckpointError, ConfigError, ModelError, SheepfoldError, TrainingError
from sheepfold.forecast import forecast
from sheepfold.rng import stream
from sheepfold.rounds import rounds
from sheepfold.state import ServerState, load, save
from sheepfold.tasks.classification import Classification
from sheepfold.tracking.journal_figures import scalars
from tests import encoders, runs, small

SCOPED = {"epochs": 2, "lr": 1e-3, "student_lr": 5e-3, "batch_rows": 8}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder with the student's base, and teachers of its vocabulary."""
    shelf = tmp_path_factory.mktemp("shelf")
    encoders.saved(shelf / "base", "distilbert")
    encoders.rows(shelf)
    for name, layers, heads, head in (("deep", 4, 4, True), ("wide", 4, 8, True), ("bare", 4, 4, False)):
        teacher(shelf, name, layers, heads, head)
    return shelf


def teacher(shelf: Path, name: str, layers: int, heads: int, head: bool) -> None:
    """Write a BERT of the student's vocabulary."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer: Any = AutoTokenizer.from_pretrained(shelf / "base")
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": layers, "num_attention_heads": heads}
    torch.manual_seed(5)
    config = BertConfig(**encoders.BERT | shape, num_labels=2, id2label={0: "bad", 1: "good"})
    made = BertForSequenceClassification(config)
    (made if head else made.base_model).save_pretrained(shelf / name)
    tokenizer.save_pretrained(shelf / name)


def kd(shelf: Path, folder: Path, of: str = "deep", **over: Any) -> Experiment:
    """Return a run that distils on a quarter of the rows; fedkd's own arguments are in `args`."""
    folder.mkdir(exist_ok=True)
    if not (folder / "base").exists():
        (folder / "base").symlink_to(shelf / "base")
    args = {"teacher": str(shelf / of), **SCOPED, **over.pop("args", {})}
    values = {"cache": str(shelf / "cache"), "data.public.share": 0.25, "federation.strategy": "fedkd"}
    values |= {"federation.strategy_args": {"fedkd": {k: v for k, v in args.items() if v is not None}}}
    return encoders.experiment(folder, **values | over)


def language(shelf: Path, folder: Path, **over: Any) -> Experiment:
    """Return a run of a small causal student under a larger teacher that shares its tokenizer, by its logits alone."""
    if not (shelf / "llama").exists():
        from transformers import AutoTokenizer

        small.saved(shelf / "llama")
        tokenizer: Any = AutoTokenizer.from_pretrained(shelf / "llama")
        more = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": len(tokenizer) + 3, "initializer_range": 0.3}
        small.model(torch.float32, "llama", **more).save_pretrained(shelf / "big")
        tokenizer.save_pretrained(shelf / "big")
    args = {"teacher": str(shelf / "big"), **SCOPED, **over.pop("args", {})}
    values = {"cache": str(shelf / "cache"), "data.public.share": 0.25, "federation.strategy": "fedkd"}
    values |= {"model.base": str(shelf / "llama"), "federation.strategy_args": {"fedkd": args}}
    return runs.experiment(folder, **values | over)


def folded(parts: Parts, seed: int = 3) -> ServerState:
    """Return the state after a first round whose clients learned something random."""
    draw = torch.Generator().manual_seed(seed)
    start = parts.start()
    moved = {
        name: t + torch.randn(t.shape, generator=draw, dtype=t.dtype) / 20
        for name, t in start.adapter.tensors().items()
    }
    return start.advance(start.adapter.holding(moved))


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def differ(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def journal(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in runs.MEASURED} for line in lines]


def test_a_frozen_teacher_keeps_its_bits_and_the_state_holds_nothing_of_it(shelf, tmp_path):
    parts = assemble(kd(shelf, tmp_path, args={"frozen": True}))
    before, state = weights(parts.server.teacher), folded(parts)
    after, figures = parts.server(state)
    assert after.memory == {}
    assert not differ(weights(parts.server.teacher), before)
    assert not any(p.requires_grad for p in parts.server.teacher.parameters())
    assert small.gap(after.adapter, state.adapter) > 1e-3
    assert "teacher_alone" not in figures
    assert (after.round, after.plan, after.drawn) == (state.round, state.plan, state.drawn)


def test_a_co_trained_teacher_goes_with_the_state(shelf, tmp_path):
    """Another process that has the state alone goes on with the bits of the one that never stopped."""
    experiment = kd(shelf, tmp_path, "wide", **{"adapter.dropout": 0.2})
    parts = assemble(experiment)
    loaded = weights(parts.server.teacher)
    once, figures = parts.server(folded(parts))
    assert "teacher_alone" in figures
    assert {k.removeprefix("fedkd/teacher/") for k in once.memory if "/teacher/" in k} == loaded.keys()
    assert sum(key.startswith("fedkd/projection/") for key in once.memory) == 2
    trained = {name: once.memory["fedkd/teacher/" + name] for name in loaded}
    assert len(differ(trained, loaded)) == len(loaded)
    save(once, tmp_path / "state")
    twice, _ = parts.server(once.advance(once.adapter))
    other = assemble(experiment)
    read = load(tmp_path / "state", other.setting)
    again, _ = other.server(read.advance(read.adapter))
    assert again.adapter.hash() == twice.adapter.hash() != once.adapter.hash()
    assert not differ(dict(again.memory), dict(twice.memory))
    # and back: a state of before round 1 means the teacher as it was loaded
    assert parts.server.measured(parts.start()) == assemble(experiment).server.measured(parts.start())


class Stop(Exception):
    pass


@pytest.mark.parametrize(("engine", "of"), [("cohort", "wide"), ("peft_model", "deep")])
def test_a_run_that_stops_anywhere_resumes_to_the_same_bits(shelf, tmp_path, engine, of):
    over = {"train.engine": engine, "adapter.dropout": 0.1, "federation.rounds": 3, "federation.clients_per_round": 3}
    experiment = kd(shelf, tmp_path, of, **over)

    def stop(event: str, facts: Any) -> None:
        if event == "round" and facts["round"] == 2:
            raise Stop

    whole = simulation.run(experiment)
    with pytest.raises(Stop):
        simulation.run(experiment, listener=stop)
    resumed = simulation.run(experiment, resume=True)
    assert resumed.folder != whole.folder
    assert journal(resumed.folder) == journal(whole.folder)
    assert resumed.adapter.hash() == whole.adapter.hash()
    told = scalars(journal(whole.folder)[1])
    assert {"server/total", "server/kl_teacher", "teacher/loss", "teacher/accuracy"} <= told.keys()
    states = [(o.folder / "state" / "latest.safetensors").read_bytes() for o in (whole, resumed)]
    assert states[0] == states[1]
    lines = journal(whole.folder)
    assert all({"loss", "accuracy"} <= line["teacher"].keys() for line in lines)
    assert all({"total", "student", "teacher", "kl_student"} <= line["server"].keys() for line in lines[1:])
    assert lines[1]["teacher"] != lines[0]["teacher"] != lines[3]["teacher"]


def test_a_run_does_not_go_on_with_another_teacher(shelf, tmp_path):
    teacher(shelf, "swapped", 4, 4, True)
    experiment = kd(shelf, tmp_path, "swapped", args={"frozen": True}, keep_rounds=1)
    simulation.run(experiment)
    other = load_file(shelf / "swapped" / "model.safetensors")
    save_file({name: t + 0.01 for name, t in other.items()}, shelf / "swapped" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="the teacher's weights are not what the run began with"):
        simulation.run(experiment, resume_from=1)


def a_run(experiment: Experiment, until: int = 1) -> tuple[list[Adapter], list[ServerState]]:
    """Return what the strategy folded each round, and the states handed out, without evaluation."""
    parts, before = assemble(experiment), []

    def server(state: ServerState) -> Any:
        before.append(state.adapter)
        return parts.server(state) if parts.server else (state, {})

    states = [
        state
        for state, _ in rounds(
            parts.start(), until, sampler=parts.sampler, strategy=parts.strategy, engine=parts.engine,
            lr=lambda round: experiment.train.lr, server=server,
        )
    ]  # fmt: skip
    parts.engine.close()
    return before, states


def test_the_fold_is_fedavg_s_and_one_changed_line_says_so_on_both_engines(shelf, tmp_path):
    after = {}
    for engine in ("cohort", "peft_model"):
        over = {"train.engine": engine, "federation.rounds": 1}
        plain, _ = a_run(kd(shelf, tmp_path, **over, **{"federation.strategy": "fedavg"}))
        before, (state,) = a_run(kd(shelf, tmp_path, **over))
        assert before[0].hash() == plain[0].hash()
        assert small.gap(state.adapter, before[0]) > 1e-3
        after[engine] = state.adapter
    assert small.gap(*after.values()) < 1e-5


class HandWritten:
    """Plain models, weights by name, and an AdamW of our own."""

    def __init__(self, shelf: Path, of: str, parts: Parts, state: ServerState) -> None:
        from transformers import AutoModelForSequenceClassification

        self.parts, seed = parts, parts.experiment.seed
        self.models = [
            AutoModelForSequenceClassification.from_pretrained(
                shelf / name, num_labels=2, dtype=torch.float64, attn_implementation="eager"
            ).eval()
            for name in ("base", of)
        ]
        same = self.models[1].config.num_attention_heads == 4
        self.gates = [] if same else [nn.Linear(4, 8, bias=False, dtype=torch.float64) for _ in range(2)]
        for gate in self.gates:
            nn.init.constant_(gate.weight, 0.25)
        self.student = {n: t.double().clone().requires_grad_() for n, t in state.adapter.tensors().items()}
        self.teacher = {n: p.detach().clone().requires_grad_() for n, p in self.models[1].named_parameters()}
        self.scales = {path: pair.scale for path, pair in state.adapter.pairs.items()}
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.draw = lambda phase, epoch: stream(seed, "fedkd", state.round, phase, epoch)

    def predicted(self, side: int, rows: np.ndarray) -> Any:
        model = self.models[side]
        named = dict(self.teacher)
        if side == 0:
            named = dict(model.named_parameters())
            for path, scale in self.scales.items():
                A, B = self.student[f"{path}/A"], self.student[f"{path}/B"]
                named[f"{path}.weight"] = named[f"{path}.weight"].detach() + scale * B @ A
            named |= {n.removesuffix("/extra"): t for n, t in self.student.items() if n.endswith("/extra")}

        class Called:
            config, forward = model.config, model.forward

            def __call__(self, **inputs: Any) -> Any:
                return torch.func.functional_call(model, named, (), inputs)

        tokens = self.parts.data.tokens
        return self.parts.task.predict(Called(), tokens, rows, torch.device("cpu"), attentions=True)

    def steps(self, phase: str, epochs: int, groups: list[tuple[dict[str, Tensor], float]], loss: Any) -> None:
        rows, size = self.parts.data.public, SCOPED["batch_rows"]
        per = -(-len(rows) // size)
        self.moments = {}
        for step in range(epochs * per):
            epoch, at = divmod(step, per)
            batch = self.draw(phase, epoch).permutation(rows)[at * size : (at + 1) * size]
            names = [(n, p, lr) for params, lr in groups for n, p in params.items()]
            found = torch.autograd.grad(loss(batch), [p for _, p, _ in names], allow_unused=True)
            with torch.no_grad():
                for (name, p, lr), g in zip(names, found, strict=True):
                    if g is not None:
                        self.adamw(name, p, g, lr * (1 - step / (epochs * per)), step + 1)

    def adamw(self, name: str, p: Tensor, g: Tensor, lr: float, t: int) -> None:
        m, v = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        self.moments[name] = m, v
        p -= lr * 0.01 * p
        p -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


@pytest.mark.parametrize(("of", "kind"), [("deep", "log_probabilities"), ("wide", "raw_logits")])
def test_the_server_s_step_is_a_plain_loop_of_adamw(shelf, tmp_path, of, kind):
    args = {"kl": kind, "kl_weight": 0.5, "attention_weight": 2.0}
    over = {"model.dtype": "float64", "adapter.targets": ["q_lin", "v_lin"]}
    parts = assemble(kd(shelf, tmp_path, of, args=args, **over))
    state = folded(parts)
    after, _ = parts.server(state)
    by_hand = HandWritten(shelf, of, parts, state)

    gates = by_hand.gates or [None, None]

    def alone(batch: np.ndarray) -> Tensor:
        return by_hand.predicted(1, batch).losses().mean()

    def together(batch: np.ndarray) -> Tensor:
        said = by_hand.predicted(0, batch), by_hand.predicted(1, batch)
        return joint(*said, kl_weight=0.5, attention_weight=2.0, kind=kind, projections=gates).total

    by_hand.steps("alone", 1, [(by_hand.teacher, SCOPED["lr"])], alone)
    teachers = by_hand.teacher | {f"gate {i}": gate.weight for i, gate in enumerate(by_hand.gates)}
    groups = [(by_hand.student, SCOPED["student_lr"]), (teachers, SCOPED["lr"])]
    by_hand.steps("together", SCOPED["epochs"], groups, together)
    for name, tensor in after.adapter.tensors().items():
        torch.testing.assert_close(tensor.double(), by_hand.student[name].detach(), rtol=0, atol=1e-6)
    for name, tensor in by_hand.teacher.items():
        torch.testing.assert_close(after.memory["fedkd/teacher/" + name], tensor.detach(), rtol=0, atol=1e-6)
    for i, gate in enumerate(by_hand.gates):
        torch.testing.assert_close(
            after.memory[f"fedkd/projection/{i}/weight"], gate.weight.detach(), rtol=0, atol=1e-6
        )


def test_without_attention_weight_no_attention_map_is_asked_for(shelf, tmp_path, monkeypatch):
    if not (shelf / "shallow").exists():
        teacher(shelf, "shallow", 1, 4, True)
    asked, predict = [], Classification.predict

    def listening(self: Any, *args: Any, **more: Any) -> Any:
        asked.append(more.get("attentions", False))
        return predict(self, *args, **more)

    parts = assemble(kd(shelf, tmp_path, "shallow", args={"attention_weight": 0}))
    monkeypatch.setattr(Classification, "predict", listening)
    _, figures = parts.server(folded(parts))
    assert asked
    assert not any(asked)
    assert figures["attention"] == 0
    assert parts.server.teacher.config._attn_implementation == "sdpa"


def test_the_teacher_is_judged_on_the_rows_that_clients_are_judged_on(shelf, tmp_path):
    from transformers import AutoModelForSequenceClassification

    parts = assemble(kd(shelf, tmp_path))
    plain: Any = AutoModelForSequenceClassification.from_pretrained(shelf / "deep").eval()
    rows = np.concatenate([split.eval for split in parts.data.clients.values()])
    score = score_of(parts.task, plain, parts.data.tokens, rows, 3, torch.device("cpu"))
    found = parts.server.measured(parts.start())
    assert found["loss"] == pytest.approx(score.loss.value, rel=1e-5)
    assert found["accuracy"] == score.confusion.trace() / len(rows)


def test_a_new_head_is_the_student_s_and_the_teacher_keeps_its_own(shelf, tmp_path):
    parts = assemble(kd(shelf, tmp_path, **{"model.head": "new"}))
    published = load_file(shelf / "deep" / "model.safetensors")["classifier.weight"]
    assert torch.equal(parts.server.teacher.classifier.weight, published)


def test_dropout_in_the_adapter_is_drawn_from_the_run_s_seed(shelf, tmp_path):
    parts, silent, other = (
        assemble(kd(shelf, tmp_path, **over))
        for over in ({"adapter.dropout": 0.3}, {}, {"adapter.dropout": 0.3, "seed": 1})
    )
    state = folded(parts)
    torch.manual_seed(1)
    first, _ = parts.server(state)
    following = float(torch.rand(()))
    torch.manual_seed(2)
    assert parts.server(state)[0].adapter.hash() == first.adapter.hash()
    assert len({p.server(state)[0].adapter.hash() for p in (parts, silent, other)}) == 3
    torch.manual_seed(1)
    assert float(torch.rand(())) == following, "nobody else's draws are touched"


def test_all_weights_can_be_the_student(shelf, tmp_path):
    _, (state,) = a_run(kd(shelf, tmp_path, **{"adapter.method": "full", "federation.rounds": 1}))
    before, _ = a_run(kd(shelf, tmp_path, **{"adapter.method": "full", "federation.strategy": "fedavg"}))
    assert small.gap(state.adapter, before[0]) > 1e-3
    assert state.adapter.extra.keys() == before[0].extra.keys()


def test_it_goes_around_server_optimizers_and_local_rules_in_either_order(shelf, tmp_path):
    final = {}
    for names in (["fedkd", "fedadam", "fedprox"], ["fedadam", "fedprox", "fedkd"], ["fedkd", "fedavgm"]):
        experiment = kd(shelf, tmp_path, **{"federation.strategy": names})
        own = {**experiment.federation.strategy_args, "fedprox": {"mu": 0.1}, "fedadam": {"server_lr": 0.01}}
        federation = experiment.federation.model_copy(update={"strategy_args": own})
        _, states = a_run(experiment.model_copy(update={"federation": federation}), until=2)
        final[tuple(names)] = states[-1].adapter.hash()
        assert {key.split("/")[0] for key in states[-1].memory} == {"fedkd", "fedopt"}
    inside, outside, without = final.values()
    assert inside == outside != without


@pytest.mark.parametrize("args", [{"teacher": "builtin:tiny"}, {"kl_weight": 300}], ids=["trained", "random and wider"])
def test_the_logits_of_a_larger_teacher_draw_a_causal_student_near(shelf, tmp_path, args):
    parts = assemble(
        language(shelf, tmp_path, args={"frozen": True, "epochs": 8, "student_lr": 2e-2, "kl": "forward", **args})
    )
    assert parts.server.settings.attention_weight == 0, "logits alone, so its layers and heads may be any"
    widths = [model.config.vocab_size for model in (parts.server.teacher, parts.base.model)]
    assert widths[0] - widths[1] == (0 if "teacher" in args else 3)
    state, rows = parts.start(), parts.data.public
    parts.server.student.write(state.adapter)
    before = parts.server.joint(rows)
    after, _ = parts.server(state.advance(state.adapter))
    now = parts.server.joint(rows)
    assert now.kl_student.item() < 0.9 * before.kl_student.item()
    assert now.teacher.item() == before.teacher.item()
    assert after.memory == {}


def test_a_causal_run_co_trains_resumes_and_says_what_the_server_takes(shelf, tmp_path):
    outcome = simulation.run(language(shelf, tmp_path, keep_rounds=1))
    again = simulation.run(language(shelf, tmp_path, keep_rounds=1), resume_from=1)
    assert again.adapter.hash() == outcome.adapter.hash()
    assert journal(outcome.folder)[-1]["teacher"]["loss"] < journal(outcome.folder)[0]["teacher"]["loss"]
    foreseen = forecast(language(shelf, tmp_path)).server
    held = {key: t for key, t in outcome.state.memory.items() if key.startswith("fedkd/")}
    assert foreseen.state_bytes == sum(t.nbytes for t in held.values()) == 4 * foreseen.parameters


def test_plan_counts_the_teacher_its_copy_and_the_projections(shelf, tmp_path):
    parts = assemble(kd(shelf, tmp_path, "wide"))
    memory = parts.server(folded(parts))[0].memory
    found = forecast(kd(shelf, tmp_path, "wide")).server
    assert found.state_bytes == sum(t.nbytes for t in memory.values())
    student = sum(p.numel() for p in assemble(kd(shelf, tmp_path)).base.model.base_model.parameters())
    assert found.bytes > 4 * (found.parameters + student / 2)
    assert forecast(kd(shelf, tmp_path, args={"frozen": True})).server.state_bytes == 0
    assert forecast(kd(shelf, tmp_path, **{"federation.strategy": "fedavg"})).server is None


def test_a_loss_that_overflows_is_one_line(shelf, tmp_path):
    parts = assemble(kd(shelf, tmp_path, args={"lr": 1e30, "student_lr": 1e30}))
    with pytest.raises(TrainingError, match=r"round 1: the distillation's .* lower federation.strategy_args.lr") as why:
        parts.server(folded(parts))
    assert "\n" not in str(why.value)
    last = {"lr": 3.3e37, "weight_decay": 10, "epochs": 1, "teacher_epochs": 0, "batch_rows": 64}
    one = assemble(kd(shelf, tmp_path, args=last))
    with pytest.raises(TrainingError, match="last step overflowed"):
        one.server(folded(one))


def test_memory_that_runs_out_names_the_option_that_helps(shelf, tmp_path, monkeypatch):
    parts = assemble(kd(shelf, tmp_path))

    def full(*args: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Classification, "predict", full)
    with pytest.raises(TrainingError, match=r"distils in round 1 .*; lower federation.strategy_args.batch_rows"):
        parts.server(folded(parts))


def test_a_cohort_of_one_that_stays_away_distils_nothing(shelf, tmp_path):
    parts = assemble(kd(shelf, tmp_path, **{"federation.clients_per_round": 1}))
    parts.engine.train_rows = {name: rows[:0] for name, rows in parts.engine.train_rows.items()}
    state, report = next(
        rounds(
            parts.start(), 1, sampler=parts.sampler, strategy=parts.strategy, engine=parts.engine,
            lr=lambda round: 1e-3, server=parts.server,
        )
    )  # fmt: skip
    assert not report.server
    assert state.adapter.hash() == parts.start().adapter.hash()


WRONG = {
    "no rows": ({"data.public.share": 0.0}, "the server has no rows to distil on; set data.public.share"),
    "prefix": ({"adapter.method": "dora"}, "the student is LoRA on the base, or all its weights"),
    "keep_local": ({"personal.keep_local": ["layer.0"]}, "personal.keep_local keeps parts of it with the clients"),
    "mixed ranks": ({"adapter.ranks": [2, 4]}, "adapter.ranks: clients may differ"),
    "half": ({"adapter.method": "full", "model.dtype": "bfloat16"}, "vanish in bfloat16; set model.dtype to float32"),
    "around": ({"federation.strategy": ["scaffold", "fedkd"]}, "which scaffold has no place for"),
    "slora": ({"federation.strategy": ["slora", "fedkd"]}, "slora"),
    "too long": ({"data.max_tokens": 65}, "deep: it has 64 positions, and data.max_tokens is 65"),
}
WRONG |= {
    inner: ({"federation.strategy": ["fedkd", inner]}, rf"\[fedkd, {inner}\]: the server trains both .* {inner} has no")
    for inner in ("flora", "fedex", "flexlora", "hetlora", "heterolora", "ffa_lora", "rolora", "fedsa", "fed_sb")
}
ARGUMENTS = {
    "teacher": (7, "strategy_args.teacher: found 7, expected a hub id or a folder"),
    "frozen": ("yes", "strategy_args.frozen: found 'yes', expected true or false"),
    "kl": ("logits", "strategy_args.kl: no 'logits'; did you mean 'raw_logits'?"),
    "epochs": (0, "strategy_args.epochs: found 0, expected a whole number above 0"),
    "teacher_epochs": (-1, "strategy_args.teacher_epochs: found -1, expected a whole number of at least 0"),
    "batch_rows": (1.5, "strategy_args.batch_rows: found 1.5"),
    "lr": (0, "strategy_args.lr: found 0, expected a number above 0"),
    "student_lr": (float("inf"), "strategy_args.student_lr: found inf"),
    "temperature": (0, "strategy_args.temperature: found 0"),
    "kl_weight": (-1, "strategy_args.kl_weight: found -1, expected a number of at least 0"),
    "attention_weight": ("much", "strategy_args.attention_weight: found 'much'"),
    "weight_decay": (-0.1, "strategy_args.weight_decay: found -0.1"),
    "temprature": (2, "strategy_args.fedkd.temprature: no argument of fedkd; did you mean 'temperature'?"),
}


def refused(experiment: Experiment, why: str) -> None:
    with pytest.raises(SheepfoldError, match=why) as error:
        check(experiment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", WRONG)
def test_what_it_does_not_go_with_is_said_before_anything_loads(shelf, tmp_path, case):
    over, why = WRONG[case]
    if over.get("adapter.ranks"):
        over = over | {"adapter.rank": 8}
    refused(kd(shelf, tmp_path, **over), why)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_does_not_fit_is_one_line(shelf, tmp_path, name):
    value, why = ARGUMENTS[name]
    refused(kd(shelf, tmp_path, args={name: value}), why)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"teacher": None}, "missing a required argument: 'teacher'"),
        ({"frozen": True, "teacher_epochs": 2}, "teacher_epochs 2 has no effect on a frozen teacher"),
        ({"kl": "raw_logits", "temperature": 2}, "raw_logits are no distribution to soften"),
    ],
)
def test_arguments_that_contradict_each_other_say_so(shelf, tmp_path, args, why):
    refused(kd(shelf, tmp_path, args=args), why)


def test_a_teacher_that_does_not_go_with_the_student_is_refused_before_weights_are_read(shelf, tmp_path, monkeypatch):
    from transformers import BertTokenizer

    monkeypatch.setattr("sheepfold.models._weights", lambda *args: pytest.fail("weights were read"))
    teacher(shelf, "flat", 1, 4, True)
    refused(kd(shelf, tmp_path, "flat"), "it has 1 layers and the student 2.* or set attention_weight to 0")
    refused(kd(shelf, tmp_path, "bare", args={"frozen": True}), "bare: it has no classification head, and a frozen")
    teacher(shelf, "foreign", 2, 4, True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *encoders.WORDS[::-1]]
    made: Any = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    made.save_pretrained(shelf / "foreign")
    refused(kd(shelf, tmp_path, "foreign"), r"its tokenizer and that of .*base differ \('w0' first\)")
    with pytest.raises(ModelError, match=r"^federation.strategy_args.teacher '.*nowhere': no such folder"):
        check(kd(shelf, tmp_path, "nowhere"))
    check(kd(shelf, tmp_path, "nowhere"), serves=False)  # a client needs none


def test_a_teacher_whose_head_gives_other_labels_is_named(shelf, tmp_path):
    experiment = kd(shelf, tmp_path, **{"data.labels": ["bad", "good", "odd"]})
    teacher(shelf, "polite", 2, 4, True)
    settings = json.loads((shelf / "polite" / "config.json").read_text())
    (shelf / "polite" / "config.json").write_text(json.dumps(settings | {"id2label": {"0": "nice", "1": "nicer"}}))
    with pytest.raises(ModelError, match=r"^federation.strategy_args.teacher '.*polite': its head gives nice, nicer"):
        assemble(kd(shelf, tmp_path, "polite"))
    with pytest.raises(ModelError, match=r"its head gives nice, nicer.*, or name a teacher of these labels"):
        assemble(kd(shelf, tmp_path, "polite", **{"model.head": "new"}))  # which is about the student's
    assert experiment.data.labels == ("bad", "good", "odd")


def test_public_rows_that_a_partition_file_names_are_distilled_on(shelf, tmp_path):
    file = tmp_path / "parts.json"
    file.write_text(json.dumps({"a": list(range(40)), "b": list(range(40, 80))}))
    experiment = kd(shelf, tmp_path, **{"data.public.share": 0.0, "data.partition": {"by": str(file)}})
    with pytest.raises(ConfigError, match=r"no row to distil on.*a partition file lists them under 'public'"):
        assemble(experiment)
    file.write_text(json.dumps({"a": list(range(40)), "b": list(range(40, 80)), "public": list(range(80, 96))}))
    parts = assemble(experiment)
    assert parts.data.public.tolist() == list(range(80, 96))
    _, figures = parts.server(folded(parts))
    assert figures["total"] > 0


def test_a_lone_student_keeps_what_does_not_travel(shelf, tmp_path):
    """The state's other parts, and what other methods remember, go through the server's step untouched."""
    parts = assemble(kd(shelf, tmp_path, args={"teacher_epochs": 0, "epochs": 1}))
    state = replace(folded(parts), memory={"fedopt/m/x": torch.ones(2)}, drawn={"client-0": 4})
    after, figures = parts.server(state)
    assert torch.equal(after.memory["fedopt/m/x"], torch.ones(2))
    assert after.drawn == {"client-0": 4}
    assert "teacher_alone" not in figures
