"""Answers, streams and scores under any adapter, against the merged models and transformers' own generate."""

import threading

import pytest
import torch

from sheepfold.answering.model import open_source
from sheepfold.answering.source import find
from sheepfold.config import GenerationSettings, ModelSettings
from sheepfold.data.rows import Message
from sheepfold.errors import ConfigError
from sheepfold.export import merged
from sheepfold.models import load_base
from tests.small import saved

GREEDY = GenerationSettings(max_new_tokens=8)
QUESTIONS = ["Name three animals.", "What is the opposite of hot?", "Is a crow an animal?"]


def oracle(source, name):
    """Return the base with an adapter merged into its weights."""
    base = load_base(ModelSettings(), "cpu")
    if name != "base":
        base.model.load_state_dict(merged(base.model, source.adapter(name)))
    return base


def mean_logprob(answering, prompt, name, answer) -> float:
    """Return what beam search maximises: the mean over the answer's tokens, its end token with them."""
    end = [answering.base.stop_ids[0]] if answer.finished == "stop" else []
    ids = torch.cat([prompt.ids, torch.tensor([*answer.ids, *end])])
    scores = answering.score([ids], [name])[0][len(prompt.ids) - 1 :]
    return sum(s.logprob for s in scores) / len(scores)


@pytest.fixture(scope="module")
def oracles(answering):
    return {name: oracle(answering.source, name) for name in ("base", "federated", "client:client-1")}


def greedy(base, prompt) -> list[int]:
    out = base.model.generate(
        prompt.ids[None], attention_mask=torch.ones_like(prompt.ids)[None], max_new_tokens=8, do_sample=False,
        pad_token_id=0, eos_token_id=list(base.stop_ids),
    )  # fmt: skip
    new = out[0, len(prompt.ids) :].tolist()
    return new[: next((i for i, t in enumerate(new) if t in base.stop_ids), None)]


def test_rows_of_one_batch_answer_each_under_its_own_adapter(answering, oracles, ask):
    prompts = [ask(question) for question in QUESTIONS for _ in oracles]
    names = list(oracles) * len(QUESTIONS)
    answers = answering.answer(prompts, names, GREEDY, seed=0)
    expected = [greedy(oracles[name], prompt) for name, prompt in zip(names, prompts, strict=True)]
    assert [list(a.ids) for a in answers] == expected
    assert len({a.ids for a in answers}) > 3, "adapters that all say the same prove nothing"


def test_a_streams_pieces_are_the_whole_answers(answering, ask):
    prompts, names = [ask(q) for q in QUESTIONS], ["base", "federated", "client:client-2"]
    whole = answering.answer(prompts, names, GREEDY, seed=0)
    texts, ends = ["", "", ""], ["", "", ""]
    for piece in answering.stream(prompts, names, GREEDY, seed=0):
        assert not ends[piece.row], "nothing follows the end"
        texts[piece.row] += piece.text
        ends[piece.row] = piece.finished or ""
    assert (texts, ends) == ([a.text for a in whole], [a.finished for a in whole])


def test_scores_are_the_merged_models_log_softmax(answering, oracles, ask):
    rows = [ask(q).ids for q in QUESTIONS]
    for name, base in oracles.items():
        found = answering.score(rows, [name], top=3)
        for row, scores in zip(rows, found, strict=True):
            logits = base.model(row[None]).logits[0, :-1]
            expected = torch.log_softmax(logits.float(), -1)
            own = torch.tensor([s.logprob for s in scores])
            torch.testing.assert_close(own, expected[torch.arange(len(row) - 1), row[1:]], atol=1e-4, rtol=0)
            assert [[i for i, _, _ in s.top] for s in scores] == expected.topk(3).indices.tolist()


def test_a_row_of_one_token_has_no_scores_and_changes_nobody_elses(answering, ask):
    rows = [ask(QUESTIONS[0]).ids, torch.tensor([5])]
    first, second = answering.score(rows, ["federated"])
    assert second == []
    assert [s.logprob for s in first] == pytest.approx([s.logprob for s in answering.score(rows[:1], ["federated"])[0]])


def test_a_streams_scores_are_those_of_scoring_it_afterwards(answering, ask):
    prompt = ask(QUESTIONS[0])
    pieces = list(answering.stream([prompt], ["federated"], GREEDY, seed=0, top_logprobs=2))
    tokens = [token for piece in pieces for token in piece.tokens]
    whole = torch.cat([prompt.ids, torch.tensor([token.id for token in tokens])])
    after = answering.score([whole], ["federated"], top=2)[0][-len(tokens) :]
    assert [t.id for t in tokens] == [t.id for t in after]
    assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in after], abs=1e-4)


def test_beams_find_an_answer_at_least_as_likely_as_the_greedy_one(answering, ask):
    prompts = [ask(q) for q in QUESTIONS]
    search = GenerationSettings(max_new_tokens=8, beams=4)
    both = [["federated"], ["base", "federated", "client:client-1"]]
    together = answering.answer(prompts, both[1], search, seed=0)
    assert together[1].ids == answering.answer(prompts[1:2], both[0], search, seed=0)[0].ids, "rows do not mix"
    plain = answering.answer(prompts, both[1], GREEDY, seed=0)
    for prompt, name, found, one in zip(prompts, both[1], together, plain, strict=True):
        assert mean_logprob(answering, prompt, name, found) >= mean_logprob(answering, prompt, name, one) - 1e-4


def test_one_seed_repeats_and_the_same_question_twice_draws_twice(answering, ask):
    hot = GenerationSettings(max_new_tokens=8, temperature=1.5)
    prompts = [ask(QUESTIONS[0])] * 3
    first, again, other = (answering.answer(prompts, ["base"], hot, seed=seed) for seed in (5, 5, 6))
    assert first == again != other
    assert len({a.ids for a in first}) == 3
    assert answering.answer(prompts[:1], ["base"], hot, seed=5) == first[:1], "a batch changes no draw"


@pytest.mark.parametrize("stop", ["a", " ", "er", "zzzz"])
def test_an_answer_ends_before_its_stop_string(answering, ask, stop):
    prompts = [ask(q) for q in QUESTIONS]
    free = answering.answer(prompts, ["base"], GREEDY, seed=0)
    for kept, whole in zip(answering.answer(prompts, ["base"], GREEDY, seed=0, stop=[stop]), free, strict=True):
        assert kept.text == whole.text.partition(stop)[0]
        assert kept.finished == ("stop" if stop in whole.text else whole.finished)


def test_leaving_a_stream_stops_the_model_and_frees_it(answering, ask):
    steps = []
    endless = GenerationSettings(max_new_tokens=100)
    with answering.using(["base"]) as model:
        hook = model.register_forward_hook(lambda *_: steps.append(1))
    stream = answering.stream([ask("Tell a story.", 100)] * 2, ["base"], endless, seed=0, stop=["\0"])
    next(stream)
    stream.close()
    answering.answer([ask("Name a dog.", 1)], ["base"], GenerationSettings(max_new_tokens=1), seed=0)
    hook.remove()
    assert len(steps) < 20


def test_a_search_can_be_left_too(answering, ask):
    steps = []
    with answering.using(["base"]) as model:
        hook = model.register_forward_hook(lambda *_: steps.append(1))
    search = GenerationSettings(max_new_tokens=200, beams=4)
    stream = answering.stream([ask("Tell a story.", 200)] * 2, ["base"], search, seed=0)
    assert next(stream).text == ""
    stream.close()
    answering.answer([ask("Name a dog.", 1)], ["base"], GenerationSettings(max_new_tokens=1), seed=0)
    hook.remove()
    assert len(steps) < 20


def test_asking_while_holding_the_model_is_an_error_not_a_wait(answering, ask):
    prompt = ask(QUESTIONS[0])
    with answering.using(["base"]), pytest.raises(RuntimeError, match="leave the `using` block"):
        answering.answer([prompt], ["base"], GREEDY, seed=0)


def test_a_name_means_one_adapter_for_as_long_as_the_model_is_open(run, tmp_path):
    import shutil

    copy = shutil.copytree(run, tmp_path / "going-on")
    with open_source(find(copy), "cpu") as opened:
        row = opened.raw_prompt("Name three animals.", 1).ids
        alone = opened.score([row], ["federated"])[0]
        states = copy / "state"
        (states / "next").write_bytes(b"another round")
        (states / "next").replace(states / "latest.safetensors")  # as a run does: never over the old bytes
        beside = opened.score([row, row], ["federated", "base"])[0]
    assert [s.logprob for s in alone] == pytest.approx([s.logprob for s in beside], abs=1e-4)


def test_threads_take_turns_and_get_their_own_answers(answering, ask):
    prompt, found = ask(QUESTIONS[1]), {}
    expected = {name: answering.answer([prompt], [name], GREEDY, seed=0) for name in answering.names}

    def one(name: str) -> None:
        found[name] = answering.answer([prompt], [name], GREEDY, seed=0)

    threads = [threading.Thread(target=one, args=(name,)) for name in answering.names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_an_answer_stops_where_the_models_positions_do(answering):
    limit = answering.max_positions
    prompt = answering.raw_prompt("a " * (limit - 30), 1)
    most = answering.answer([prompt], ["base"], GenerationSettings(max_new_tokens=limit), seed=0, stop=["\0"])[0]
    assert len(most.ids) <= limit - len(prompt.ids)


def test_unknown_names_and_names_that_cannot_mix_are_one_line(answering, ask):
    with pytest.raises(ConfigError, match="no adapter"):
        answering.answer([ask("x")], ["../../etc/passwd"], GREEDY, seed=0)


@pytest.mark.parametrize("method", ["ia3", "full"])
def test_other_methods_answer_as_their_folders_do(tmp_path, method):
    from sheepfold import simulation
    from tests.runs import experiment

    base = saved(tmp_path / "base")
    made = experiment(tmp_path, **{
        "model.base": str(base), "adapter": {"method": method}, "train.engine": "peft_model", "train.lr": 0.05,
    })  # fmt: skip
    folder = simulation.run(made).folder
    with open_source(find(folder), "cpu") as opened:
        prompt = opened.prompt([Message("user", QUESTIONS[0])], 8)
        rows = opened.answer([prompt, prompt], ["base", "federated"], GREEDY, seed=0)
        scores = opened.score([prompt.ids] * 2, ["base", "federated"])
        with pytest.raises(ConfigError, match="one by one"), opened.using(["base", "federated"]):
            pass
    assert len(rows) == 2
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder / "adapter" if method == "full" else base)
    if method == "ia3":
        from peft import PeftModel

        plain = PeftModel.from_pretrained(plain, folder / "adapter")
    with torch.no_grad():
        expected = torch.log_softmax(plain(prompt.ids[None]).logits[0, :-1], -1)
    own = torch.tensor([s.logprob for s in scores[1]])
    torch.testing.assert_close(own, expected[torch.arange(len(prompt.ids) - 1), prompt.ids[1:]], atol=2e-5, rtol=0)
    assert [s.logprob for s in scores[0]] != [s.logprob for s in scores[1]]


def test_virtual_tokens_take_positions_from_answers(tmp_path):
    from sheepfold import simulation
    from tests.runs import experiment

    base = saved(tmp_path / "base", "opt")  # 64 learned positions: one too many is an IndexError
    made = experiment(tmp_path, **{
        "model.base": str(base), "adapter": {"method": "prompt", "options": {"num_virtual_tokens": 5}},
        "train.engine": "peft_model", "data.max_tokens": 48,
    })  # fmt: skip
    with open_source(find(simulation.run(made).folder), "cpu") as opened:
        assert opened.max_positions == 59
        prompts = [opened.raw_prompt(text, 1) for text in ("Name three animals.", "Yes")]
        long = GenerationSettings(max_new_tokens=100)
        for prompt, whole in zip(
            prompts, opened.answer(prompts, ["federated"], long, seed=0, stop=["\0"]), strict=True
        ):
            assert whole.finished == "stop" or len(prompt.ids) + len(whole.ids) == 59


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_answers_nearly_as_the_whole_one(tmp_path, bits):
    source = find("builtin:tiny")
    with open_source(source, "cpu") as whole, open_source(source, "cpu", bits=bits) as small:
        row = whole.raw_prompt("Name three animals.", 1).ids
        left, right = ([s.logprob for s in it.score([row], ["base"])[0]] for it in (whole, small))
    assert left != right
    assert left == pytest.approx(right, abs=0.3, rel=0.02 if bits == 8 else 0.2)
