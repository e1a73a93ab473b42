"""Kernel benchmarks run end to end on tiny shapes and write results with provenance. About 5 s."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ["concat_fc", "head_topk", "tree_steps", "linear_fp8", "tree_attention", "cpu_tree_attention"]


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_writes_provenance_and_times(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module(f"bench_{name}")
    out = tmp_path / "result.json"
    module.main(["--dry-run", "--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report.keys() == {"provenance", "roofline", "results"}
    assert report["provenance"]["settings"]["inputs"]
    assert [row["rows"] for row in report["results"]] == [1, 3]
    for row in report["results"]:
        assert row["roofline_us"] > 0
        assert all(t["median"] >= t["best"] > 0 for t in row["us"].values())
    assert capsys.readouterr().out.count("tiny") == 2


def test_the_lookup_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("bench_lookup")
    monkeypatch.setattr(module.torch, "set_num_threads", lambda number: None)
    out = tmp_path / "result.json"
    module.main(["--device", "cpu", "--batches", "2", "--widths", "64", "--repeats", "3", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["provenance"]["settings"]["repeats"] == 3
    assert [row["ids"] for row in report["results"]] == ["few", "many"]
    assert all(
        t["least"] <= t["median"] <= t["largest"] for row in report["results"] for t in row["us"].values()
    )


def test_fp8_benchmark_refuses_a_cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        importlib.import_module("bench_linear_fp8").main(["--device", "cpu"])


class FakeFlash:
    """FlashAttention in plain torch with vLLM's names. It accepts only the keywords of vLLM's own functions."""

    def __init__(self, version: int | None) -> None:
        self.version, self.calls = version, list[str]()
        [vllm] = importlib.util.find_spec("vllm").submodule_search_locations
        source = Path(vllm, "vllm_flash_attn", "flash_attn_interface.py").read_text(encoding="utf-8")
        functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        self.known = {f.name: {a.arg for a in [*f.args.args, *f.args.kwonlyargs]} for f in functions}

    def install(self, monkeypatch):
        utils, flash = types.ModuleType("fa_utils"), types.ModuleType("vllm_flash_attn")
        utils.get_flash_attn_version = lambda head_size: self.version
        flash.flash_attn_varlen_func, flash.get_scheduler_metadata = self.attend, self.schedule
        monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", utils)
        monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", flash)

    def schedule(self, **given):
        assert given.keys() <= self.known["get_scheduler_metadata"]
        self.calls.append("schedule")
        return "schedule"

    def attend(self, **given):
        assert given.keys() <= self.known["flash_attn_varlen_func"]
        assert given["causal"] and given["fa_version"] == self.version
        assert given["scheduler_metadata"] == ("schedule" if self.version == 3 else None)
        self.calls.append("attend")
        starts, lens = given["cu_seqlens_q"].tolist(), given["seqused_k"].tolist()
        out = []
        for i, length in enumerate(lens):
            q = given["q"][starts[i] : starts[i + 1]].float()
            k, v = (given[n][given["block_table"][i].long()].flatten(0, 1)[:length].float() for n in "kv")
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * given["softmax_scale"]
            hidden = torch.ones(len(q), length, dtype=torch.bool).triu(length - len(q) + 1)
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        return torch.cat(out).to(given["q"].dtype)


def tree_attention_rows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    out = tmp_path / "result.json"
    module = importlib.import_module("bench_tree_attention")
    module.main(["--dry-run", "--device", "cpu", "--dtype", "float32", "--out", str(out)])
    return json.loads(out.read_text())["results"]


@pytest.mark.parametrize("version", [2, 3])
def test_tree_attention_has_flash_attention_beside_it(version, tmp_path, monkeypatch):
    """On a chain both must compute the same, since cache, rows and scale are the same."""
    fake = FakeFlash(version)
    fake.install(monkeypatch)
    for row in tree_attention_rows(tmp_path, monkeypatch):
        times = row["us"]
        assert row["largest_difference_on_a_chain"] < 1e-5
        assert row["ratio"] == pytest.approx(times["tree"]["median"] / times["flash chain"]["median"], 1e-2)
        assert row["met"] == (row["ratio"] <= row["target"] == 1.5)
    assert ("schedule" in fake.calls) == (version == 3)


def test_tree_attention_without_flash_attention_says_so(tmp_path, monkeypatch):
    FakeFlash(None).install(monkeypatch)
    for row in tree_attention_rows(tmp_path, monkeypatch):
        assert "no version" in row["flash"]
        assert (row["ratio"], row["met"]) == (None, None)


@pytest.fixture(autouse=True)
def forget_modules():
    """Benchmarks are scripts and not a package, so their modules are removed after the test."""
    yield
    for name in [*(f"bench_{n}" for n in NAMES), "kernel_timing"]:
        sys.modules.pop(name, None)
