"""The C++ kernels are compiled once for all processes. Without a compiler there is a warning, and torch twins run."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_eagle3.kernels.cpu import build, choose_backend

ASK = "from vllm_eagle3.kernels.cpu import native; print(native() is not None)"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache folder for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.native.cache_clear()
    yield tmp_path
    build.native.cache_clear()


@pytest.mark.parametrize("compiler", ["/absent/g++", "false"])
def test_without_a_compiler(empty_cache, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING, "vllm.eagle3"):
        assert build.native() is None and build.native() is None
        assert choose_backend(None) == "torch"
    assert [r.message.startswith("no native CPU kernels") for r in caplog.records].count(True) == 1
    assert "\n" not in caplog.records[-1].message
    with pytest.raises(ValueError, match="C\\+\\+ compiler"):
        choose_backend("native")
    assert not list(empty_cache.rglob("*.so"))


def test_switched_off(empty_cache, monkeypatch, caplog):
    monkeypatch.setenv("EAGLE3_NATIVE", "0")
    with caplog.at_level(logging.WARNING, "vllm.eagle3"):
        assert choose_backend(None) == "torch"
    assert "EAGLE3_NATIVE=0" in caplog.text


def test_processes_that_start_together_compile_once(empty_cache, tmp_path, monkeypatch):
    """The compiler of this test counts its calls."""
    wrapper, calls = tmp_path / "compiler", tmp_path / "calls"
    wrapper.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo call >> {calls}\nexec g++ "$@" -O0\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    started = [
        subprocess.Popen([sys.executable, "-c", ASK], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [p.communicate(timeout=300)[0].strip() for p in started] == ["True"] * 3
    assert calls.read_text().count("call") == 1


def test_the_kernels_use_the_threads_of_torch():
    """There is one OpenMP library in the process. A second one would have its own threads."""
    if build.native() is None:
        pytest.skip("needs a C++ compiler")
    torch.ones(1 << 20).sum()
    with Path("/proc/self/maps").open() as maps:
        libraries = {line.split()[-1] for line in maps if "gomp" in line or "iomp" in line}
    assert len(libraries) == 1
