"""docs/gpu.md has the tables that benchmarks/gpu/estimates.py makes. 5 s."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_eagle3.kernels import tree_growth

ROOT = Path(__file__).parents[2]


NO_KERNEL = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like)


class Count(TorchDispatchMode):
    """Operations that are kernels on a GPU: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kernels += not (func.is_view or func._overloadpacket in NO_KERNEL)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def estimates():
    spec = importlib.util.spec_from_file_location("estimates", ROOT / "benchmarks" / "gpu" / "estimates.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(ROOT / "benchmarks" / "gpu"), *sys.path]):  # as when it is run
        spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_makes(estimates):
    assert estimates.main(["--check"]) == 0
    with pytest.raises(ValueError, match="expected the lines"):
        estimates.page("a page without tables")


def test_a_stale_page_is_found(estimates, monkeypatch, tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text((ROOT / "docs" / "gpu.md").read_text().replace("| 1 at 1,024 |", "| 1 at 1,000 |"))
    monkeypatch.setattr(estimates, "PAGE", page)
    assert estimates.main(["--check"]) == 1
    assert estimates.main([]) == 0
    assert page.read_text() == (ROOT / "docs" / "gpu.md").read_text()


def test_kernels_of_the_growth_are_those_that_it_launches(estimates, monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(grid)

    monkeypatch.setattr(tree_growth, "_extend_kernel", Kernel())
    monkeypatch.setattr(tree_growth, "_rerank_kernel", Kernel())
    chain, last = torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    growth = tree_growth.TreeGrowth(3, 10, chain, last, 99, torch.int64)
    zeros = [torch.zeros(1, *shape, dtype=torch.int64) for shape in ((10,), (10, 1), (10, 2))]
    found = []
    for width in (1, 10):
        # Its own memory is not written without a GPU, and the rows to gather have to exist.
        monkeypatch.setattr(
            growth, "_empty", lambda dtype, *shape: next(z for z in zeros if z.shape[1:] == shape)
        )
        children = torch.zeros(width, 10), torch.zeros(width, 10, dtype=torch.int64), torch.zeros(width, 8)
        with Count() as count:
            growth.extend(*children)
        found.append(count.kernels + len(launched))
        launched.clear()
    monkeypatch.setattr(growth, "_empty", lambda dtype, *shape: torch.empty(1, *shape, dtype=dtype))
    tokens, parents = torch.zeros(2, 1, 60, dtype=torch.int64)
    with Count() as count:
        growth.rerank(tokens, parents)
    found.append(count.kernels + len(launched))
    assert tuple(found) == estimates.PROGRAMS
