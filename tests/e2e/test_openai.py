"""The real server and the real `openai` client, with trees and grafts on the V2 runner (4 minutes)."""

import concurrent.futures
import json

import pytest
from served import served

from vllm_eagle3.evaluation.demo_models import default_pair

pytestmark = pytest.mark.slow  # e2e/test_serve.py is the short form
openai = pytest.importorskip("openai")
NO_DRAFTS = {"vllm_xargs": {"eagle3_max_draft_tokens": 0}}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONG = [{"role": "user", "content": "Summarise: " + "The ship sailed to the north and came back. " * 30}]

TREE = {"depth": 3, "topk": 2, "nodes": 6}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    flags = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--disable-uvicorn-access-log"]
    options = {"v2": True, "cache": folder / "cache", "drafts": 6, "tree": TREE}
    with served(*default_pair(), folder / "log", *flags, **options) as running:
        yield running
        assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def ask(client, messages=QUESTION, **kwargs):
    given = {"model": "target", "temperature": 0, "max_tokens": 24} | kwargs
    return client.chat.completions.create(messages=messages, **given)


def text(client, messages=QUESTION, **kwargs):
    return ask(client, messages, **kwargs).choices[0].message.content


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"max_tokens": 1},
        {"stop": ["capital"]},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"extra_body": {"repetition_penalty": 1.3}},
        {"extra_body": {"bad_words": ["Paris"]}},
        {"extra_body": {"min_tokens": 10}},
        {"messages": LONG},
    ],
    ids=str,
)
def test_the_text_is_that_of_no_drafts(client, asked):
    asked = dict(asked)
    messages, body = asked.pop("messages", QUESTION), asked.pop("extra_body", {})
    plain = text(client, messages, extra_body=body | NO_DRAFTS, **asked)
    assert text(client, messages, extra_body=body, **asked) == plain
    pieces = ask(client, messages, extra_body=body, stream=True, **asked)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == plain


def test_drafts_were_verified(server):
    assert server.total("vllm:spec_decode_num_accepted_tokens_total") > 0
    assert server.total("vllm:eagle3_steps_total") > 0
    assert 'reason="a request limits its drafts"' in str(server.metrics())


def test_a_limit_without_drafts(server, client):
    before = server.total("vllm:spec_decode_num_draft_tokens_total")
    ask(client, extra_body=NO_DRAFTS)
    assert server.total("vllm:spec_decode_num_draft_tokens_total") == before


@pytest.mark.parametrize("limit", [-1, 7, 1.5, "many"])
def test_a_bad_limit_is_a_400(client, limit):
    with pytest.raises(openai.BadRequestError, match="expected an integer from 0 .* to 6"):
        ask(client, extra_body={"vllm_xargs": {"eagle3_max_draft_tokens": limit}})


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "extra_body": {"top_k": 5}},  # ended the server without the repair
        {"temperature": 1.0, "top_p": 0.9, "extra_body": {"top_k": 5}},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 1.0, "seed": 7, "messages": LONG},
        {"temperature": 1.0, "extra_body": {"min_p": 0.1}},
        {"temperature": 1.0, "extra_body": {"logit_bias": {"5": 1.0}}},
        {"temperature": 2.0, "n": 3},
        {"temperature": 1.0, "logprobs": True, "top_logprobs": 3},
    ],
    ids=str,
)
def test_sampled_answers(client, asked):
    answer = ask(client, **asked)
    assert len(answer.choices) == asked.get("n", 1)
    assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
    if asked.get("logprobs"):
        assert all(len(token.top_logprobs) == 3 for token in answer.choices[0].logprobs.content)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_schema(client, temperature):
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 10},
            "people": {"type": "integer", "maximum": 99},
        },
        "required": ["city", "people"],
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    found = json.loads(text(client, response_format=wanted, temperature=temperature, max_tokens=60))
    assert isinstance(found["city"], str) and isinstance(found["people"], int)


def test_a_tool_call(client):
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 10}},
                "required": ["city"],
            },
        },
    }
    asked = {
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 60,
    }
    call = ask(client, **asked).choices[0].message.tool_calls[0].function
    assert call.name == "weather" and json.loads(call.arguments)


def test_responses(client):
    found = client.responses.create(
        model="target", input="What is the capital of France?", temperature=0, max_output_tokens=24
    )
    assert "Paris" in found.output_text


def test_many_at_once(client):
    plain = text(client, extra_body=NO_DRAFTS)
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        assert set(pool.map(lambda _: text(client), range(64))) == {plain}


def test_clients_that_leave(server, client):
    plain = text(client)
    for _ in range(8):
        stream = ask(client, max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
    assert text(client) == plain


def test_to_the_longest_sequence_and_past_it(client):
    answer = ask(client, LONG, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 512 and answer.choices[0].finish_reason == "length"
    too_long = [{"role": "user", "content": "north " * 600}]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask(client, too_long)
    assert "Paris" in text(client), "it still answers"
