"""Import rules of docs/architecture.md: imports point downwards, and no modules import each
other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_TOP_MODULES = 8

#: Packages and modules of perturbjax from bottom to top. A package imports itself and the rows
#: above. Packages in one row do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("dataset",),
    ("models",),
    ("data",),
    ("segmentation",),
    ("training",),
    ("inference", "verify"),
    ("export",),
    ("evaluation",),
    ("profiles",),
    ("audit", "screening"),
    ("report",),
    ("api",),
    ("cli", "__init__"),
    ("__main__",),
)
#: Exceptions: the command line reads the version; segmentation does not depend on the training
#: data.
ALSO_ALLOWED: dict[str, tuple[str, ...]] = {"cli": ("__init__",)}
NOT_ALLOWED: dict[str, tuple[str, ...]] = {"segmentation": ("data",)}
#: Packages of perturbjax that data_prep imports; "" is the package itself.
FOR_DATA_PREP = {"", "core", "dataset", "segmentation", "report"}
#: Packages that perturbjax never imports, except for data_prep in the command line.
OUTSIDE = {"data_prep", "experiments", "tests", "torch", "tensorflow", "cellpose"}


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import of a file, also inside functions, but not for types only."""
    tree = ast.parse(path.read_text())
    types_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in types_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path: Path) -> str:
    return path.relative_to(REPOSITORY / "perturbjax").parts[0].removesuffix(".py")


def packages_imported(path: Path) -> set[str]:
    """Packages of perturbjax that a file imports; "" is the package itself."""
    packages = set()
    for module, name in imports_of(path):
        parts = module.split(".")
        if parts[0] == "perturbjax":
            package = parts[1] if len(parts) > 1 else name
            packages.add(package if package in LAYER else "")
    return packages


def import_graph() -> dict[str, set[str]]:
    """Module -> modules that it imports, in perturbjax and data_prep."""
    paths = {module_name(path): path for path in (*FILES, *DATA_PREP)}
    graph = {}
    for module, path in paths.items():
        names = {
            f"{source}.{name}" if f"{source}.{name}" in paths else source
            for source, name in imports_of(path)
        }
        graph[module] = (names & set(paths)) - {module}
    return graph


def find_cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other directly or indirectly."""
    reachable = {module: set(imported) for module, imported in graph.items()}
    for middle in graph:
        for targets in reachable.values():
            if middle in targets:
                targets |= reachable[middle]
    members = [module for module in graph if module in reachable[module]]
    groups = {
        frozenset(m for m in members if m in reachable[n] and n in reachable[m]) for n in members
    }
    return [set(group) for group in groups]


FILES = sorted((REPOSITORY / "perturbjax").rglob("*.py"))
DATA_PREP = sorted((REPOSITORY / "data_prep").rglob("*.py"))
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}


def test_every_package_has_a_layer():
    assert {package_of(path) for path in FILES} <= set(LAYER)


def test_number_of_top_level_modules_is_limited():
    modules = [path.name for path in FILES if path.parent == REPOSITORY / "perturbjax"]
    assert len(modules) <= MOST_TOP_MODULES, modules


@pytest.mark.parametrize("package", sorted({package_of(path) for path in FILES}))
def test_imports_point_downwards(package):
    below = {other for other, number in LAYER.items() if number < LAYER[package]}
    allowed = below - set(NOT_ALLOWED.get(package, ()))
    allowed |= {package, "", *ALSO_ALLOWED.get(package, ())}
    for path in FILES:
        if package_of(path) == package:
            wrong = packages_imported(path) - allowed
            assert not wrong, f"{path.relative_to(REPOSITORY)} imports {wrong}"


def test_modules_do_not_import_each_other():
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    assert not find_cycles(import_graph())


def test_perturbjax_imports_no_outside_package():
    for path in FILES:
        packages = {module.split(".")[0] for module, _ in imports_of(path)}
        allowed = {"data_prep"} if package_of(path) == "cli" else set()
        wrong = packages & (OUTSIDE - allowed)
        assert not wrong, f"{path.relative_to(REPOSITORY)} imports {wrong}"


def test_data_prep_imports_lower_packages_only():
    for path in DATA_PREP:
        if path.name != "__main__.py":
            wrong = packages_imported(path) - FOR_DATA_PREP
            assert not wrong, f"{path.relative_to(REPOSITORY)} imports {wrong}"


def test_import_is_fast_and_starts_no_device():
    """The limit is processor time, because other tests run at the same time."""
    code = """
import sys, time
start = time.process_time()
import perturbjax, perturbjax.cli
seconds = time.process_time() - start
heavy = {"torch", "tensorflow", "cellpose", "sklearn", "jax"} & set(sys.modules)
print(seconds, sorted(heavy))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    seconds, heavy = done.stdout.split(" ", 1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 0.5
