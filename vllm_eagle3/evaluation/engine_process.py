"""A process with one engine. It answers in JSON lines; all other output of the process goes to a log file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_eagle3.log_files import EngineFailedError


class EngineProcess:
    """The process `python -m MODULE ARGUMENTS`, whose standard output is one JSON object per line."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], env: Mapping[str, str], log: Path
    ) -> None:
        self.name, self.log = name, log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=dict(env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                encoding="utf-8",
            )

    def send(self, command: Mapping[str, Any]) -> None:
        """Send the process a command, as one JSON object on its standard input."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # `reply` will report that the process has ended
            pass

    def reply(self) -> dict[str, Any]:
        """The next reply.

        Raises:
            EngineFailedError: the process ended without one.
            RuntimeError: it replied with an error.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise EngineFailedError(f"the engine {self.name!r} ended with exit code {code}", self.log)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"the engine {self.name!r}: {reply['error']}")
        return reply

    def replies(self) -> Iterator[dict[str, Any]]:
        """The replies up to and including the one with the key "end"."""
        while True:
            reply = self.reply()
            yield reply
            if "end" in reply:
                return

    def close(self) -> None:
        """Close the input of the process, which ends it; kill it if it does not end."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended, and something was still to be read by it
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
