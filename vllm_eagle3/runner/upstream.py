"""How this project names a part of vLLM that it depends on, and how it checks that the part is still there.

Nothing of vLLM is imported here: signatures are read from the sources, and a replacement is made when vLLM itself
imports the module that holds the name.
"""

import ast
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger("vllm.eagle3")


@dataclass(frozen=True)
class UpstreamSignature:
    """A function, method or attribute of vLLM (or Triton) as this project was written for it."""

    defined_in: str
    """Module that defines it."""
    qualname: str
    """"name" or "Class.name"."""
    signature: str
    """Of a function: the names of its parameters, in order. Of an attribute: its annotation, or the expression that
    is assigned to it. Of an imported name: "from module"."""
    also: tuple[str, ...] = ()
    """Other signatures that fit as well, in other supported versions."""

    def fits(self, package: Path | None = None) -> bool:
        """Whether the sources in the directory `package` (default: the installed package) have a known signature."""
        return self.found(package) in (self.signature, *self.also)

    def found(self, package: Path | None = None) -> str | None:
        """The signature in the sources under `package`, a directory such as `.../vllm`; None if the name is missing.

        Reads the sources and imports nothing, so that it also works on an unpacked wheel.
        """
        top, *rest = self.defined_in.split(".")
        path = (package or installed(top)).joinpath(*rest)
        path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if not path.is_file():
            return None
        scope: ast.AST = _parsed(path)
        *owners, name = self.qualname.split(".")
        for owner in owners:
            inner = [
                n for n in ast.iter_child_nodes(scope) if isinstance(n, ast.ClassDef) and n.name == owner
            ]
            if not inner:
                return None
            scope = inner[0]
        for node in ast.iter_child_nodes(scope):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                return ", ".join(arg.arg for arg in args)
        return next(_bindings(scope, name), None)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _bindings(scope: ast.AST, name: str) -> Iterator[str]:
    """How `name`, or the attribute `self.name`, is bound in `scope`."""
    for node in ast.walk(scope):
        if isinstance(node, ast.AnnAssign) and _binds(node.target, name):
            yield ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign) and any(_binds(target, name) for target in node.targets):
            yield ast.unparse(node.value)
        elif isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            yield f"from {node.module}"


def _binds(target: ast.expr, name: str) -> bool:
    return ast.unparse(target) in (name, f"self.{name}")


def installed(package: str) -> Path:
    """Directory of an installed top-level package, found without importing it. Raises ModuleNotFoundError."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"expected the package {package!r} to be installed, found none")
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class Patch:
    """One replaced name."""

    module: str
    """Module of vLLM in which the name is looked up."""
    name: str
    """"name" or "Class.method"."""
    replacement: str
    """"module:attribute" of what stands in for it."""
    upstream: UpstreamSignature
    """What is replaced; for a class, its `__init__`."""
    reason: str
    remove_when: str

    def apply(self, module: ModuleType) -> None:
        """Replace the name in `module`, which has just been imported."""
        owner, _, name = self.name.rpartition(".")
        setattr(getattr(module, owner) if owner else module, name, _attribute(self.replacement))
        logger.debug("vllm-eagle3: %s.%s is now %s", self.module, self.name, self.replacement)


@dataclass(frozen=True)
class ModuleChange:
    """A function that changes a module after its import, because the replacements are made from the originals."""

    module: str
    function: str
    """"module:function", called with the module."""
    upstream: tuple[UpstreamSignature, ...]
    """What the function replaces or relies on."""
    reason: str
    remove_when: str

    def apply(self, module: ModuleType) -> None:
        """Change `module`, which has just been imported."""
        _attribute(self.function)(module)
        logger.debug("vllm-eagle3: %s was changed by %s", self.module, self.function)


@dataclass(frozen=True)
class Subclass:
    """A class of this project that derives from one of vLLM's and overrides parts of it."""

    name: str
    """"module:Class"."""
    overrides: tuple[UpstreamSignature, ...]
    reason: str
    remove_when: str


@dataclass(frozen=True)
class Addition:
    """Something that vLLM looks for and that is missing; no name of vLLM is replaced."""

    what: str
    function: str
    """"module:function" that adds it."""
    upstream: tuple[UpstreamSignature, ...]
    """What looks for it."""
    reason: str
    remove_when: str


def _attribute(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
