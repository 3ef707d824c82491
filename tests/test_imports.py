"""The layers of the package: imports point down only."""

import ast
import re
from pathlib import Path

import softprompt

PACKAGE = Path(softprompt.__file__).parent

# From top to bottom. A module may import from its own layer and from layers below it.
LAYERS = [
    "cli",
    "serving",
    "report",
    "sweep",
    "plan",
    "training",
    "interop",
    "inference",
    "evaluation",
    "metrics",
    "generation",
    "objectives",
    "methods",
    "data",
    "backbones",
    "storage",
    "experiment",
    "files",
    "parallel",
    "runtime",
]


def imported(path: Path) -> set[str]:
    """Return the layers that a module imports from, including imports inside functions."""
    layers = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softprompt."):
            layers.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            layers |= {a.name.split(".")[1] for a in node.names if a.name.startswith("softprompt.")}
    return layers - {"errors"}


def test_the_package_root_holds_no_other_modules():
    assert {p.name for p in PACKAGE.iterdir() if p.is_file()} == {
        "__init__.py",
        "__main__.py",
        "errors.py",
        "py.typed",
    }
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(LAYERS)


def test_imports_point_down():
    upward = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for level, layer in enumerate(LAYERS)
        for path in sorted((PACKAGE / layer).rglob("*.py"))
        for other in sorted(imported(path))
        if other not in LAYERS[level:]
    ]
    assert upward == []


def test_the_experiment_layer_imports_no_jax():
    for path in (PACKAGE / "experiment").glob("*.py"):
        modules = [
            alias.name if isinstance(node, ast.Import) else node.module or ""
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        assert not any(m.split(".")[0] in ("jax", "flax", "optax") for m in modules), path


def test_only_one_file_imports_orbax():
    importing = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if re.search("(from|import) orbax", path.read_text())
    ]
    assert importing == ["arrays.py"]
