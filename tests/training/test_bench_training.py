"""The trainer's benchmark runs end to end on a tiny target, and its eager form has the trainer's loss (40 s)."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_training.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    import bench_training

    return bench_training


def test_eager_form_has_the_same_loss(bench: Any, tiny_target: Path, tiny_rows: Path, tmp_path: Path) -> None:
    args = argparse.Namespace(target=tiny_target, data=tiny_rows, draft_vocab_size=64, batch_tokens=256)
    run, _ = bench.make(args, "before", tmp_path)
    group = run.plan[0]
    plain = run.batch_loss(group, 0)[0]
    with bench.patched("eager"):
        eager = run.batch_loss(group, 0)[0]
    with bench.patched("before"):
        before = run.batch_loss(group, 0)[0]
    torch.testing.assert_close(eager, plain, rtol=0.01, atol=0.01)
    torch.testing.assert_close(before, plain, rtol=1e-4, atol=1e-4)


def test_results_are_written(tiny_target: Path, tiny_rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    command = [
        sys.executable,
        str(BENCHMARK),
        "--target",
        str(tiny_target),
        "--data",
        str(tiny_rows),
        "--batches",
        "1",
    ]
    command += ["--draft-vocab-size", "64", "--batch-tokens", "256", "--arms", "eager", "share"]
    subprocess.run([*command, "--json", str(out)], check=True)
    found = json.loads(out.read_text())
    assert [row["arm"] for row in found["results"]] == ["eager", "share"]
    assert all(row["tokens_per_s"] > 0 and row["peak_gb"] > 0 for row in found["results"])
    assert found["provenance"]["settings"]["batches"] == "1"
    more = ["--equal-tokens", "200", "--seeds", "2", "--arms", "share"]
    subprocess.run([*command[:-3], *more, "--json", str(out)], check=True)
    (row,) = json.loads(out.read_text())["results"]
    assert len(row["seeds"]) == 2 and row["loss"] > 0
