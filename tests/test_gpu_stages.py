"""The GPU stages at tiny sizes, so that none fails there for a typo (60 s; slow: all of them)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = Path(__file__).parents[1] / "benchmarks" / "gpu" / "stages.py"


def dry_run(out: Path, *only: str) -> dict[str, str]:
    command = [sys.executable, STAGES, out, "--dry-run", *(["--only", *only] if only else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    logs = "".join(log.read_text()[-2000:] for log in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return {name: ended["result"] for name, ended in json.loads((out / "stages.json").read_text()).items()}


def test_environment_is_run_once(tmp_path):
    assert dry_run(tmp_path, "environment") == {"environment": "ok"}
    (tmp_path / "environment.log").unlink()
    assert dry_run(tmp_path, "environment") == {"environment": "ok"}
    assert not (tmp_path / "environment.log").exists(), "a stage that ended well is skipped"


@pytest.mark.slow
def test_all_stages(tmp_path):
    assert set(dry_run(tmp_path).values()) <= {"ok", "nothing to do"}
