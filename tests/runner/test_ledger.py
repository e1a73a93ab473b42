"""The ledger against the installed vLLM and, slowly, against the next release's sources (1 s; slow: a download)."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_eagle3.runner.ledger import LEDGER, OVERRIDDEN, Seam

SEAMS = [*(patch.seam for patch in LEDGER), *OVERRIDDEN]
INSTALLED = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.qualname)
def test_signature_is_what_we_were_written_for(seam):
    assert seam.fits(INSTALLED), seam.found(INSTALLED)


def looks_up(vllm: Path, module: str, name: str) -> bool:
    """Whether `module` holds `name` (imports or defines it)."""
    return name.split(".")[-1] in vllm.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("patch", LEDGER, ids=lambda patch: patch.name)
def test_name_is_looked_up_where_it_is_replaced(patch):
    assert looks_up(INSTALLED, patch.module, patch.name)
    module, attribute = patch.replacement.split(":")
    assert hasattr(importlib.import_module(module), attribute)
    assert patch.why and patch.until


def test_every_entry_is_in_place_in_a_fresh_process():
    """Two entries may share a module; an entry may be for a module that was imported before the plugin was loaded."""
    check = (
        "import importlib, operator, vllm.config.vllm\n"
        "from vllm_eagle3.plugin import register\n"
        "register()\n"
        "from vllm_eagle3.runner.ledger import LEDGER\n"
        "for patch in LEDGER:\n"
        "    found = operator.attrgetter(patch.name)(importlib.import_module(patch.module))\n"
        "    module, name = patch.replacement.split(':')\n"
        "    ours = getattr(importlib.import_module(module), name)\n"
        "    assert found is ours, f'{patch.module}.{patch.name} is {found}'\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_changed_signature_is_seen(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "room.py").write_text("class A:\n    def f(self, x, *, y=1): ...\n")
    assert Seam("vllm.some.room", "A.f", "").found(tmp_path) == "self, x, y"
    assert Seam("vllm.some.room", "A.g", "").found(tmp_path) is None
    assert Seam("vllm.no.room", "A.f", "").found(tmp_path) is None
    assert not Seam("vllm.some.room", "A.f", "self, x").fits(tmp_path)
    assert Seam("vllm.some.room", "A.f", "self, x", also=("self, x, y",)).fits(tmp_path)


@pytest.mark.slow
def test_next_release(tmp_path):
    """The sources of vLLM 0.33.0, read and not imported."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    for tag in ("2_28", "2_31", "2_34", "2_35"):
        command += ["--platform", f"manylinux_{tag}_x86_64"]
    subprocess.run([*command, "--python-version", "3.12", "-d", tmp_path, "vllm==0.33.0"], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("vllm-*.whl"))) as wheel:
        wheel.extractall(tmp_path, [name for name in wheel.namelist() if name.endswith(".py")])
    vllm = tmp_path / "vllm"
    assert {seam.qualname: seam.found(vllm) for seam in SEAMS if not seam.fits(vllm)} == {}
    assert all(looks_up(vllm, patch.module, patch.name) for patch in LEDGER)
