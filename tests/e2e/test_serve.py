"""`vllm serve` with method eagle3 answers chat completions through the openai client (60 s)."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from vllm_eagle3.evaluation.demo_models import default_pair

CLIENT = Path(__file__).parents[2] / "examples" / "client.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(base URL, log file) of a running server."""
    target, draft = default_pair()
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    config = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 3}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(target)]
    command += [
        "--speculative-config",
        json.dumps(config),
        "--port",
        str(port),
        "--served-model-name",
        "target",
    ]
    command += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", "256M"]
    env = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 300
            while True:
                try:
                    urllib.request.urlopen(url + "/health", timeout=2)
                    break
                except (urllib.error.URLError, OSError):
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                    time.sleep(1)
            yield url, log
        finally:
            process.terminate()
            process.wait(timeout=60)


def test_chat_completion(server):
    import openai

    url, log = server
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    ask = {"model": "target", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    first, second = (
        client.chat.completions.create(**ask, temperature=0, max_tokens=24).choices[0].message.content
        for _ in range(2)
    )
    assert "Paris" in first and first == second
    with urllib.request.urlopen(url + "/metrics") as response:
        metrics = response.read().decode()
    drafts = [line for line in metrics.splitlines() if line.startswith("vllm:spec_decode_num_drafts_total")]
    assert float(drafts[0].split()[-1]) > 0
    assert "vllm-eagle3: drafting for" in log.read_text()


def test_client_example(server):
    url, _ = server
    command = [sys.executable, CLIENT, "--url", url + "/v1", "What is the capital of France?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Paris" in done.stdout, done.stderr
