"""What OpenAI's own client gets from a live server, beside the same run asked in this process."""

import json
import subprocess

import openai
import pytest
import torch

from sheepfold.config import GenerationSettings
from sheepfold.data.rows import Message
from tests.serve.conftest import TOKEN, Server

QUESTION = "Which animal is faster, a snail or a horse?"
ASKED = [{"role": "user", "content": QUESTION}]
PROMPT = "Once upon a time, in a caf\u00e9"


@pytest.fixture(scope="module")
def client(server: Server):
    return server.client()


def whole(oracle, name: str, new_tokens: int = 40, temperature: float = 0.0, seed: int = 0):
    prompt = oracle.prompt([Message("user", QUESTION)], new_tokens)
    settings = GenerationSettings(max_new_tokens=new_tokens, temperature=temperature)
    return oracle.answer([prompt], [name], settings, seed=seed)[0]


def text_of(stream) -> str:
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


def test_the_list_has_the_base_the_shared_adapter_and_each_clients_own(client, oracle):
    models = client.models.list().data
    assert tuple(m.id for m in models) == oracle.names == ("base", "federated", "client:client-0", "client:client-1")
    assert all(m.owned_by == "sheepfold" and m.object == "model" and m.created > 0 for m in models)
    assert client.models.retrieve("client:client-1").id == "client:client-1"


def test_each_model_gives_its_own_adapters_answer_with_exact_usage(client, oracle):
    said = {}
    for name in oracle.names:
        reply = client.chat.completions.create(model=name, messages=ASKED, temperature=0, max_tokens=40)
        expected = whole(oracle, name)
        said[name] = reply.choices[0].message.content
        assert (said[name], reply.choices[0].finish_reason) == (expected.text, expected.finished)
        prompt = len(oracle.prompt([Message("user", QUESTION)], 1).ids)
        usage = reply.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, len(expected.ids))
        assert usage.total_tokens == prompt + len(expected.ids)
    assert len(set(said.values())) > 1  # the adapters differ, so the comparison says something


def test_a_stream_says_what_the_whole_reply_says(client):
    ask = {"model": "federated", "messages": ASKED, "temperature": 0, "max_tokens": 40, "logprobs": True}
    reply = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == reply.choices[0].message.content
    assert chunks[-1].usage == reply.usage
    assert chunks[-1].choices == []
    told = [c.choices[0] for c in chunks[:-1]]
    assert [c.finish_reason for c in told if c.finish_reason] == [reply.choices[0].finish_reason]
    assert told[0].delta.role == "assistant"
    tokens = [t for c in told if c.logprobs for t in c.logprobs.content]
    assert [t.token for t in tokens] == [t.token for t in reply.choices[0].logprobs.content]


def test_a_stream_comes_step_by_step(client):
    ask = {"model": "base", "prompt": PROMPT, "max_tokens": 60, "temperature": 1.0, "seed": 3}
    chunks = list(client.completions.create(**ask, stream=True))
    assert len(chunks) > 10
    assert "".join(c.choices[0].text for c in chunks) == client.completions.create(**ask).choices[0].text


def test_an_echo_has_the_models_own_log_softmax(client, oracle):
    ids = oracle.raw_prompt(PROMPT, 1).ids
    for name in ("base", "federated", "client:client-0"):
        with oracle.using([name]) as model, torch.no_grad():
            expected = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].float(), dim=-1)
        for prompt in (PROMPT, ids.tolist(), [PROMPT], [ids.tolist()]):
            reply = client.completions.create(model=name, prompt=prompt, echo=True, logprobs=3, max_tokens=0)
            logprobs, choice = reply.choices[0].logprobs, reply.choices[0]
            assert choice.text == PROMPT == b"".join(map(raw, logprobs.tokens)).decode()
            assert logprobs.token_logprobs[0] is None
            assert logprobs.top_logprobs[0] is None
            own = expected[torch.arange(len(ids) - 1), ids[1:]]
            torch.testing.assert_close(torch.tensor(logprobs.token_logprobs[1:]), own, atol=1e-4, rtol=0)
            best = torch.tensor([max(top.values()) for top in logprobs.top_logprobs[1:]])
            torch.testing.assert_close(best, expected.max(dim=-1).values, atol=1e-4, rtol=0)
            for token, at in zip(logprobs.tokens, logprobs.text_offset, strict=True):
                assert PROMPT.startswith(token if not token.startswith("bytes:") else "\u00e9", at)
            assert reply.usage.completion_tokens == 0
            assert reply.usage.prompt_tokens == len(ids)


def raw(token: str) -> bytes:
    """Return a token's bytes; part of a character is written bytes:\\xc3."""
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def test_an_echo_before_an_answer_scores_both(client, oracle):
    ask = {"model": "federated", "prompt": [PROMPT, "The dog"], "max_tokens": 4, "temperature": 0}
    reply = client.completions.create(**ask, echo=True, logprobs=1)
    plain = client.completions.create(**ask, logprobs=1)
    for both, alone, prompt in zip(reply.choices, plain.choices, ask["prompt"], strict=True):
        assert both.text == prompt + alone.text
        count = len(alone.logprobs.tokens)
        assert both.logprobs.tokens[-count:] == alone.logprobs.tokens
        assert both.logprobs.token_logprobs[-count:] == pytest.approx(alone.logprobs.token_logprobs, abs=1e-4)
        assert both.logprobs.text_offset[-count] == len(prompt)
    assert reply.usage == plain.usage
    streamed = client.completions.create(**ask, echo=True, stream=True)
    texts = ["", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in reply.choices]


def test_the_end_token_is_scored_but_neither_said_nor_counted(client, oracle):
    """lm-eval takes the last token for the generated one and drops it unseen."""
    prompt = oracle.prompt([Message("user", QUESTION)], 1)
    answer = whole(oracle, "federated")
    assert answer.finished == "stop"
    ids = [*prompt.ids.tolist(), *answer.ids]
    ask = {"model": "federated", "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    for cut, counted in ((len(ids), 0), (len(ids) - 1, 1)):
        choice = (reply := client.completions.create(prompt=ids[:cut], **ask)).choices[0]
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == cut + 1
        assert reply.usage.completion_tokens == counted
        chunks = [c.choices[0] for c in client.completions.create(prompt=ids[:cut], **ask, stream=True)]
        assert [t for c in chunks if c.logprobs for t in c.logprobs.tokens] == choice.logprobs.tokens
        assert [c.finish_reason for c in chunks if c.finish_reason] == [choice.finish_reason]
    end = client.completions.create(prompt=ids, **ask).choices[0]
    assert end.finish_reason == "stop"
    assert end.logprobs.tokens[-1] == oracle.base.tokenizer.eos_token
    assert end.logprobs.text_offset[-1] == len(end.text)
    with oracle.using(["federated"]) as model, torch.no_grad():
        likeliest = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].float(), dim=-1).max()
    assert end.logprobs.token_logprobs[-1] == pytest.approx(float(likeliest), abs=1e-4)


def test_chat_log_probabilities_have_bytes_that_make_the_text(client):
    ask = {"model": "federated", "messages": ASKED, "max_tokens": 30, "temperature": 0}
    choice = client.chat.completions.create(**ask, logprobs=True, top_logprobs=4).choices[0]
    assert bytes(b for t in choice.logprobs.content for b in t.bytes).decode() == choice.message.content
    for token in choice.logprobs.content:
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)
        assert token.top_logprobs[0].logprob == token.logprob  # greedy takes the likeliest
        assert len(token.top_logprobs) == 4


def test_a_seed_repeats_and_n_answers_differ(client):
    ask = {"model": "base", "prompt": PROMPT, "max_tokens": 20, "n": 3}
    first, again, other = (client.completions.create(**ask, seed=seed) for seed in (5, 5, 6))
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.text for choice in again.choices] != [choice.text for choice in other.choices]
    assert len(set(texts)) > 1
    assert client.completions.create(**ask | {"n": 1}, seed=5).choices[0].text == texts[0]
    assert client.completions.create(**ask).choices[0].text != client.completions.create(**ask).choices[0].text


def test_a_stop_string_ends_an_answer_wherever_tokens_begin(client):
    ask = {"model": "base", "prompt": PROMPT, "max_tokens": 60, "temperature": 1.0, "seed": 3}
    text = client.completions.create(**ask).choices[0].text
    for length in (1, 3, 6):
        for start in range(4, 24, 5):
            stop = text[start : start + length]
            expected = text[: text.index(stop)]
            reply = client.completions.create(**ask, stop=[stop, "never said"])
            assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected, "stop")
    stop = text[10:14]
    chunks = client.completions.create(**ask, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == text[: text.index(stop)]


def test_sampling_options_and_beams_are_the_models_own(client, oracle):
    reply = client.chat.completions.create(model="federated", messages=ASKED, temperature=0.7, seed=9, max_tokens=30)
    assert reply.choices[0].message.content == whole(oracle, "federated", 30, 0.7, 9).text
    settings = GenerationSettings(max_new_tokens=12, temperature=0, beams=3)
    expected = oracle.answer([oracle.raw_prompt(PROMPT, 12)], ["base"], settings, seed=0)[0].text
    ask = {"model": "base", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "extra_body": {"beams": 3}}
    assert client.completions.create(**ask).choices[0].text == expected
    assert "".join(c.choices[0].text for c in client.completions.create(**ask, stream=True)) == expected
    greedy = client.completions.create(model="base", prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text
    one = client.completions.create(model="base", prompt=PROMPT, max_tokens=12, extra_body={"top_k": 1})
    assert one.choices[0].text == greedy
    assert client.completions.create(model="base", prompt=PROMPT, max_tokens=12, top_p=1e-6).choices[0].text == greedy


def test_a_system_message_and_parts_of_text_reach_the_template(client, oracle):
    parts = [{"type": "text", "text": "Which animal is faster, "}, {"type": "text", "text": "a snail or a horse?"}]
    ask = {"model": "federated", "temperature": 0, "max_tokens": 20}
    assert (
        client.chat.completions.create(**ask, messages=[{"role": "user", "content": parts}]).choices[0].message
        == client.chat.completions.create(**ask, messages=ASKED).choices[0].message
    )
    told = [Message("system", "Be brief."), Message("user", QUESTION)]
    reply = client.chat.completions.create(**ask, messages=[{"role": m.role, "content": m.content} for m in told])
    assert reply.usage.prompt_tokens == len(oracle.prompt(told, 1).ids)


@pytest.mark.parametrize(
    ("asked", "status", "param", "words"),
    [
        ({"model": "federatd"}, 404, "model", "did you mean 'federated'"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "cannot honour"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "leave it out"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "cannot honour"),
        ({"logit_bias": {"5": 10}}, 400, "logit_bias", "cannot honour"),
        ({"temperature": 3}, 400, "temperature", "found 3"),
        ({"max_tokens": 1001}, 400, "max_tokens", "at most 1,000"),
        ({"max_tokens": 1000, "messages": [{"role": "user", "content": "word " * 200}]}, 400, "messages", "positions"),
        ({"n": 9}, 400, "n", "at most 8"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, 400, "messages", "ending with user"),
        ({"extra_body": {"temprature": 0}}, 400, "temprature", "did you mean 'temperature'"),
        ({"extra_body": {"beams": 2}, "temperature": 1}, 400, "beams", "temperature to 0"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(client, asked, status, param, words):
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": "federated", "messages": ASKED} | asked)
    assert (refused.value.status_code, refused.value.body["param"]) == (status, param)
    assert words in refused.value.body["message"]
    if param == "messages" and "max_tokens" in asked:
        assert refused.value.body["code"] == "context_length_exceeded"


def test_neutral_values_change_nothing(client):
    ask = {"model": "federated", "messages": ASKED, "temperature": 0, "max_tokens": 20}
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "stop": None, "user": "ann"}
    neutral |= {"response_format": {"type": "text"}, "tool_choice": "none", "extra_body": {"best_of": 1, "tools": []}}
    plain, same = client.chat.completions.create(**ask), client.chat.completions.create(**ask, **neutral)
    assert plain.choices[0].message == same.choices[0].message


def test_the_printed_curl_line_works(server):
    body = json.dumps({"model": "federated", "messages": [{"role": "user", "content": "Hello"}]})
    words = ["curl", "-sS", f"{server.url}/chat/completions", "-H", "Content-Type: application/json"]
    words += ["-H", f"Authorization: Bearer {TOKEN}", "-d", body]
    said = json.loads(subprocess.run(words, capture_output=True, check=True, timeout=30).stdout)
    assert said["choices"][0]["message"]["content"]


def test_an_answer_handed_back_whole_is_the_conversation_so_far(client):
    asked = [{"role": "user", "content": "Name a dog."}]
    first = client.chat.completions.create(model="federated", messages=asked, temperature=0, max_tokens=8)
    message, more = first.choices[0].message, {"role": "user", "content": "Name a bird."}
    plain = {"role": "assistant", "content": message.content}
    answers = [
        client.chat.completions.create(model="federated", messages=[*asked, said, more], temperature=0, max_tokens=8)
        for said in (message, message.model_dump(), plain)
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
