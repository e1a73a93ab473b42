"""The sweep's statistics, settings, files and process protocol (about 5 s); a dry run of engines is slow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vllm_eagle3.cli import main
from vllm_eagle3.config import TreeOptions
from vllm_eagle3.evaluation.model_shapes import SHAPES, pseudo_tokens, write_shape
from vllm_eagle3.evaluation.sweep import run as sweep_module
from vllm_eagle3.evaluation.sweep.report import bootstrap_median, plot, result_rows, table
from vllm_eagle3.evaluation.sweep.settings import PAPER, PUBLISHED_RATES, SweepSettings
from vllm_eagle3.evaluation.sweep.worker import Measurement, engine_arguments

DATA = str(Path(__file__).parents[1] / "data" / "prompts.jsonl")


def settings(**changes) -> SweepSettings:
    return SweepSettings(**{"target": "t", "draft": "d", "data": (DATA,)} | changes)


def measured(speed: float, accepted: int = 0) -> Measurement:
    return Measurement(tokens=1000, seconds=1000 / speed, drafts=400, accepted=accepted)


def test_ratios_are_paired_by_repeat() -> None:
    # A machine that is twice as slow in the second repeat: unpaired medians would give another ratio.
    speeds = {"none": (100, 50, 100), "auto": (150, 75, 160)}
    runs = {(mode, 2): [measured(s) for s in found] for mode, found in speeds.items()}
    none, auto = result_rows(runs)
    assert none["ratio_to_none"] == 1.0 and auto["ratio_to_none"] == pytest.approx(1.5)
    assert auto["spread"] == pytest.approx([75, 160]) and auto["tokens_per_s"] == pytest.approx(150)
    assert auto["paper_ratio"] == 1.75 and auto["ratio_to_paper"] == pytest.approx(1.5 / 1.75)


def test_native_is_the_best_of_its_lengths_at_each_batch_size() -> None:
    runs = {
        ("native-1", 2): [measured(10)],
        ("native-1", 4): [measured(30)],
        ("native-3", 2): [measured(20)],
        ("native-3", 4): [measured(25)],
    }
    best = {row["batch_size"]: row["engine"] for row in result_rows(runs) if row["mode"] == "native"}
    assert best == {2: "native-3", 4: "native-1"}


def test_tau_counts_steps_without_drafts() -> None:
    (row,) = result_rows({("auto", 1): [measured(10, accepted=500)]})
    assert row["tau"] == pytest.approx(2.0)
    assert row["drafted"] == pytest.approx(400 / 500)


def test_bootstrap_interval() -> None:
    assert bootstrap_median([1.5] * 7) == (1.5, 1.5)
    values = np.random.default_rng(1).normal(1.2, 0.1, 25).tolist()
    low, high = bootstrap_median(values)
    assert min(values) < low < float(np.median(values)) < high < max(values)


def test_table_and_figure(tmp_path: Path) -> None:
    runs = {(mode, size): [measured(s) for s in (9, 10, 11)] for mode in ("none", "auto") for size in (2, 3)}
    rows = result_rows(runs)
    text = table(rows, synthetic=False)
    assert text.splitlines()[0].startswith("| batch | mode |") and len(text.splitlines()) == 6
    assert "SYNTHETIC" in table(rows, synthetic=True)
    plot(rows, tmp_path / "sweep.png", synthetic=True)
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ("none", "fast")}, "--modes: expected one of none"),
        ({"modes": ("none", "none")}, "--modes: expected each mode at most once"),
        ({"batch_sizes": (0,)}, "--batch-sizes: expected numbers of at least 1"),
        ({"repeats": 0}, "--repeats: expected at least 1"),
        ({"data": ("nowhere.jsonl",)}, "--data: expected a file of prompts"),
        ({"shape": "tiny", "modes": ("tree",)}, "--modes: expected no tree"),
        ({"shape": "tiny", "num_speculative_tokens": 9}, "--acceptance-rates: expected a rate for each of 9"),
    ],
)
def test_bad_settings_name_the_option(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_settings_survive_the_way_to_the_worker() -> None:
    given = settings(tree=TreeOptions(4, 4, 8), batch_sizes=(1, 2), shape="tiny")
    assert SweepSettings.from_json(given.to_json()) == given


def test_engine_arguments() -> None:
    given = settings(modes=("none", "native", "auto"), native_tokens=(1, 3))
    assert [name for name, _, _ in given.runs()] == ["none", "native-1", "native-3", "auto"]
    assert "speculative_config" not in engine_arguments("none", given)
    native = engine_arguments("native-3", given)
    assert native["speculative_config"]["num_speculative_tokens"] == 3
    assert native["additional_config"]["eagle3"] == {"policy": "fixed", "tree": None}
    auto = engine_arguments("auto", given)
    assert auto["additional_config"]["eagle3"]["policy"] == "auto"
    trees = engine_arguments("auto-tree", settings(modes=("auto-tree",), tree=TreeOptions(4, 4, 8)))
    assert trees["speculative_config"]["num_speculative_tokens"] == 8
    options = {"policy": "auto", "tree": {"depth": 4, "topk": 4, "nodes": 8}}
    assert trees["additional_config"]["eagle3"] == options
    shaped = engine_arguments("native-3", settings(modes=("native",), native_tokens=(3,), shape="tiny"))
    assert shaped["speculative_config"]["synthetic_acceptance_rates"] == list(PUBLISHED_RATES[:3])
    assert shaped["load_format"] == "dummy"


def test_shapes(tmp_path: Path) -> None:
    target, draft = write_shape("llama-3.1-8b", tmp_path)
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 32
    config = json.loads((draft / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 16, 29] and config["draft_vocab_size"] == 32000
    assert all(2 <= token < 512 for token in pseudo_tokens("Why do old books smell the way they do?", 512))
    assert set(SHAPES) >= {"llama-3.1-8b", "tiny"}


def test_engines_are_measured_in_turn_and_the_first_repeat_is_dropped(monkeypatch, tmp_path, capsys) -> None:
    order, turns = [], []

    class FakeWorker:
        def __init__(self, name: str, mode: str, settings: Path, log: Path) -> None:
            self.name = name

        def wait(self) -> None:
            pass

        def measure(self, batch_size: int, turn: int) -> Measurement:
            turns.append(turn)
            order.append((self.name, batch_size))
            return measured(1.0 if len(order) <= 6 else 100.0)

        def close(self) -> None:
            order.append((self.name, 0))

    monkeypatch.setattr(sweep_module, "Worker", FakeWorker)
    monkeypatch.setattr(sweep_module.torch.cuda, "is_available", lambda: True)
    out = tmp_path / "sweep.json"
    options = ["--batch-sizes", "1,2", "--modes", "none,chain,auto", "--repeats", "2", "--shape", "tiny"]
    assert main(["sweep", *options, "--json", str(out)]) == 0
    assert order[:6] == [(name, size) for size in (1, 2) for name in ("none", "chain", "auto")]
    assert [name for name, _ in order[6:9]] == ["chain", "auto", "none"], "another engine begins each repeat"
    assert {name for name, size in order if size == 0} == {"none", "chain", "auto"}, "all are closed"
    assert turns == [0] * 6 + [1] * 6 + [2] * 6, (
        "all engines see the same prompts, another part of them each repeat"
    )
    result = json.loads(out.read_text())
    assert result["provenance"]["settings"]["synthetic_acceptance"] is True
    assert all(row["spread"] == [100.0, 100.0] for row in result["results"])
    assert "SYNTHETIC" in capsys.readouterr().out


def test_a_dead_engine_is_an_error(closed_form_target, capsys) -> None:
    code = main(["sweep", "--modes", "none", "--target", str(closed_form_target), "--draft", "a/draft"])
    assert code == 2
    shown = capsys.readouterr().err
    assert "the engine 'none' ended with exit code" in shown and "the whole log: " in shown


def test_synthetic_acceptance_without_a_gpu_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sweep_module.torch.cuda, "is_available", lambda: False)
    assert main(["sweep", "--shape", "tiny"]) == 2
    assert "--shape: vLLM's synthetic acceptance needs a GPU" in capsys.readouterr().err


def test_the_papers_row() -> None:
    assert list(PAPER) == [2, 4, 8, 16, 24, 32, 48, 56] and PAPER[2] == 1.75 and PAPER[56] == 1.01


@pytest.mark.slow
def test_dry_run(tmp_path: Path, capsys) -> None:
    out, png = tmp_path / "sweep.json", tmp_path / "sweep.png"
    assert main(["sweep", "--dry-run", "--json", str(out), "--plot", str(png)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert {row["mode"] for row in rows} == {"none", "native-1", "native", "chain", "auto"}
    assert all(row["tokens_per_s"] > 0 for row in rows) and png.is_file()
