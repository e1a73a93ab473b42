"""The ledger against the package, the installed vLLM and the next release's sources (10 s; slow: a download)."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_eagle3.model
import vllm_eagle3.runner
from vllm_eagle3.runner.calls import CALLED
from vllm_eagle3.runner.interpreter_changes import INTERPRETER_CHANGES
from vllm_eagle3.runner.ledger import ADDITIONS, CPU_CHANGES, PATCHES
from vllm_eagle3.runner.ledger import CHANGES as MODULE_CHANGES
from vllm_eagle3.runner.overrides import SUBCLASSES
from vllm_eagle3.runner.upstream import UpstreamSignature, installed
from vllm_eagle3.runner.v2.cpu.register import cpu_forms

CHANGES = (*MODULE_CHANGES, *CPU_CHANGES, *INTERPRETER_CHANGES, *ADDITIONS)
ENTRIES = (*PATCHES, *CHANGES, *SUBCLASSES)
LAUNCH_OPTIONS = {"num_warps"}  # vLLM's registry passes them on in addition to a kernel's own parameters
UPSTREAM = list(
    dict.fromkeys(
        [
            *(patch.upstream for patch in PATCHES),
            *(part for change in CHANGES for part in change.upstream),
            *(part for subclass in SUBCLASSES for part in subclass.overrides),
            *CALLED,
        ]
    )
)
# Attributes that Python or typing adds to classes.
OF_THE_LANGUAGE = {
    "__module__",
    "__doc__",
    "__annotations__",
    "__parameters__",
    "__abstractmethods__",
    "_abc_impl",
}
OF_THE_LANGUAGE |= {"_is_protocol", "__subclasshook__", "__dict__", "__weakref__"}
OF_A_DATACLASS = {"__init__", "__repr__", "__eq__", "__hash__", "__match_args__"}
OF_A_DATACLASS |= {"__dataclass_params__", "__dataclass_fields__"}


@pytest.mark.parametrize("upstream", UPSTREAM, ids=lambda upstream: upstream.qualname)
def test_signature_is_the_one_this_project_was_written_for(upstream):
    assert upstream.fits(), upstream.found()


def kernels_with_cpu_forms() -> Iterator[UpstreamSignature]:
    """The kernels whose CPU forms `runner/v2/cpu` registers, with the parameters of the forms."""
    for name, form in cpu_forms().items():
        parameters = [p for p in inspect.signature(form).parameters if p not in LAUNCH_OPTIONS]
        yield UpstreamSignature(*name.rsplit(".", 1), ", ".join(parameters))


@pytest.mark.parametrize("kernel", kernels_with_cpu_forms(), ids=lambda kernel: kernel.qualname)
def test_cpu_forms_have_the_parameters_of_the_kernels(kernel):
    assert kernel.fits(), kernel.found()


def test_cpu_forms_are_registered_for_their_release_only(monkeypatch):
    importlib.import_module("vllm.config.vllm")
    hooks = importlib.import_module("vllm_eagle3.runner.hooks.native_v2")
    calls = []
    monkeypatch.setattr("vllm_eagle3.runner.v2.cpu.register.register", lambda: calls.append(1))
    for version, expected in (("0.32.1+cpu", 1), ("0.33.0", 0)):
        calls.clear()
        monkeypatch.setattr(hooks, "vllm_version", version)
        hooks.register_cpu_kernels(sys)
        assert len(calls) == expected, version


def looks_up(vllm: Path, module: str, name: str) -> bool:
    """Whether `module` holds `name` (imports or defines it)."""
    return name.split(".")[-1] in vllm.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_name_is_looked_up_where_it_is_replaced(patch):
    assert looks_up(installed("vllm"), patch.module, patch.name)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_an_entry_names_what_exists_and_says_why(entry):
    path = getattr(entry, "replacement", None) or getattr(entry, "function", None) or entry.name
    module, attribute = path.split(":")
    assert hasattr(importlib.import_module(module), attribute)
    assert entry.reason and entry.remove_when


def is_upstream(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "vllm"


def subclasses_of_upstream() -> Iterator[type]:
    """Every class that `runner/` and `model/` define and that derives from one of vLLM's."""
    for room in (vllm_eagle3.runner, vllm_eagle3.model):
        for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            module = importlib.import_module(found.name)
            for cls in vars(module).values():
                if (
                    inspect.isclass(cls)
                    and cls.__module__ == found.name
                    and any(map(is_upstream, cls.__mro__))
                ):
                    yield cls


def overrides(cls: type) -> set[tuple[str, str]]:
    """(module, "Class.name") of all attributes of vLLM's classes that `cls`, or one of its mixins, overrides."""
    theirs = [base for base in cls.__mro__ if is_upstream(base)]
    mixins = [base for base in cls.__mro__ if base.__module__.startswith("vllm_eagle3.")]
    mixins = [cls, *(base for base in mixins if not any(map(is_upstream, base.__mro__)))]
    out = set()
    made = OF_THE_LANGUAGE | (OF_A_DATACLASS if "__dataclass_fields__" in vars(cls) else set())
    for name in {name for base in mixins for name in vars(base)} - made:
        owner = next((base for base in theirs if name in vars(base)), None)
        if owner is not None:
            out.add((owner.__module__, f"{owner.__qualname__}.{name}"))
    return out


def unlisted(classes: Iterator[type]) -> set[str]:
    """The overrides of `classes` that are not in the ledger, and entries of the ledger that override nothing."""
    listed = {
        (subclass.name, part.defined_in, part.qualname)
        for subclass in SUBCLASSES
        for part in subclass.overrides
    }
    found = {
        (f"{cls.__module__}:{cls.__qualname__}", *override) for cls in classes for override in overrides(cls)
    }
    return {" overrides ".join((name, f"{module}.{attribute}")) for name, module, attribute in listed ^ found}


def test_every_override_in_the_package_is_listed():
    assert unlisted(subclasses_of_upstream()) == set()


def test_an_unlisted_override_is_found():
    from vllm.v1.core.sched.scheduler import Scheduler

    class Impolite(Scheduler):
        def finish_requests(self, *args):
            return super().finish_requests(*args)

    found = unlisted(iter([*subclasses_of_upstream(), Impolite]))
    assert len(
        found
    ) == 1 and "Impolite overrides vllm.v1.core.sched.scheduler.Scheduler.finish_requests" in str(found)


def test_every_entry_is_in_place_in_a_fresh_process():
    """Two entries may be for one module, and an entry for a module that was imported before the plugin."""
    check = (
        "import importlib, operator, vllm.config.vllm\n"
        "from vllm_eagle3.plugin import register\n"
        "register()\n"
        "from vllm_eagle3.runner.ledger import PATCHES\n"
        "for patch in PATCHES:\n"
        "    found = operator.attrgetter(patch.name)(importlib.import_module(patch.module))\n"
        "    module, name = patch.replacement.split(':')\n"
        "    expected = getattr(importlib.import_module(module), name)\n"
        "    assert found is expected, f'{patch.module}.{patch.name} is {found}'\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_changed_signature_is_seen(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "room.py").write_text(
        "from other import kind\nclass A:\n    flag = True\n    def f(self, x, *, y=1):\n        self.state: int = 3\n"
    )
    found = {
        "A.f": "self, x, y",
        "A.g": None,
        "B.f": None,
        "A.flag": "True",
        "A.state": "int",
        "kind": "from other",
    }
    assert {name: UpstreamSignature("vllm.some.room", name, "").found(tmp_path) for name in found} == found
    assert UpstreamSignature("vllm.no.room", "A.f", "").found(tmp_path) is None
    assert not UpstreamSignature("vllm.some.room", "A.f", "self, x").fits(tmp_path)
    assert UpstreamSignature("vllm.some.room", "A.f", "self, x", also=("self, x, y",)).fits(tmp_path)


@pytest.mark.slow
def test_next_release(tmp_path):
    """The sources of vLLM 0.33.0, read and not imported: all but the CPU forms of the V2 runner's kernels fits them.

    These forms are for 0.32 alone (`test_cpu_forms_are_registered_for_their_release_only`).
    """
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    for tag in ("2_28", "2_31", "2_34", "2_35"):
        command += ["--platform", f"manylinux_{tag}_x86_64"]
    subprocess.run([*command, "--python-version", "3.12", "-d", tmp_path, "vllm==0.33.0"], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("vllm-*.whl"))) as wheel:
        wheel.extractall(tmp_path, [name for name in wheel.namelist() if name.endswith(".py")])
    vllm = tmp_path / "vllm"
    theirs = [upstream for upstream in UPSTREAM if upstream.defined_in.startswith("vllm.")]
    assert {upstream.qualname: upstream.found(vllm) for upstream in theirs if not upstream.fits(vllm)} == {}
    assert all(looks_up(vllm, patch.module, patch.name) for patch in PATCHES)
    assert not all(kernel.fits(vllm) for kernel in kernels_with_cpu_forms())
