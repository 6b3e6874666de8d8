"""Imports go down only: the order of the rooms in DESIGN.md, enforced."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import multikd

PACKAGE = Path(multikd.__file__).parent

# Lowest first. Modules of one layer may not import each other unless they are one room.
LAYERS: list[set[str]] = [
    {
        *("types", "errors", "files", "shipped", "progress", "console"),
        *("untrusted", "redaction", "imports"),
        *("config_errors", "config_files", "config_parser", "fit_help"),
    },
    {
        "functional",
        "distributed",
        "backbones",
        "mlp_sums",
        "onednn",
        "performance",
        "saving",
        "pages",
    },
    {"teachers", "students", "projectors", "normalizers", "grids"},
    {"ladder", "losses"},
    {"data", "optim"},
    {"modules"},
    {"evaluation"},
    {"callbacks"},
    {
        *("fit", "fit_summary", "fit_faults", "checkpoints", "preflight"),
        *("teacher_statistics", "teacher_classifiers", "cache_command"),
    },
    {"export"},
    {"published"},
    {"retention"},
    {"plan"},
    {"runs", "pseudolabels"},
    {"ablation", "stages", "sizes"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
# Within the lowest two layers single files may build on one another, as long as it is acyclic.
FREE_WITHIN = (0, 1, 8)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer_of(name: str) -> int:
    for index, names in enumerate(LAYERS):
        if name in names:
            return index
    raise AssertionError(f"room {name!r} has no place in tests/test_layers.py: give it one")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("multikd")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "multikd":
                found |= {f"multikd.{alias.name}" for alias in node.names}
            elif node.module.startswith("multikd."):
                found.add(node.module)
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down_only(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports_of(path):
        other = room(module)
        if other in (own, "__init__", "__version__"):
            continue
        below = layer_of(other) < layer_of(own)
        beside = layer_of(other) == layer_of(own) and layer_of(own) in FREE_WITHIN
        assert below or beside, f"{path.relative_to(PACKAGE)} imports {module}, which is not below"


def test_every_room_has_a_layer_and_every_layer_is_real() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    placed = set().union(*LAYERS)
    assert rooms <= placed
    assert placed - rooms <= {"checkpoints", "progress"}


def test_no_relative_imports() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} uses a relative import"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_eval_pickle_or_hard_coded_device(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name):
                assert function.id not in {"eval", "exec"}, f"{path} calls {function.id}"
            elif isinstance(function, ast.Attribute):
                assert function.attr != "cuda", f"{path} calls .cuda()"
        if isinstance(node, ast.Import):
            assert not {a.name for a in node.names} & {"pickle", "dill"}, f"{path} imports pickle"
