"""What the plugin does to vLLM, seen from fresh processes (40 s)."""

import os
import subprocess
import sys

import pytest

from vllm_eagle3 import plugin

REPORT = """
import logging, sys
logging.basicConfig(level=logging.INFO)
if {version!r}:
    from vllm_eagle3 import plugin
    plugin.vllm_version = lambda: {version!r}
from vllm.plugins import load_general_plugins
load_general_plugins(); load_general_plugins()
print("LIGHT", "vllm.v1.worker.gpu_model_runner" not in sys.modules)
import vllm.v1.worker.gpu_model_runner as runner
print("PROPOSER", runner.EagleProposer.__module__)
"""


def run(version: str = "", **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(version=version)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return done.stdout + done.stderr


def test_replaces_the_proposer_and_imports_nothing_heavy():
    out = run()
    assert "PROPOSER vllm_eagle3.runner.v1.proposer" in out and "LIGHT True" in out


def test_disable_gives_stock_vllm_back():
    assert "PROPOSER vllm.v1.spec_decode.eagle" in run(EAGLE3_DISABLE="1")


def test_vllm_plugins_leaves_it_out():
    assert "PROPOSER vllm.v1.spec_decode.eagle" in run(VLLM_PLUGINS="another")


def test_unsupported_vllm_is_left_untouched_and_said():
    out = run(version="0.34.0")
    assert "PROPOSER vllm.v1.spec_decode.eagle" in out
    assert plugin.SUPPORTED_TEXT in out and "0.34.0" in out


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.33.1+cpu", True),
        ("0.33.1.dev7+g0123abc", True),
        ("0.34.0rc1", False),
        ("0.34.0", False),
        ("0.31.9", False),
        ("1.0", False),
        ("", False),
    ],
)
def test_supported_range(version, supported):
    assert plugin.is_supported(version) is supported
