"""The GPU stages at tiny sizes, so that none fails there for a typo (60 s; slow: all of them, 10 minutes)."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vllm_eagle3.checkpoint.files import read_checkpoint
from vllm_eagle3.cli import parser as make_parser
from vllm_eagle3.evaluation.sweep.cli import settings_of

ROOT = Path(__file__).parents[1]
STAGES = ROOT / "benchmarks" / "gpu" / "stages.py"


@pytest.fixture
def stages(monkeypatch):
    """The module, with a target and prompts named so that no stage is empty."""
    spec = importlib.util.spec_from_file_location("gpu_stages", STAGES)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_stages", module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("TARGET", "smollm2")
    monkeypatch.setenv("PROMPTS", "a.jsonl:b.jsonl")
    monkeypatch.chdir(ROOT)
    return module


def dry_run(out: Path, *only: str, **env: str) -> dict[str, str]:
    command = [sys.executable, STAGES, out, "--dry-run", *(["--only", *only] if only else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=os.environ | env)
    logs = "".join(log.read_text()[-2000:] for log in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return {name: ended["result"] for name, ended in json.loads((out / "stages.json").read_text()).items()}


def test_environment_is_run_once(tmp_path):
    assert dry_run(tmp_path, "environment") == {"environment": "ok"}
    (tmp_path / "environment.log").unlink()
    assert dry_run(tmp_path, "environment") == {"environment": "ok"}
    assert not (tmp_path / "environment.log").exists(), "a stage that ended well is skipped"
    assert "| environment | ok |" in (tmp_path / "summary.md").read_text()


def test_arguments_of_every_command_are_understood(stages):
    parser = make_parser()
    for stage in stages.stages():
        assert stage.commands, stage.name
        for command in (*stage.commands, *stage.dry):
            if command[: len(stages.CLI)] == tuple(stages.CLI):
                arguments = parser.parse_args(command[len(stages.CLI) :])
                if command[len(stages.CLI)] == "sweep":
                    settings_of(arguments)
            elif "pytest" not in command:
                assert (ROOT / command[1]).is_file()
                assert command[2] == "--out"


def test_nothing_is_trained_without_prompts(stages, monkeypatch):
    monkeypatch.delenv("PROMPTS")
    assert stages.train() == ()


def test_a_sweep_has_at_most_two_engines_of_an_8b_model(stages):
    """Each holds 16 GB of weights, and all of them live on one GPU together, with their caches and graphs."""
    parser = make_parser()
    sweeps = [stage for stage in stages.stages() if stage.name.startswith("sweep-8b")]
    assert sweeps
    for command in (command for stage in sweeps for command in stage.commands):
        assert len(settings_of(parser.parse_args(command[len(stages.CLI) :])).runs()) <= 2


def test_the_plan_fits_the_time_of_a_lent_machine(stages):
    groups = stages.calls(stages.stages())
    timed = [group for group in groups if group[0].minutes]
    assert sum(stage.minutes for group in timed for stage in group) <= 25
    assert all(sum(stage.minutes for stage in group) <= stages.MINUTES_A_CALL for group in timed)
    assert [stage for group in groups for stage in group] == stages.stages()
    assert [stage.name for stage in groups[-1]] == ["train"]


def test_a_failing_command_does_not_hide_the_next(stages, tmp_path):
    commands = (("false",), ("touch", "OUT/later"), ("false",))
    stage = stages.Stage("three", 1, commands, ())
    assert stages.run(stage, tmp_path, dry=False) == "2 of 3 failed"
    assert (tmp_path / "later").exists()


def test_what_a_stage_started_dies_with_it(stages, tmp_path):
    """An engine in a process below the command would otherwise keep the GPU's memory."""
    pid = tmp_path / "pid"
    with (tmp_path / "log").open("w") as log, pytest.raises(subprocess.TimeoutExpired):
        stages.run_command(["sh", "-c", f"sleep 60 & echo $! >{pid}; wait"], log, 1)
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the command's own child is still running")


def test_an_unfinished_training_leaves_its_head(stages, tmp_path):
    """In shards small enough to be carried, with the tensors of the head it was told to publish."""
    source = ROOT / "checkpoints" / stages.HEAD
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "head").symlink_to(source)
    slow = stages.Stage("slow", 0.01, (("sleep", "60"),), (), stages.publish_head)
    assert stages.run(slow, tmp_path, dry=False) == "out of time"
    out = tmp_path / stages.HEAD
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 1
    assert all(path.stat().st_size <= 15 << 20 for path in out.iterdir())
    published, shipped = (dict(read_checkpoint(path).tensors()) for path in (out, source))
    assert published.keys() == shipped.keys()
    assert all(torch.equal(published[name], shipped[name]) for name in shipped)


def test_table_counts_targets(stages, tmp_path):
    rows = [{"target": 1.5, "met": met} for met in (True, False, None)] + [{"ratio": 1.0}]
    (tmp_path / "tree_attention.json").write_text(json.dumps({"results": rows}))
    (tmp_path / "draft_phase.json").write_text(json.dumps({"results": rows[2:3]}))
    ended = {
        name: {"result": "ok", "seconds": 2.0} for name in ("environment", "tree-attention", "draft-phase")
    }
    assert stages.table(ended, tmp_path).splitlines()[2:] == [
        "| environment | ok | 2.0 |  |",
        "| tree-attention | ok | 2.0 | 1 of 2 met |",
        "| draft-phase | ok | 2.0 | 1 unmeasured |",
    ]


@pytest.mark.slow
def test_all_stages(tmp_path):
    from vllm_eagle3.evaluation.demo_models import default_target

    prompts = str(ROOT / "tests" / "data" / "prompts.jsonl")
    results = dry_run(tmp_path, TARGET=str(default_target()), PROMPTS=prompts)
    assert set(results.values()) == {"ok"}
