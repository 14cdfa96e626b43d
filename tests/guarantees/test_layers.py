"""Imports go one way: docs/design.md has the layers and what each may import, and the code keeps to it."""

import ast
import re

import pytest

from tests.helpers.documents import PACKAGE, ROOT, read

ROW = re.compile(r"^\| (\d+) \| `(\w+)` \| [^|]* \| ([^|]*)\|$", re.MULTILINE)
LAYERS = {part: (int(layer), set(re.findall(r"`(\w+)`", allowed))) for layer, part, allowed in
          ROW.findall(read(ROOT / "docs" / "design.md"))}  # fmt: skip
COMMANDS = {"unlearn_harm_new", "evaluation", "demo", "recipes"}
# They may import the commands, and each those before it.
TOP = ["comparison", "reproduce"]


def imports_of(part: str) -> set[str]:
    """The other parts of the package that a file or folder imports, also within functions."""
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else list((PACKAGE / part).rglob("*.py"))
    assert files
    return {name for file in files for name in imported(read(file))} - {part}


def imported(code: str) -> set[str]:
    """The parts of the package that some code imports."""
    parts = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("harmful_unlearn.")}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide what is imported"
            package, _, module = (node.module or "").partition(".")
            if package == "harmful_unlearn":
                parts |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
    return parts


def test_the_table_has_every_part():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} - COMMANDS
    assert set(LAYERS) == folders | files


def test_the_table_goes_one_way():
    for part, (layer, allowed) in LAYERS.items():
        assert all(LAYERS[name][0] < layer for name in allowed), part


@pytest.mark.parametrize("part", sorted(set(LAYERS) - set(TOP)))
def test_a_part_imports_only_what_the_table_allows(part):
    assert imports_of(part) - LAYERS[part][1] == set()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_do_not_import_the_comparison(command):
    assert not imports_of(command) & set(TOP)


def test_the_comparisons_parts_go_one_way():
    for place, part in enumerate(TOP):
        assert not imports_of(part) & set(TOP[place + 1 :]), part


def test_no_part_imports_the_repositorys_commands():
    for path in PACKAGE.rglob("*.py"):
        if path.parent != PACKAGE:
            names = re.findall(r"^\s*(?:from|import) (task_vector|main|tests)\b", read(path), re.MULTILINE)
            assert not names, path


def test_imports_are_seen_wherever_they_are():
    code = "def f():\n    import harmful_unlearn.evals.metrics\n    from harmful_unlearn import demo\n"
    assert imported(code + "from harmful_unlearn.data.tables import Table\nimport torch\n") == {"evals", "demo", "data"}
