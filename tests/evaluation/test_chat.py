"""`vllm-eagle3 chat` with a scripted input: marks, history, commands and counts (5 s)."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_eagle3 import cli
from vllm_eagle3.evaluation import chat, demo_models
from vllm_eagle3.evaluation.chat import Chat, typed_lines

WORDS = ["The", " sky", " is", " blue", "."]


class ScriptedEngine:
    """Answers each question in two steps: "The", then " sky is blue.", whose last token is the target's."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def ask(self, command: Any) -> None:
        self.asked.append(json.loads(json.dumps(command)))

    def replies(self) -> Iterator[dict[str, Any]]:
        yield {"step": [0]}
        yield {"step": [1, 2, 3, 4]}
        yield {
            "end": {
                "verifications": 1, "accepted": 3, "accepted_per_position": [1, 1, 1],
                "decode_tokens": 4, "seconds": 0.5,
            }
        }  # fmt: skip


def talk(script: str) -> tuple[str, ScriptedEngine]:
    engine, shown = ScriptedEngine(), io.StringIO()
    talker = Chat(engine, lambda ids: "".join(WORDS[i] for i in ids), shown)
    talker.talk(typed_lines(io.StringIO(script), shown))
    return shown.getvalue(), engine


def test_a_conversation() -> None:
    shown, engine = talk("Why?\n\n/stats\nAnd now?\n/stats\n/exit\nnever asked\n")
    assert shown.splitlines() == [
        "> Why?",
        "The [sky is blue].",
        "> ",
        "> /stats",
        "4.00 tokens per verification (tau), 8.0 tokens/s after the first token, 4 tokens",
        "> And now?",
        "The [sky is blue].",
        "> /stats",
        "4.00 tokens per verification (tau), 8.0 tokens/s after the first token, 8 tokens",
        "> /exit",
    ]
    first, second = (command["chat"] for command in engine.asked)
    assert first == [{"role": "user", "content": "Why?"}]
    assert second == [
        *first,
        {"role": "assistant", "content": "The sky is blue."},
        {"role": "user", "content": "And now?"},
    ]


def test_commands_are_no_questions() -> None:
    shown, engine = talk("/stats\n/help\n")
    assert shown.splitlines() == ["> /stats", "no answer yet", "> /help", "commands: /stats, /exit"]
    assert engine.asked == []


def test_half_a_pair_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--target", "some/name"]) == 2
    assert capsys.readouterr().err == (
        "vllm-eagle3 chat: --target and --draft: expected both or none of them\n"
    )


def test_the_embedded_pair_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_models, "default_pair", lambda: (Path("/t"), Path("/d")))
    settings = chat.settings_of(cli.parser().parse_args(["chat", "--max-tokens", "9"]))
    assert (settings.target, settings.draft, settings.max_tokens) == ("/t", "/d", 9)
    assert settings.runs() == [("auto", "auto", 3)]


def test_an_answer_longer_than_a_conversation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--max-tokens", "512", "--max-model-len", "512"]) == 2
    assert "--max-tokens: expected less than --max-model-len 512, found 512" in capsys.readouterr().err
