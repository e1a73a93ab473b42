"""`vllm serve` with method eagle3 answers chat completions through the openai client (60 s)."""

import subprocess
import sys
from pathlib import Path

import pytest
from served import served

from vllm_eagle3.evaluation.demo_models import default_pair

CLIENT = Path(__file__).parents[2] / "examples" / "client.py"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    with served(*default_pair(), folder / "log", cache=folder / "cache") as running:
        yield running


def test_chat_completion(server):
    client = server.client()
    ask = {"model": "target", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    ask |= {"temperature": 0, "max_tokens": 24}
    first = client.chat.completions.create(**ask).choices[0].message.content
    pieces = client.chat.completions.create(**ask, stream=True)
    assert "Paris" in first and first == "".join(
        p.choices[0].delta.content or "" for p in pieces if p.choices
    )
    assert server.total("vllm:spec_decode_num_drafts_total") > 0
    assert server.total("vllm:eagle3_steps_total") > 0
    assert "vllm-eagle3: drafting for" in server.log.read_text()


@pytest.mark.parametrize("limit", [-1, 4, "many"])
def test_a_bad_limit_is_a_400(server, limit):
    import openai

    ask = {"model": "target", "messages": [{"role": "user", "content": "Count."}]}
    with pytest.raises(openai.BadRequestError, match="expected an integer from 0 .* to 3"):
        server.client().chat.completions.create(
            **ask, extra_body={"vllm_xargs": {"eagle3_max_draft_tokens": limit}}
        )


def test_client_example(server):
    command = [sys.executable, CLIENT, "--url", f"{server.url}/v1", "What is the capital of France?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Paris" in done.stdout, done.stderr
