"""A real `vllm serve` with method eagle3, for tests that talk to it as users do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager"]
SIZES += ["--kv-cache-memory-bytes", "256M"]


@dataclass
class Served:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def metrics(self) -> dict[str, float]:
        """Series of /metrics: name{labels} -> value."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}

    def total(self, name: str) -> float:
        """The sum of a series over its labels."""
        return sum(value for key, value in self.metrics().items() if key.startswith(name + "{"))


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(
    target: Any,
    draft: Any,
    log: Path,
    *flags: str,
    drafts: int = 3,
    v2: bool | None = None,
    cache: Path | None = None,
    **options: Any,
) -> Iterator[Served]:
    """`vllm serve TARGET` under the name `target`; `options` are the plugin's, `cache` is its XDG_CACHE_HOME."""
    port = free_port()
    config = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": drafts}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(target), *SIZES, *flags]
    command += ["--port", str(port), "--served-model-name", "target"]
    command += ["--speculative-config", json.dumps(config)]
    command += ["--additional-config", json.dumps({"eagle3": options})]
    env = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if v2 is not None:  # otherwise the runner is the plugin's choice
        env["VLLM_USE_V2_MODEL_RUNNER"] = str(int(v2))
    if cache is not None:
        env["XDG_CACHE_HOME"] = str(cache)
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        server = Served(f"http://127.0.0.1:{port}", log, process)
        try:
            wait_until_up(server)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_up(server: Served, seconds: float = 400.0) -> None:
    """Returns when /health answers. Raises AssertionError with the end of the log when the server ends before."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=2)
            return
        except (urllib.error.URLError, OSError):
            text = server.log.read_text()[-4000:]
            assert server.process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.5)
