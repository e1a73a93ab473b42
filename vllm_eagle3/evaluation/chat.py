"""`vllm-eagle3 chat`: a conversation in the terminal, in which the text from accepted drafts is marked.

/stats shows tau and tokens/s so far; /exit or the end of the input ends the conversation.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from vllm_eagle3.evaluation.accepted_text import BRACKETS, AcceptedText, Decode, marked, marks_for
from vllm_eagle3.evaluation.metrics import TaskRun
from vllm_eagle3.evaluation.sweep.run import Worker
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.log_files import log_file
from vllm_eagle3.user_input import UserError, check_model

MODE = "auto"
DEFAULTS = {"num_speculative_tokens": 3, "max_tokens": 256, "max_model_len": 2048}


def add_parser(subparsers: Any) -> None:
    """Add the command `chat`."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model and see what its draft contributes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", metavar="DIR", help="directory or name (default: the embedded pair)")
    parser.add_argument("--draft", metavar="DIR", help="directory or name, with --target")
    for name, text in (
        ("num_speculative_tokens", "most drafts in a step"),
        ("max_tokens", "longest answer"),
        ("max_model_len", "longest conversation, tokens; then its oldest messages are left out"),
    ):
        option, default = f"--{name.replace('_', '-')}", DEFAULTS[name]
        parser.add_argument(option, type=int, default=default, help=f"{text} (default: {default})")
    parser.set_defaults(func=run)


class Engine(Protocol):
    """The part of a worker that the chat uses."""

    def ask(self, command: Mapping[str, Any]) -> None:
        """Send a command."""

    def replies(self) -> Iterator[dict[str, Any]]:
        """The replies to the command, up to one with the key "end"."""


@dataclass
class Chat:
    """A conversation, and the counts of its answers."""

    engine: Engine
    decode: Decode
    stream: TextIO
    messages: list[dict[str, str]] = field(default_factory=list)
    counted: TaskRun = field(default_factory=lambda: TaskRun(MODE, "chat", decode_seconds=0.0))

    def talk(self, lines: Iterable[str]) -> None:
        """Answer all lines until the end of the input or /exit."""
        for line in map(str.strip, lines):
            if line == "/exit":
                return
            if line == "/stats":
                self._say(f"{self.stats()}\n")
            elif line.startswith("/"):
                self._say("commands: /stats, /exit\n")
            elif line:
                self.answer(line)

    def answer(self, question: str) -> None:
        """Print the answer to `question` while it arrives."""
        self.messages.append({"role": "user", "content": question})
        text, marks = AcceptedText(self.decode), marks_for(self.stream)
        self.engine.ask({"chat": self.messages})
        for reply in self.engine.replies():
            if "step" in reply:
                self._say(marked(text.step(reply["step"]), marks))
            else:
                self._count(reply["end"])
        self._say("\n")
        self.messages.append({"role": "assistant", "content": text.shown})

    def stats(self) -> str:
        """tau and tokens/s of the answers so far."""
        speed = self.counted.tokens_per_s
        if speed is None:
            return "no answer yet"
        return (
            f"{self.counted.tau:.2f} tokens per verification (tau), {speed:.1f} tokens/s after the first token, "
            f"{self.counted.decode_tokens} tokens"
        )

    def _count(self, end: Mapping[str, Any]) -> None:
        self.counted.count(end["verifications"], end["accepted"], end["accepted_per_position"], 0)
        self.counted.decode_tokens += end["decode_tokens"]
        self.counted.decode_seconds = (self.counted.decode_seconds or 0.0) + end["seconds"]

    def _say(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def typed_lines(source: TextIO, stream: TextIO) -> Iterator[str]:
    """The lines of `source`. Without a terminal they are printed as well, so that captured output is complete."""
    if source.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and a history)

        while True:
            try:
                yield input("> ")
            except EOFError:
                stream.write("\n")
                return
    for line in source:
        stream.write(f"> {line.rstrip()}\n")
        yield line


def settings_of(arguments: argparse.Namespace) -> SweepSettings:
    """The settings of the engine.

    Raises:
        UserError: one of --target and --draft is missing or is not a model.
        RuntimeError: the default target could not be fetched.
    """
    import torch

    from vllm_eagle3.evaluation.demo_models import default_pair

    if bool(arguments.target) != bool(arguments.draft):
        raise UserError("--target and --draft: expected both or none of them")
    for option in ("target", "draft"):
        if getattr(arguments, option):
            check_model(getattr(arguments, option), f"--{option}")
    if arguments.max_tokens >= arguments.max_model_len:
        raise UserError(
            f"--max-tokens: expected less than --max-model-len {arguments.max_model_len}, found {arguments.max_tokens}"
        )
    target, draft = (arguments.target, arguments.draft) if arguments.target else map(str, default_pair())
    return SweepSettings(
        target,
        draft,
        data=(),
        batch_sizes=(1,),
        modes=(MODE,),
        enforce_eager=not torch.cuda.is_available(),  # on a CPU, compiling takes about a minute
        **{name: getattr(arguments, name) for name in DEFAULTS},
    )


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends, and return 0.

    Raises:
        UserError: as `settings_of`.
        RuntimeError: the engine failed.
    """
    from transformers import AutoTokenizer

    settings, log, stream = settings_of(arguments), log_file("chat"), sys.stdout
    tokenizer: Any = AutoTokenizer.from_pretrained(settings.target)
    if tokenizer.chat_template is None:
        raise UserError(f"--target: expected a model with a chat template, found none in {settings.target}")
    stream.write("starting vLLM (about half a minute) ... ")
    stream.flush()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        file.write_text(settings.to_json(), encoding="utf-8")
        worker = Worker(MODE, MODE, file, log=log)
        try:
            worker.wait()
            how = "in brackets" if marks_for(stream) == BRACKETS else "green"
            stream.write(f"what came from accepted drafts is {how}; /stats, /exit\n")
            chat = Chat(worker, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), stream)
            chat.talk(typed_lines(sys.stdin, stream))
        finally:
            worker.close()
    return 0
