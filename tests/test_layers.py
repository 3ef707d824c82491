"""Imports point down only, as the layout says."""

import ast
import re

from conftest import REPOSITORY

# A package may import from those on its own line and on the lines below it.
LAYERS = [
    {"__main__"},
    {"cli", "arguments", "commands", "compare", "score"},
    {"report"},
    {"sweep"},
    {"training", "interop"},
    {"inference"},
    {"evaluation"},
    {"generation"},
    {"methods", "data"},
    {"backbones"},
    {"experiment_file"},
    {"config"},
    {"metrics"},
    {"templates", "checkpoint", "memory", "console", "errors"},
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softprompt."):
            yield node.module.split(".")[1]
        if isinstance(node, ast.Import):
            yield from (
                a.name.split(".")[1] for a in node.names if a.name.startswith("softprompt.")
            )


def test_imports_point_down_only():
    package = REPOSITORY / "softprompt"
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    files = [p for p in package.rglob("*.py") if p.name != "__init__.py"]
    assert len(files) > 20
    for path in files:
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for other in imports(path):
            assert level[other] >= level[own], f"{path} imports softprompt.{other}"


def test_only_one_file_knows_orbax():
    package = REPOSITORY / "softprompt"
    knowing = [
        p.name for p in package.rglob("*.py") if re.search("(from|import) orbax", p.read_text())
    ]
    assert knowing == ["checkpoint.py"]
