"""Imports point one way and never in a circle; files and functions are short. Read from the sources (1 s)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import FOUNDATION and the rooms above it in this list. Rooms of one layer do not know each other.
LAYERS = (
    {"kernels", "log_files"},
    {"model", "tree", "policy", "reference"},
    {"runner"},
    {"training"},
    {"evaluation"},  # its studies train drafts
    {"plugin"},
    {"doctor"},
    {"cli", "examples", "benchmarks"},
)
# These import nothing of this project but themselves.
FOUNDATION = {"user_input", "checkpoint", "config", "provenance", "prompts"}
# These may import vLLM's modules, others only `vllm` itself and PUBLIC.
NAMES_VLLM = {"runner", "model", "benchmarks", "examples"}
PUBLIC = ("vllm.sampling_params", "vllm.inputs")
LONGEST_FILE, LONGEST_FUNCTION = 300, 60  # lines


class Module:
    """A source file, with the modules it imports outside `if TYPE_CHECKING`."""

    def __init__(self, path: Path) -> None:
        parts = path.relative_to(ROOT).with_suffix("").parts
        self.name = ".".join(part for part in parts if part != "__init__")
        self.is_package = path.name == "__init__.py"
        self.imports = set(self._imports(ast.parse(path.read_text(encoding="utf-8"))))

    def _imports(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from self._imports(child)


def modules() -> dict[str, Module]:
    """All modules of the package, the examples and the benchmarks by name; the kernels as `vllm_eagle3.kernels`."""
    files = [*ROOT.glob("vllm_eagle3/**/*.py"), *ROOT.glob("vllm_eagle3/kernels/*.py")]
    files += [*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    return {module.name: module for module in map(Module, set(files))}


MODULES = modules()


def room(name: str) -> str:
    """The room of a module: `vllm_eagle3.runner.v1.proposer` -> `runner`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "vllm_eagle3" and len(parts) > 1 else parts[0]


def arrows() -> set[tuple[str, str]]:
    """(importing module, imported module) of all imports within this project."""
    return {
        (module.name, imported)
        for module in MODULES.values()
        for imported in module.imports & MODULES.keys()
        if imported not in (module.name, "vllm_eagle3")
    }


def layer(room: str) -> int:
    found = [i for i, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"{room} is a new room: say in LAYERS or FOUNDATION where it stands"
    return found[0]


def points_down(importer: str, imported: str) -> bool:
    upper, lower = room(importer), room(imported)
    if upper == lower:
        return True
    if upper in FOUNDATION:
        return False
    return lower in FOUNDATION or layer(lower) < layer(upper)


def test_imports_point_one_way():
    back = {arrow for arrow in arrows() if not points_down(*arrow)}
    assert back == set()


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("vllm_eagle3.runner.ledger", "vllm_eagle3.policy.cost", True),
        ("vllm_eagle3.policy.cost", "vllm_eagle3.runner.ledger", False),
        ("vllm_eagle3.model.draft", "vllm_eagle3.tree.growth", False),
        ("vllm_eagle3.tree.mask", "vllm_eagle3.checkpoint", True),
        ("vllm_eagle3.checkpoint.cli", "vllm_eagle3.config", False),
        ("benchmarks.load_test", "vllm_eagle3.training.job", True),
    ],
)
def test_the_rule(importer, imported, allowed):
    assert points_down(importer, imported) is allowed


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path that returns to its start; empty if there is none."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if found := search(following, [*path, node]):
                return found
        done.add(node)
        return []

    return next(filter(None, (search(node, []) for node in sorted(graph))), [])


def test_no_circles():
    graph: dict[str, set[str]] = {}
    for importer, imported in arrows():
        graph.setdefault(importer, set()).add(imported)
    assert circle(graph) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "d": {"a"}}) == ["a", "b", "d", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_vllms_modules_are_imported_in_the_rooms_of_its_runners_only():
    found = {
        (module.name, imported)
        for module in MODULES.values()
        if room(module.name) not in NAMES_VLLM
        for imported in module.imports
        if imported.startswith("vllm.")
        and not imported.startswith(PUBLIC)
        and "." in imported.removeprefix("vllm.")
    }
    assert found == set()


def sources(*kinds: str) -> dict[str, list[str]]:
    """The lines of all files of these kinds, by path."""
    folders = ("vllm_eagle3", "kernels", "examples", "benchmarks")
    paths = [path for folder in folders for kind in kinds for path in ROOT.glob(f"{folder}/**/*.{kind}")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").splitlines() for path in paths}


def test_no_file_is_long():
    lines = {name: len(text) for name, text in sources("py", "cpp", "h").items()}
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}


def test_a_long_function_gives_its_reason():
    """In a comment that begins with `# Long:` above the function and its decorators."""
    found = {}
    for file, lines in sources("py").items():
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                reason = lines[first - 2].lstrip().startswith("# Long: ")
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > LONGEST_FUNCTION and not reason:
                    found[f"{file}:{node.name}"] = length
    assert found == {}
