"""Runs a function right after a module has been imported, without importing it."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

Then = Callable[[ModuleType], None]


def after_import(then: Mapping[str, Then]) -> None:
    """Call `then[name]` with module `name` once it has executed; at once for modules already imported."""
    pending = dict(then)
    for name in [name for name in pending if name in sys.modules]:
        pending.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _PostImport(pending))


class _PostImport(importlib.abc.MetaPathFinder):
    def __init__(self, pending: dict[str, Then]) -> None:
        self.pending = pending

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        then = self.pending.pop(fullname, None)
        if then is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            then(module)

        loader.exec_module = exec_module
        return spec
