"""Kernel benchmarks run end to end on tiny shapes and write results with provenance. About 5 s."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ["concat_fc", "head_topk", "norm_concat", "tree_steps", "linear_fp8"]


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_writes_provenance_and_times(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module(f"bench_{name}")
    out = tmp_path / "result.json"
    module.main(["--dry-run", "--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    assert {
        "commit",
        "versions",
        "device",
        "data",
        "settings",
        "date",
        "roofline",
        "results",
    } <= report.keys()
    assert [row["rows"] for row in report["results"]] == [1, 3]
    for row in report["results"]:
        assert row["roofline_us"] > 0
        assert all(t["median"] >= t["best"] > 0 for t in row["us"].values())
    assert capsys.readouterr().out.count("tiny") == 2


def test_fp8_benchmark_refuses_a_cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        importlib.import_module("bench_linear_fp8").main(["--device", "cpu"])


@pytest.fixture(autouse=True)
def forget_modules():
    """Benchmarks are scripts, not a package: leave no module of theirs behind."""
    yield
    for name in [*(f"bench_{n}" for n in NAMES), "kernel_timing"]:
        sys.modules.pop(name, None)
