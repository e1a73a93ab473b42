"""Prompts in, answers out: formats, errors, shards, resume; the engine is faked (10 s: imports vLLM)."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_eagle3.prompts import Prompt, load_prompts
from vllm_eagle3.training import generate
from vllm_eagle3.training.answer_shards import ShardWriter, done_keys, shards
from vllm_eagle3.training.generate import GenerateSettings, conversations


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return path


ROWS = [{"id": f"p{i}", "source": "ab"[i % 2], "turns": [f"q{i}", f"r{i}"][: 1 + i % 2]} for i in range(8)]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"turns": ["a", "b"]}, ("a", "b")),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x"}]}, ("a",)),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}, ("a",)),
        ({"prompt": "a"}, ("a",)),
        ({"instruction": "a", "input": "b"}, ("a\n\nb",)),
        ({"instruction": "a", "input": ""}, ("a",)),
    ],
)
def test_formats(tmp_path: Path, row: dict[str, Any], turns: tuple[str, ...]) -> None:
    (prompt,) = load_prompts(write(tmp_path / "own.jsonl", [row]))
    assert prompt.turns == turns and prompt.source == "own" and prompt.id.startswith("own-")


@pytest.mark.parametrize(
    "row",
    [
        {"system": "be kind", "turns": ["a"]},
        {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a"}]},
        {"conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "a"}]},
    ],
)
def test_system_prompts_are_kept(tmp_path: Path, row: dict[str, Any]) -> None:
    """The target reads them before the first turn, and they make another prompt of the same turns."""
    path, plain = write(tmp_path / "p.jsonl", [row]), write(tmp_path / "q.jsonl", [{"turns": ["a"]}])
    settings = GenerateSettings("t", (str(path),), tmp_path / "out")
    (conversation,) = conversations(settings)
    assert conversation.prompt == Prompt(conversation.prompt.id, "p", ("a",), "be kind")
    assert load_prompts(plain)[0].id.split("-")[1] != conversation.prompt.id.split("-")[1]
    (answered,) = generate.answer(FakeEngine(), [conversation], settings)
    assert "".join(map(chr, answered.rows[0]["prompt_token_ids"])) == "be kinda"


def test_a_system_prompt_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad.jsonl:1: a system prompt is not a string"):
        load_prompts(write(tmp_path / "bad.jsonl", [{"system": 1, "turns": ["a"]}]))


def test_parts_share_the_work_and_never_a_shard(settings: GenerateSettings) -> None:
    """Two processes side by side; then one goes on alone with what neither has done."""
    writers = [ShardWriter(settings.out, 1, part, 2) for part in (0, 1)]
    for part, writer in enumerate(writers):
        mine = replace(settings, part=part, parts=2)
        for conversation in list(generate.answer(FakeEngine(), conversations(mine)[:3], mine)):
            writer.add(conversation.rows)
    names = [path.name for path in shards(settings.out)]
    assert names == [f"part-{i:05d}.jsonl.gz" for i in range(6)]
    assert len({row["id"] for row in read(settings)}) == 6
    run(settings)
    assert {row["id"] for row in read(settings)} == {row["id"] for row in ROWS}
    temperatures = {row["id"]: row["temperature"] for row in read(settings)}
    assert [temperatures[f"p{i}"] for i in range(8)] == [0.0, 1.0] * 4


def test_gz_and_list(tmp_path: Path) -> None:
    rows = load_prompts(write(tmp_path / "p.jsonl.gz", ROWS))
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    assert rows == load_prompts(tmp_path / "p.json")
    assert rows[1] == Prompt("p1", "b", ("q1", "r1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts"),
        ("{", "bad.jsonl:1: not valid JSON"),
        ('{"turns": ["a"]}\n[]', "bad.jsonl:2: expected an object, found list"),
        ('{"text": "a"}', "bad.jsonl:1: expected a key `turns`.*found \\['text'\\]"),
        ('{"turns": ["a", ""]}', "bad.jsonl:1: a user turn is empty"),
        ('{"conversations": "a"}', "not a list of objects"),
    ],
)
def test_bad_rows(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / "bad.jsonl")


def test_no_file() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        load_prompts("nowhere.jsonl")


class FakeEngine:
    """vLLM's engine as far as `answer` needs it: answers with the prompt's length, newest request first."""

    def __init__(self) -> None:
        self.llm_engine = self
        self.waiting: list[tuple[str, list[int], Any]] = []
        self.most = 0

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(
            apply_chat_template=lambda chat, **_: [ord(c) for m in chat for c in m["content"]]
        )

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.waiting.append((request_id, prompt["prompt_token_ids"], params))
        self.most = max(self.most, len(self.waiting))

    def step(self) -> list[Any]:
        request_id, ids, _ = self.waiting.pop()
        made = SimpleNamespace(token_ids=[len(ids), 2], text="!", finish_reason="stop")
        return [SimpleNamespace(request_id=request_id, finished=True, prompt_token_ids=ids, outputs=[made])]


@pytest.fixture
def settings(tmp_path: Path) -> GenerateSettings:
    data = write(tmp_path / "p.jsonl", ROWS)
    return GenerateSettings(
        "t", (str(data),), tmp_path / "out", max_num_seqs=2, shard_rows=3, max_model_len=64
    )


def run(settings: GenerateSettings, stop_after: int | None = None) -> None:
    writer = ShardWriter(settings.out, settings.shard_rows)
    for i, conversation in enumerate(generate.answer(FakeEngine(), conversations(settings), settings), 1):
        writer.add(conversation.rows)
        if i == stop_after:
            return  # killed: what is not in a shard yet is lost
    writer.flush()


def read(settings: GenerateSettings) -> list[dict[str, Any]]:
    return [json.loads(line) for path in shards(settings.out) for line in gzip.open(path, "rt")]


def test_every_turn_is_answered(settings: GenerateSettings) -> None:
    run(settings)
    rows = read(settings)
    assert sorted((row["id"], row["turn"]) for row in rows) == sorted(
        (row["id"], turn) for row in ROWS for turn in range(len(row["turns"]))
    )
    second = next(row for row in rows if (row["id"], row["turn"]) == ("p1", 1))
    assert "".join(map(chr, second["prompt_token_ids"])) == "q1!r1"
    assert second["response_token_ids"] == [5, 2]
    temperatures = {row["id"]: row["temperature"] for row in rows}
    assert [temperatures[f"p{i}"] for i in range(8)] == [0.0, 1.0] * 4


def test_a_killed_run_is_resumed(settings: GenerateSettings) -> None:
    run(settings, stop_after=5)
    kept = done_keys(shards(settings.out))
    assert 0 < len(kept) < 8
    assert {c.key for c in conversations(settings)} | kept == {(row["id"], 0) for row in ROWS}
    run(settings)
    rows = read(settings)
    assert len(rows) == 12 and len({(row["id"], row["turn"]) for row in rows}) == 12
    temperatures = {row["id"]: row["temperature"] for row in rows}
    assert [temperatures[f"p{i}"] for i in range(8)] == [0.0, 1.0] * 4
    assert conversations(settings) == []


def test_the_batch_is_kept_full_but_not_more(settings: GenerateSettings) -> None:
    engine = FakeEngine()
    list(generate.answer(engine, conversations(settings), settings))
    assert engine.most == 2 * settings.max_num_seqs


def test_filters(settings: GenerateSettings, tmp_path: Path) -> None:
    done = write(tmp_path / "done.jsonl", [{"id": "p1"}])
    chosen = GenerateSettings(
        "t", settings.data, settings.out, frozenset("b"), (str(done),), skip_last=2, samples=2
    )
    assert [c.key for c in conversations(chosen)] == [("p3", 0), ("p5", 0), ("p3", 1), ("p5", 1)]
    assert [c.temperature for c in conversations(chosen)] == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"--sources: \['z'\] not found"):
        conversations(GenerateSettings("t", settings.data, settings.out, frozenset("z")))


def test_no_room_for_an_answer(settings: GenerateSettings) -> None:
    tight = GenerateSettings("t", settings.data, settings.out, max_model_len=generate.MIN_ROOM + 3)
    answered = list(generate.answer(FakeEngine(), conversations(tight), tight))
    assert len(answered) == 8
    assert all(len(c.rows) == 1 for c in answered)  # the second turn of 5 tokens does not fit


@pytest.mark.parametrize(
    "fields", [{"samples": 0}, {"temperatures": ()}, {"temperatures": (-1.0,)}, {"limit": 0}]
)
def test_bad_settings(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        GenerateSettings(**{"target": "t", "data": ("d",), "out": tmp_path} | fields)
