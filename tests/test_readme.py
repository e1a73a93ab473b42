"""The README's snippets run as they stand, with the names of the embedded pair put in; its table is made (60 s)."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_eagle3.config import options_table
from vllm_eagle3.evaluation.demo_models import default_pair

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
NAMES = ("meta-llama/Llama-3.1-8B-Instruct", "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B")


def snippet(name: str) -> str:
    found = re.search(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no snippet {name!r}"
    return found[1]


@pytest.fixture(scope="module")
def local():
    """Puts the embedded pair in place of the README's models."""
    pair = default_pair()

    def put(text: str) -> str:
        for name, path in zip(NAMES, pair, strict=True):
            assert name in text
            text = text.replace(name, str(path))
        return text

    return put


def test_options_table():
    table = README.split("<!-- options -->\n")[1].split("<!-- /options -->")[0]
    assert table == options_table()


def test_llm_snippet(local):
    code = "if __name__ == '__main__':\n" + re.sub("^", "    ", local(snippet("llm")), flags=re.MULTILINE)
    small = "enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=2**28"
    code = code.replace("speculative_config=", f"{small}, speculative_config=")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert "Paris" in done.stdout, done.stderr[-3000:]


def test_serve_snippet_is_what_the_server_test_starts(local):
    """Parses as a command line; `e2e/test_serve.py` starts a server with the same arguments."""
    words = shlex.split(local(snippet("serve")))
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert words[:2] == ["vllm", "serve"] and config["method"] == "eagle3"
    assert set(config) == {"method", "model", "num_speculative_tokens"}
