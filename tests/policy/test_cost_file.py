"""The cost file: it is kept between runs, saved while serving, and never stops the engine (under a second)."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.policy.cost import SeenCost, StepCostModel
from vllm_eagle3.policy.cost_file import LARGEST, CostFile, CostKey

KEY = CostKey("target", "draft", "cpu", "0.32.0 bfloat16")


def seen(steps: int = 3) -> SeenCost:
    cost = SeenCost(StepCostModel.guess())
    for _ in range(steps):
        cost.observe(4, 3, 1.0, 1.5)
    return cost


def content(key: CostKey = KEY) -> dict:
    """The contents of a good file."""
    return json.loads(json.dumps({"format": 1, "key": vars(key), "seen": {"2,3": 1.5}}))


def test_it_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CostFile(KEY, tmp_path).save(seen())
    assert json.loads(KEY.path(tmp_path).read_text()) == content()
    again = CostFile(KEY, tmp_path).load()
    assert again.correction(4, 3) == pytest.approx(1.5)
    other = CostKey("target", "draft", "cuda", "0.32.0 bfloat16")
    assert other.path(tmp_path) != KEY.path(tmp_path)
    assert not CostFile(other, tmp_path).load().to_json(), "nothing is known yet, and that is no fault"
    assert not caplog.records


def damaged(**changes: object) -> str:
    return json.dumps({**content(), **changes})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "JSONDecodeError"),
        (b"\xff\xfe\x00garbage", "UnicodeDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b"[1, 2]", "TypeError"),
        (b"{}", "KeyError"),
        (damaged(format=2).encode(), "found format 2"),
        (damaged(key={"model": "other"}).encode(), "found format 1 for {'model': 'other'}"),
        (damaged(seen={"2,3": -1.0}).encode(), "correction above 0"),
        (damaged(seen={"2,3": float("inf")}).encode(), "correction above 0"),
        (damaged(seen={"2": 1.0}).encode(), "ValueError"),
        (damaged(seen=7).encode(), "AttributeError"),
        (b" " * (LARGEST + 1), f"at most {LARGEST} bytes"),
    ],
)
def test_damage_is_one_warning_and_is_mended_by_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes, reason: str
) -> None:
    path = KEY.path(tmp_path)
    path.write_bytes(text)
    file = CostFile(KEY, tmp_path)
    assert not file.load().to_json()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage() and reason in record.getMessage()
    file.save(seen())
    assert json.loads(path.read_text()) == content()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind", ["folder is a file", "file is a folder", "dangling link", "loop", "pipe"])
def test_other_things_in_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    folder = tmp_path / "cost"
    path = KEY.path(folder)
    if kind == "folder is a file":
        folder.write_text("")
    else:
        folder.mkdir()
        if kind == "file is a folder":
            path.mkdir()
        elif kind == "dangling link":
            path.symlink_to(folder / "nowhere")
        elif kind == "loop":
            path.symlink_to(path)
        else:
            os.mkfifo(path)
    file = CostFile(KEY, folder)
    assert not file.load().to_json()
    file.save(seen())
    file.save(seen())
    assert len(caplog.records) == (kind != "dangling link")
    assert all(str(path) in record.getMessage() for record in caplog.records)
    assert not list(tmp_path.rglob("*.part"))


def test_a_home_that_is_read_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(self: Path, **kwargs: object) -> None:  # root may write everywhere: no chmod would stop it
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    file = CostFile(KEY, tmp_path / "home")
    file.save(seen())
    file.save(seen(30))
    assert len(caplog.records) == 1 and "Permission denied" in caplog.text


def test_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = CostFile(KEY, tmp_path)
    file.save(seen())

    def full(self: Path, text: str, encoding: str) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    file.save(seen(30))
    file.save(seen(40))
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()
    assert json.loads(KEY.path(tmp_path).read_text()) == content(), "the old file is still whole"
    assert not list(tmp_path.glob("*.part"))


def test_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    file = CostFile(KEY)
    assert not file.load().to_json()
    file.save(seen())
    assert "set XDG_CACHE_HOME" in caplog.text and len(caplog.records) == 1


def test_when_it_is_saved(tmp_path: Path) -> None:
    """When the engine rests for the first time; each minute while it works; not without news."""
    now, cost, path = [100.0], seen(), KEY.path(tmp_path)
    file = CostFile(KEY, tmp_path, clock=lambda: now[0])

    def saves(idle: bool) -> bool:
        path.unlink(missing_ok=True)
        file.save_when_due(cost, idle)
        return path.exists()

    assert not saves(idle=False)
    assert saves(idle=True)
    assert not saves(idle=True), "nothing was seen since"
    cost.observe(4, 3, 1.0, 1.5)
    now[0] += 4.0
    assert not saves(idle=True)
    now[0] += 2.0
    assert not saves(idle=False)
    assert saves(idle=True)
    cost.observe(4, 3, 1.0, 1.5)
    now[0] += 61.0
    assert saves(idle=False)
    cost.observe(4, 3, 1.0, 1.5)
    now[0] -= 1000.0
    assert saves(idle=False), "a clock that jumps back does not end the saving"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(place=st.sampled_from(["format", "key", "seen", "2,3"]), value=json_values)
def test_any_value_anywhere(tmp_path_factory: pytest.TempPathFactory, place: str, value: object) -> None:
    data = content()
    (data["seen"] if place == "2,3" else data)[place] = value
    folder = tmp_path_factory.mktemp("cost")
    KEY.path(folder).write_text(json.dumps(data))
    cost = CostFile(KEY, folder).load()
    assert cost.correction(4, 3) > 0.0
    assert cost.base(8, 4, 3, 0.0) > 0.0
