"""sdist and wheel are built, installed into a clean environment and imported (40 s)."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORTED = """
import vllm_eagle3.kernels as kernels, vllm_eagle3.checkpoint, vllm_eagle3.plugin
from importlib.metadata import entry_points
from vllm_eagle3.kernels.cpu import build
assert (build.SOURCES / "tree_attention.cpp").exists() and (build.SOURCES / "attention.h").exists()
print(kernels.__file__)
print([e.value for e in entry_points(group="vllm.general_plugins")])
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the tracked tree, so that no build folder is left behind."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("vllm_eagle3", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(sources: Path, kind: str, out: Path) -> Path:
    subprocess.run([sys.executable, "-m", "build", f"--{kind}", "--outdir", out, sources], check=True)
    (made,) = out.iterdir()
    return made


def check_import(made: Path, tmp_path: Path) -> None:
    """Install into an environment that sees this one's other packages, but not the editable install."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", made], check=True
    )
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    done = subprocess.run(
        [python, "-I", "-c", IMPORTED], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    path, entries = done.stdout.splitlines()[-2:]
    assert Path(path).is_relative_to(site) and path.endswith("vllm_eagle3/kernels/__init__.py")
    assert "vllm_eagle3.plugin:register" in entries


def test_wheel(sources, tmp_path):
    check_import(build(sources, "wheel", tmp_path / "dist"), tmp_path)


def test_sdist(sources, tmp_path):
    made = build(sources, "sdist", tmp_path / "dist")
    with tarfile.open(made) as archive:
        assert any(name.endswith("/kernels/concat_fc.py") for name in archive.getnames())
    check_import(made, tmp_path)
