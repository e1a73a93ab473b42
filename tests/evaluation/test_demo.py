"""The output of the demo: marked accepted drafts, answers of a few lines, the engines' messages in a log (5 s)."""

import io
import os
import sys

import pytest

from vllm_eagle3 import log_files
from vllm_eagle3.evaluation import demo
from vllm_eagle3.evaluation.accepted_text import BRACKETS, COLOUR, AcceptedText, marked, marks_for, wrapped
from vllm_eagle3.evaluation.engine_process import EngineProcess
from vllm_eagle3.evaluation.probe import verdict
from vllm_eagle3.evaluation.sweep.worker import Measurement
from vllm_eagle3.log_files import EngineFailedError, log_file

WORDS = ["The", " sky", " is", " blue", ",", " light"]


def decode(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def test_the_last_token_of_a_step_is_the_targets() -> None:
    text = AcceptedText(decode)
    assert text.step([0]) == [("The", False)]
    assert text.step([1, 2, 3]) == [(" sky is", True), (" blue", False)]
    assert text.step([4, 5]) == [(",", True), (" light", False)]


def test_marks() -> None:
    parts = [("The", False), (" sky is", True), (" blue", False)]
    assert marked(parts, BRACKETS) == "The [sky is] blue"
    assert marked(parts, COLOUR) == "The \x1b[1;32msky is\x1b[0m blue"


def test_an_unfinished_character_waits_for_its_last_token() -> None:
    text = AcceptedText(
        lambda ids: b"".join([b"\xc3", b"\xa9", b"!"][i] for i in ids).decode("utf-8", "replace")
    )
    assert text.step([0]) == [] and text.step([1, 2]) == [("\xe9", True), ("!", False)]


def test_long_answers_are_cut() -> None:
    lines = wrapped([[0], [1, 2, 3], [4, 5]] * 20, decode, BRACKETS, width=30, lines=3)
    assert len(lines) == 3 and lines[0].startswith("The [sky is] blue[,] light") and lines[2].endswith(" ...")
    plain = [line.replace("[", "").replace("]", "") for line in lines]
    assert all(len(line) <= 30 + len(" ...") for line in plain)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert marks_for(Terminal()) == COLOUR and marks_for(io.StringIO()) == BRACKETS
    monkeypatch.setenv("NO_COLOR", "1")
    assert marks_for(Terminal()) == BRACKETS


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def process(module_text: str, cache, monkeypatch) -> EngineProcess:
    (cache / "small_engine.py").write_text(module_text)
    env = os.environ | {"PYTHONPATH": str(cache)}
    return EngineProcess("small", "small_engine", [], env, log_file("test"))


def test_an_engine_that_ends_shows_the_end_of_its_log(cache, monkeypatch) -> None:
    text = "import sys\nfor i in range(100): print('line', i, file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(
        EngineFailedError, match="the engine 'small' ended with exit code 3; the whole log: "
    ) as error:
        process(text, cache, monkeypatch).reply()
    tail = error.value.tail().splitlines()
    assert len(tail) == log_files.TAIL and tail[-1] == "line 99"


def test_closing_an_engine_that_has_ended_hides_nothing(cache, monkeypatch) -> None:
    engine = process("import sys; sys.exit(3)", cache, monkeypatch)
    engine.process.wait()
    engine.send({"measure": [1, 0]})
    engine.process.stdin.write("left in the buffer")
    engine.close()


def test_replies_and_errors(cache, monkeypatch) -> None:
    text = "for line in __import__('sys').stdin: print(line, end='', flush=True)"
    engine = process(text, cache, monkeypatch)
    for command in ({"step": [1]}, {"end": {}}, {"error": "no room"}):
        engine.send(command)
    assert list(engine.replies()) == [{"step": [1]}, {"end": {}}]
    with pytest.raises(RuntimeError, match="the engine 'small': no room"):
        engine.reply()
    engine.close()
    assert engine.process.returncode == 0 and sys.executable in engine.process.args


class TimedWorker:
    """Answers each measurement with its speed, in tokens per second."""

    def __init__(self, name: str, speeds: list[float]) -> None:
        self.name, self.speeds = name, iter(speeds)

    def measure(self, batch_size: int, turn: int) -> Measurement:
        return Measurement(tokens=100, seconds=100 / next(self.speeds), drafts=50, accepted=50)


def test_the_table_has_speeds_ratios_and_their_range() -> None:
    settings = demo.SweepSettings("t", "d", (), batch_sizes=(1,), modes=tuple(demo.NAMES), repeats=3)
    # The first speed of each engine only warms it up.
    workers = [
        TimedWorker("none", [1, 10, 10, 10]),
        TimedWorker("native-3", [1, 12, 13, 14]),
        TimedWorker("auto", [1, 15, 16, 18]),
        TimedWorker("tree", [1, 9, 11, 20]),
    ]
    lines = [line.split() for line in demo.table(demo.speeds(settings, workers))]
    assert lines[0] == ["tokens/s", "speed-up", "(range)", "tau"]
    assert lines[1] == ["no", "speculation", "10.0", "1.00", "(1.00-1.00)", "2.00"]
    assert lines[2] == ["stock", "eagle3", "13.0", "1.30", "(1.20-1.40)", "2.00"]
    assert lines[3] == ["vllm-eagle3,", "chain", "16.0", "1.60", "(1.50-1.80)", "2.00"]
    assert lines[4] == ["vllm-eagle3,", "tree", "11.0", "1.10", "(0.90-2.00)", "2.00"]


def test_verdicts_of_the_probe() -> None:
    assert verdict({(1, 2, 3): 0.6, (0, 1, 2): 0.5, (2, 3, 4): 0.61}) == (
        True,
        "the draft fits: 0.60 of its first drafted tokens are the target's",
    )
    fits, text = verdict({(1, 2, 3): 0.5, (0, 1, 2): 0.6, (2, 3, 4): 0.4})
    assert not fits and "try aux_layers [0, 1, 2]" in text
    fits, text = verdict({(1, 2, 3): 0.05, (0, 1, 2): 0.04})
    assert not fits and text.startswith("only 0.05 of the first drafted tokens")
