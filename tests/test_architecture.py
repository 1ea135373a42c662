"""Imports point one way: the map in CONTRIBUTING.md, held to."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up; a room may import from its own floor's room and from every floor below.
FLOORS = (
    {"errors"},
    {"kernels", "data"},
    {"ops"},
    {"environment", "models"},
    {"objectives", "generation"},
    {"tasks"},
    {"checkpoints", "evaluation"},
    {"train"},
    {"capfilt"},
    {"demo", "serve"},
    {"cli"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# A kernel never hears of BLIP, and data knows no model: they import from these alone.
ONLY = {"kernels": {"kernels"}, "data": {"data", "errors"}, "models": {"models", "ops", "errors"}}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "blipfast" and len(parts) > 1 else None


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it; `from blipfast import x` is `blipfast.x`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: write absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[tuple[str, Path]]:
    own = [
        (path.relative_to(ROOT / "blipfast").parts[0].removesuffix(".py"), path)
        for path in (ROOT / "blipfast").rglob("*.py")
        if path.parent != ROOT / "blipfast" or path.stem != "__init__"
    ]
    return own + [("kernels", path) for path in (ROOT / "kernels" / "src").rglob("*.py")]


@pytest.mark.parametrize("room", sorted(FLOOR_OF))
def test_imports_point_down(room: str) -> None:
    files = [path for name, path in sources() if name == room]
    assert files, f"no such room: {room}"
    for path in files:
        for module in imports(path):
            target = room_of(module)
            if target is None or target == room or target.startswith("__"):
                continue
            where = f"{path.relative_to(ROOT)} imports {module}"
            assert FLOOR_OF[target] < FLOOR_OF[room], f"{where}, which is not below {room}"
            assert target in ONLY.get(room, {target}), (
                f"{where}; {room} may only import {ONLY[room]}"
            )


def test_every_room_has_a_floor() -> None:
    assert {name for name, _ in sources()} == set(FLOOR_OF)


def test_models_never_import_triton() -> None:
    for room, path in sources():
        names = {module.split(".")[0] for module in imports(path)}
        assert "triton" not in names or room in ("kernels", "ops"), path


def test_the_check_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from blipfast import cli\n    import blipfast.train.engine\n")
    assert {room_of(module) for module in imports(bad)} == {"cli", "train"}
