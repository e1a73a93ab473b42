"""What the draft compiles at start-up is all that it needs, so that no request waits for a compilation. 15 s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_no_kernel_compiles_while_requests_wait():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EAGLE3_INTERPRET")}
    script = Path(__file__).with_name("launches.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    missing = sorted(set(found["serving"]) - set(found["started"]))
    assert not missing, missing[:3]
    assert len(found["started"]) >= 12, (
        "three tiles of the fuse with and without norms, of the head and its merge"
    )
    assert len(found["attention"]) == 1, "of a tree of one size, whatever the batch"
