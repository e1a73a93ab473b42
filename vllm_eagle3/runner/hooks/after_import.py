"""Runs functions directly after another module has been imported, without importing that module."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


def after_import(callbacks: Iterable[tuple[str, Callback]]) -> None:
    """Call each callback with its module after that module is imported, or now if it is imported already.

    Callbacks of the same module are called in the given order.
    """
    pending: dict[str, list[Callback]] = {}
    for name, callback in callbacks:
        if name in sys.modules:
            callback(sys.modules[name])
        else:
            pending.setdefault(name, []).append(callback)
    sys.meta_path.insert(0, _PostImport(pending))


class _PostImport(importlib.abc.MetaPathFinder):
    def __init__(self, pending: dict[str, list[Callback]]) -> None:
        self.pending = pending

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        callbacks = self.pending.pop(fullname, None)
        if callbacks is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for callback in callbacks:
                callback(module)

        loader.exec_module = exec_module
        return spec
