"""The walls: imports go one way, big dependencies have one door, files and functions stay small,
and the README's map is the territory."""

import ast
import graphlib
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dist_contrastive"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.py")])

# From the bottom up; parts on one line do not import each other, except as listed in WITHIN.
LAYERS = [
    {"errors"},
    {"sentences"},
    {"atomic", "malloc", "pack_options", "planner_constants", "random_states", "ranks"},
    {"planner", "schedule", "signals"},
    {"records", "tables", "yaml_files"},
    {"changes", "imports"},
    {"settings"},
    {"collectives"},
    {"pairwise"},
    {"losses", "grad_cache", "testing"},
    {"models", "data", "optim", "checkpoint"},
    {"audit", "backend", "metrics", "report"},
    {"tasks"},
    {"evaluation"},
    {"config"},
    {"trainer", "runs"},
    {"embed", "evaluate"},
    {"cli"},
    {"__main__", "launch"},
]
WITHIN = {("losses", "testing")}
DOORS = {  # big dependencies, and the one file or part that knows each
    "accelerate": "backend",
    "deepspeed": "backend",
    "webdataset": "tars.py",
    "fsspec": "remote.py",
    "datasets": "packing",
    "transformers": "transformers",
    "kornia": "views.py",
    "pytorch_optimizer": "optim.py",
    "submitit": "slurm",
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    if "launch" in path.parts:
        return "launch"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        assert not {name for name in imports(path) if name.startswith("dist_contrastive")}
        return
    mine = part_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "dist_contrastive" or len(parts) < 2 or parts[1] == "__version__":
            continue
        other = parts[1]
        fine = other == mine or level(other) < level(mine) or (mine, other) in WITHIN
        assert fine, f"{path.name} imports {name}, which is not below it"


def test_imports_inside_of_folders_go_one_way():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCES
    }
    graph = {
        module: {
            name
            for name in imports(path) & modules.keys()
            if name != module and not module.startswith(f"{name}.")  # its own package's exports
        }
        for module, path in modules.items()
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(("package", "door"), DOORS.items())
def test_big_dependencies_have_one_door(package, door):
    users = [path for path in SOURCES for name in imports(path) if name.split(".")[0] == package]
    assert users
    assert all(door in path.relative_to(ROOT).parts for path in users)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "is it two things?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # Of its body: kernels have arguments by the dozen, each on a line of its own.
            lines = (node.end_lineno or 0) - node.body[0].lineno + 1
            docstring = len((ast.get_docstring(node) or "").splitlines())
            assert lines - docstring <= 60, f"{node.name} has {lines} lines"


def test_readme_tree_is_the_tree():
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"```text\n(.*?)```", readme, re.DOTALL)
    assert tree, "the README has no ```text block with the tree"
    named = set(re.findall(r"^\s*([\w./-]+)/\s", tree[1], re.MULTILINE))
    folders = {part_of(path) for path in SOURCES if path.parent != PACKAGE}
    assert folders <= {name.rsplit("/", 1)[-1] for name in named}


@pytest.mark.parametrize("package", ["dist_contrastive", "launch"])
def test_wheels_have_what_is_not_python(package):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [p for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    others = {str(p.relative_to(ROOT / package)) for p in files if p.suffix != ".py"}
    assert others == set(settings["package-data"][package])


def test_readme_links_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_public_names_have_docstrings():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} does not say what it is for"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


# Words of identifiers for which the field has others: CONTRIBUTING.md.
RETIRED_WORDS = {"slope", "slopes", "courier", "everyones", "heard", "travelling", "amid", "told"}
RETIRED_IDENTIFIERS = {"Ahead", "Taken", "taken", "Meeting", "meeting", "aside", "say", "mine"}


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, arguments, variables, attributes and modules."""
    for node in ast.walk(tree):
        for field in ("id", "arg", "name", "attr", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value.rsplit(".", 1)[-1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_identifiers_are_in_terms_of_the_field(path):
    """Names are read, not prose: a docstring may say what was told."""
    names = {path.stem, *identifiers(ast.parse(path.read_text()))}
    words = {
        name: re.findall(r"[a-z]+", re.sub(r"([A-Z])", r"_\1", name).lower()) for name in names
    }
    retired = {name for name in names if RETIRED_WORDS & set(words[name])}
    retired |= {name for name in names if name.lstrip("_") in RETIRED_IDENTIFIERS}
    assert not retired | {name for name in names if name.startswith("_of_")}


def test_docstrings_do_not_only_refer():
    """None is a mere "See X"."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                assert not text.startswith("See "), f"{path}: {text.splitlines()[0]}"


def retired_names() -> list[tuple[str, str, str]]:
    """Module, retired name and new name of each entry of a ``retired(__name__, {...})``."""
    entries = []
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "retired":
                names = ast.literal_eval(node.args[1])
                entries += [(module, old, new) for old, new in names.items()]
    return entries


@pytest.mark.parametrize(("module", "old", "new"), retired_names())
def test_retired_names_fail_with_the_new_one(module, old, new):
    with pytest.raises(ImportError, match=f"{module}.{old} is now {re.escape(new)}"):
        exec(f"from {module} import {old}")
    pkgutil.resolve_name(new)
