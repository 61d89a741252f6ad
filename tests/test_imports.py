"""The table of the design: who may import whom. Imports go down only, and the command line alone sees everything."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

#: Rooms of perturbjax from the ground floor up; a room imports itself and those before it, never one after it.
#: Rooms on one line are neighbours that do not know each other, unless `NEIGHBOURS` says so.
FLOORS: tuple[tuple[str, ...], ...] = (
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
    ("screening",),
    ("audit",),
    ("report",),
    ("api",),
    ("cli", "__init__"),
    ("__main__",),
)
NEIGHBOURS: dict[str, tuple[str, ...]] = {"cli": ("__init__",)}
#: What one room may not import though it stands above it.
NEVER: dict[str, tuple[str, ...]] = {"segmentation": ("data",)}
#: What data_prep may import of perturbjax.
FOR_DATA_PREP = {"", "core", "dataset", "segmentation", "report"}
#: What perturbjax imports nowhere but behind its command line.
OUTSIDE = {"data_prep", "experiments", "tests", "torch", "tensorflow", "cellpose"}


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, those inside functions too; types alone are no imports."""
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


def rooms_of(path: Path) -> set[str]:
    """The rooms of perturbjax that a file imports; an empty name is the package itself."""
    rooms = set()
    for module, name in imports_of(path):
        parts = module.split(".")
        if parts[0] == "perturbjax":
            room = parts[1] if len(parts) > 1 else name
            rooms.add(room if (REPOSITORY / "perturbjax" / room).is_dir() or _is_file(room) else "")
    return rooms


def _is_file(room: str) -> bool:
    return bool(room) and (REPOSITORY / "perturbjax" / f"{room}.py").is_file()


def room_of(path: Path) -> str:
    return path.relative_to(REPOSITORY / "perturbjax").parts[0].removesuffix(".py")


FILES = sorted((REPOSITORY / "perturbjax").rglob("*.py"))
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def test_every_room_has_its_floor():
    assert {room_of(path) for path in FILES} <= set(FLOOR)


@pytest.mark.parametrize("room", sorted({room_of(path) for path in FILES}))
def test_imports_go_down_only(room):
    allowed = {other for other, floor in FLOOR.items() if floor < FLOOR[room]} - set(
        NEVER.get(room, ())
    )
    allowed |= {room, "", *NEIGHBOURS.get(room, ())}
    for path in FILES:
        if room_of(path) == room:
            assert rooms_of(path) <= allowed, (
                f"{path.relative_to(REPOSITORY)} imports {rooms_of(path) - allowed}"
            )


def test_perturbjax_imports_neither_what_stands_above_nor_torch():
    for path in FILES:
        tops = {module.split(".")[0] for module, _ in imports_of(path)}
        may = {"data_prep"} if room_of(path) == "cli" else set()
        assert not tops & (OUTSIDE - may), (
            f"{path.relative_to(REPOSITORY)} imports {tops & OUTSIDE}"
        )


def test_data_prep_imports_the_ground_floor():
    for path in sorted((REPOSITORY / "data_prep").rglob("*.py")):
        if path.name == "__main__.py":
            continue
        assert rooms_of(path) <= FOR_DATA_PREP, (
            f"{path.relative_to(REPOSITORY)}: {rooms_of(path) - FOR_DATA_PREP}"
        )


def test_importing_perturbjax_is_light_and_starts_no_device():
    """Seconds are the processor's own: other tests share the machine."""
    code = """
import sys, time
start = time.process_time()
import perturbjax, perturbjax.cli
took = time.process_time() - start
heavy = {"torch", "tensorflow", "cellpose", "sklearn"} & set(sys.modules)
backends = sys.modules["jax"]._src.xla_bridge._backends if "jax" in sys.modules else {}
print(took, sorted(heavy), sorted(backends))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    took, rest = done.stdout.split(" ", 1)
    assert rest.strip() == "[] []"
    assert float(took) < 2
