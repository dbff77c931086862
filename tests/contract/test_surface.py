import ast
from pathlib import Path

import pytest

PLUGINS = sorted((Path(__file__).parents[2] / "plugins").rglob("*.py"))


@pytest.mark.parametrize("file", PLUGINS, ids=lambda file: file.name)
def test_plugins_import_the_public_surface_only(file):
    """Built-in plugins have no privilege: they import `gateway` and `gateway.kit` as a third party's would."""
    tree = ast.parse(file.read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {name for name in names if name.split(".")[0] == "gateway"}
    tests = "tests" in file.parts
    assert ours <= {"gateway", "gateway.kit"} | ({"gateway.kit.testing", "gateway.kit.upstream"} if tests else set())
