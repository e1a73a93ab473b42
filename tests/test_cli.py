"""A user's mistake is one line on stderr and exit code 2, before any work (5 s)."""

import json
from pathlib import Path

import pytest

from vllm_eagle3 import cli, user_input
from vllm_eagle3.evaluation import demo_models


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"id": "a", "turns": ["Hello"]}) + "\n")
    return path


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the options were not checked before the download")

    monkeypatch.setattr(demo_models, "default_target", refuse)


def mistake(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command says about a mistake; fails unless that is one line and the exit code is 2."""
    assert cli.main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("eval", "--data", "/no/file"), "eval: --data: expected a file of prompts, found none at /no/file"),
        (
            ("eval", "--data", "PROMPTS", "--target", "/no/dir"),
            "eval: --target: expected the directory of a model",
        ),
        (
            ("eval", "--data", "PROMPTS", "--draft", "./no/dir"),
            "eval: --draft: expected the directory of a model",
        ),
        (("eval", "--data", "BROKEN"), "broken.jsonl:1: not valid JSON"),
        (
            ("eval", "--data", "PROMPTS", "--json", "/no/dir/x"),
            "--json: expected a file in a folder that exists",
        ),
        (("eval", "--data", "PROMPTS", "--batch-size", "0"), "--batch-size: expected at least 1, found 0"),
        (("sweep", "--draft", "/no/dir"), "sweep: --draft: expected the directory of a model"),
        (("sweep", "--data", "/no/file"), "sweep: --data: expected a file of prompts"),
        (("sweep", "--json", "/no/dir/x"), "sweep: --json: expected a file in a folder that exists"),
        (
            ("train", "--target", "/no/dir", "--out", "OUT", "--data", "PROMPTS"),
            "train: --target: expected the",
        ),
        (
            ("train", "--target", "a/b", "--out", "OUT", "--prompts", "/no/file.jsonl"),
            "--prompts: expected a file",
        ),
        (
            ("train", "--target", "a/b", "--out", "OUT", "--data", "PROMPTS", "--source-licences", "BROKEN"),
            "--source-licences: expected JSON in",
        ),
        (("train", "--target", "a/b", "--out", "OUT"), "train: nothing to train on"),
        (("inspect", "/no/dir"), "inspect: /no/dir"),
    ],
)
def test_a_mistake_is_one_line(words, said, prompts, tmp_path, capsys) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    names = {"PROMPTS": prompts, "BROKEN": broken, "OUT": tmp_path / "out"}
    assert said in mistake(capsys, *(names.get(word, word) for word in words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("eval", "--data", "PROMPTS", "--json", "x"),
            "--json: expected a file that may be written, found x",
        ),
        (
            ("train", "--target", "a/b", "--out", "o", "--data", "PROMPTS"),
            "--out: expected a folder that may be",
        ),
    ],
)
def test_what_may_not_be_written_is_found_before_the_work(words, said, prompts, monkeypatch, capsys) -> None:
    monkeypatch.setattr(user_input.os, "access", lambda *_: False)
    assert said in mistake(capsys, *(prompts if word == "PROMPTS" else word for word in words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("eval", "--data", "PROMPTS", "--plot", "x.png"), "--plot needs matplotlib, which is not installed"),
        (("sweep", "--plot", "x.png"), "--plot needs matplotlib, which is not installed"),
        (("train", "--target", "a/b", "--out", "o", "--data", "PROMPTS"), "pip install 'vllm-eagle3[train]'"),
    ],
)
def test_a_missing_package_is_found_before_the_work(words, said, prompts, monkeypatch, capsys) -> None:
    monkeypatch.setattr(user_input.importlib.util, "find_spec", lambda _: None)
    assert said in mistake(capsys, *(prompts if word == "PROMPTS" else word for word in words))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """`failing(error)`: `vllm-eagle3 fetch-demo` ends in it."""

    def arrange(error: BaseException) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr(demo_models, "default_target", fail)

    return arrange


def test_an_interrupt_is_one_line(failing, capsys) -> None:
    failing(KeyboardInterrupt())
    assert mistake(capsys, "fetch-demo") == "vllm-eagle3 fetch-demo: interrupted\n"


@pytest.mark.parametrize("words", [("--debug", "fetch-demo"), ("fetch-demo", "--debug")])
def test_debug_shows_the_traceback(failing, words, capsys) -> None:
    failing(RuntimeError("no\nindex"))
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("vllm-eagle3 fetch-demo: no index\n")


def test_a_defect_keeps_its_traceback(failing) -> None:
    failing(KeyError("x"))
    with pytest.raises(KeyError):
        cli.main(["fetch-demo"])


def test_fetch_demo_prints_paths_only(monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo_models, "default_target", lambda: Path("/t"))
    monkeypatch.setattr(demo_models, "default_draft", lambda: Path("/d"))
    shown = []
    for words in (["--target"], ["--draft"], []):
        assert cli.main(["fetch-demo", *words]) == 0
        shown.append(capsys.readouterr().out)
    assert shown == ["/t\n", "/d\n", "/t\n/d\n"]


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [("EAGLE3_DISABLE", "1", "Unset EAGLE3_DISABLE"), ("VLLM_PLUGINS", "other", "Add eagle3")],
)
def test_doctor_is_not_ready_where_the_plugin_is_off(variable, value, remedy, monkeypatch, capsys) -> None:
    monkeypatch.delenv("EAGLE3_DISABLE", raising=False)
    monkeypatch.setenv(variable, value)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.startswith(remedy)
