"""Two gloo ranks: a whole recipe with a kill in its middle, and the failure of one ends both (120 s)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_eagle3.training.ranks import Ranks
from vllm_eagle3.training.state import states

COMMAND = "import sys; from vllm_eagle3.cli import main; sys.exit(main(['train', *sys.argv[1:]]))"
TOGETHER = """
import os, sys, time
from vllm_eagle3.training.ranks import Ranks
ranks = Ranks.join("cpu")
def action():
    time.sleep(2)
    if ranks.rank == 0:
        raise OSError("no room on the disk")
try:
    ranks.together(action if ranks.rank == 0 or sys.argv[1] == "both" else None)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(3)
"""


def start(code: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """The same command as ranks 0 and 1, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def finish(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    texts = [process.communicate(timeout=500)[0] for process in ranks]
    return [process.returncode for process in ranks], texts


@pytest.mark.parametrize("who", ["one", "both"])
def test_a_rank_that_fails_ends_the_others_with_its_message(who: str) -> None:
    codes, texts = finish(start(TOGETHER, who))
    assert codes == [3, 3]
    assert "OSError: no room on the disk" in texts[0]
    assert "RuntimeError: rank 0 failed: no room on the disk" in texts[1]


def test_a_single_process_raises_its_own_error() -> None:
    def fail() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        Ranks().together(fail)
    assert Ranks().together(lambda: 3) == 3 and Ranks().together(None) is None
    assert Ranks().sum(torch.ones(2)).tolist() == [1, 1]


def test_answering_that_fails_on_one_rank_ends_both(tiny_target: Path, tmp_path: Path) -> None:
    """The only prompt is rank 0's, whose engine finds no tokenizer; rank 1 has nothing to answer, and would wait."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"turns": ["hello"]}))
    given = ["--target", str(tiny_target), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    codes, texts = finish(start(COMMAND, *given, "--device", "cpu", "--generate=--enforce-eager"))
    assert codes[0] and codes[1]
    assert "answering the prompts failed with exit code" in texts[0]
    assert "rank 0 failed: answering the prompts failed with exit code" in texts[1]


def test_two_ranks_stopped_and_resumed_train_what_one_process_does(
    tiny_target: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """Stages, a share of the chains, stored features and validation; kill -9 of both in the second stage."""

    def given(name: str) -> list[str]:
        where = [
            "--target",
            str(tiny_target),
            "--data-dir",
            str(tiny_rows.parent),
            "--out",
            str(tmp_path / name),
        ]
        return ["--recipe", "minute", *where, "--fp32", "--save-every", "2"]

    ranks = start(COMMAND, *given("two"))
    deadline = time.monotonic() + 500
    while not states(tmp_path / "two/stage-2") and ranks[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in ranks:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    codes, texts = finish(start(COMMAND, *given("two")))
    assert codes == [0, 0], texts
    single = [sys.executable, "-c", COMMAND, *given("one"), "--accumulate", "2"]
    subprocess.run(single, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=-3)
    for stage in ("stage-1", "stage-2"):
        one, two = (torch.load(states(tmp_path / name / stage)[-1]) for name in ("one", "two"))
        assert one["position"]["step"] == two["position"]["step"] > 3
        for name, tensor in one["model"].items():
            torch.testing.assert_close(tensor, two["model"][name], atol=2e-4, rtol=1e-2)
    facts: list[dict[str, Any]] = [
        json.loads((tmp_path / name / "head/training.json").read_text()) for name in ("one", "two")
    ]
    assert facts[1]["provenance"]["settings"]["ranks"] == 2
    assert facts[0]["validation"]["tau"] == pytest.approx(facts[1]["validation"]["tau"], abs=0.02)
    assert facts[0]["data"]["documents"] == facts[1]["data"]["documents"]
