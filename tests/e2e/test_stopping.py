"""How a server ends, and what it keeps (2 minutes)."""

import json
import time

import psutil
import pytest
from served import served

from vllm_eagle3.evaluation.demo_models import default_pair

pytestmark = pytest.mark.slow
ASK = {"model": "target", "messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 40}


def cost_files(cache):
    return list((cache / "vllm-eagle3" / "cost").glob("*.json"))


def test_a_damaged_cost_file_and_a_worker_that_dies(tmp_path):
    """The server starts, says what is wrong with the file, and mends it; when its engine is killed, it ends."""
    import openai

    with served(*default_pair(), tmp_path / "log", cache=tmp_path) as server:
        server.client().chat.completions.create(**ASK)
    (file,) = cost_files(tmp_path)
    file.write_bytes(b"\xff garbage")
    with served(*default_pair(), tmp_path / "log", cache=tmp_path) as server:
        server.client().chat.completions.create(**ASK)
        assert f"the cost file {file} cannot be used and is learned anew" in server.log.read_text()
        time.sleep(1.0)
        assert json.loads(file.read_text())["seen"]
        cores = [
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if "EngineCore" in " ".join(child.cmdline())
        ]
        assert cores, "the engine runs in a process of its own"
        for core in cores:
            core.kill()
        client = server.client()
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            client.chat.completions.create(**ASK, timeout=60)
        assert server.process.wait(timeout=60) is not None, "it does not stay up without an engine"
