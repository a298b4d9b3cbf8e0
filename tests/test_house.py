"""The layout: which folder imports which, no import cycles, diffusers in one folder only, no file or function too long.
"""
import ast
import functools
import graphlib
import sys

import pytest
from conftest import ROOT

# What a file at the top, or any file of a folder, may import from the others.
DOORS = {
    "pds": [], "files": [], "pipelines": ["files"], "loop": ["files"], "svg": ["files"], "scene": ["files"],
    "image": ["pds", "scene", "loop", "files"],
    "prior": ["pipelines", "files"], "toy": ["pds", "pipelines", "files"],
    "svg_raster": ["svg", "loop", "files"], "nerf": ["scene", "loop", "files"], "splat": ["scene", "loop", "files"],
    "edit": ["pds", "image", "loop", "files"],
    "options": ["pds", "edit", "image", "pipelines", "scene", "loop", "files"],
    "run": ["options", "edit", "toy", "prior", "svg_raster", "nerf", "splat", "image", "scene", "loop", "files"],
    "bench": ["run", "options", "edit", "toy", "prior", "svg_raster", "nerf", "splat", "pds", "image", "scene", "svg",
              "pipelines", "loop", "files"],
}
LINES, FUNCTION = 700, 60  # the most lines of a file and of a function
FOLDERS = [name for name in DOORS if (ROOT / name).is_dir()]
FILES = sorted(path for path in [*ROOT.glob("*.py"), *(p for name in FOLDERS for p in (ROOT / name).glob("*.py"))]
               if not path.name.startswith("test_"))
WITHIN = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in FILES}


def room(path):
    """The room of a file: the name of its folder, or its own if it is at the top."""
    return path.stem if path.parent == ROOT else path.parent.name


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


@functools.cache
def imports(path):
    """The dotted names of all modules that a file imports, also within functions; `from a import b` counts as "a.b"."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def first(names):
    return {name.split(".")[0] for name in names}


def test_every_file_belongs_to_a_room():
    assert {room(path) for path in FILES} == set(DOORS)
    assert len([*ROOT.glob("*.py")]) <= 10


@pytest.mark.parametrize("name", FOLDERS)
def test_the_init_file_of_a_folder_is_one_docstring_line(name):
    whole = tree(ROOT / name / "__init__.py")
    assert len(whole.body) == 1 and len(ast.get_docstring(whole).splitlines()) == 1


@pytest.mark.parametrize("name", DOORS)
def test_a_room_imports_only_allowed_rooms(name):
    for path in FILES:
        if room(path) == name:
            assert first(imports(path)) & {*DOORS, "tests"} <= {*DOORS[name], *([name] if name in FOLDERS else [])}, (
                path
            )


def test_there_are_no_import_cycles():
    tuple(graphlib.TopologicalSorter(DOORS).static_order())  # raises CycleError
    tuple(
        graphlib.TopologicalSorter(
            {name: imports(path) & WITHIN.keys() for name, path in WITHIN.items()}
        ).static_order()
    )


def test_pds_and_its_tests_need_torch_and_pytest_alone():
    assert first(imports(ROOT / "pds.py")) - sys.stdlib_module_names == {"torch"}
    assert first(imports(ROOT / "test_pds.py")) - sys.stdlib_module_names == {"torch", "pytest", "pds"}


def test_only_one_folder_of_the_product_imports_diffusers():
    assert {room(path) for path in FILES if "diffusers" in first(imports(path))} <= {"pipelines", "bench"}


def definitions(path):
    """The functions of a file, including nested ones, with their numbers of lines."""
    return [(node.name, node.end_lineno - node.lineno + 1) for node in ast.walk(tree(path))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LINES
    assert not [(name, lines) for name, lines in definitions(path) if lines > FUNCTION]
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", sorted([*ROOT.glob("test_*.py"), *(ROOT / "tests").glob("**/test_*.py")]),
                         ids=lambda path: path.name)
def test_every_test_file_says_what_it_covers(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
