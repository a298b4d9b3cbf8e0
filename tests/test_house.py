"""The house: which file imports which, no circle, one file that knows diffusers, none that grows too long."""
import ast
import graphlib
import sys

import pytest

from conftest import ROOT

# The rooms and the doors between them: a file imports these other files of the repository at most.
DOORS = {
    "files": [], "pds": [], "flow": [], "loading": ["files"],
    "prior": ["files", "flow", "loading"], "optimiser": [], "progress": [],
    "pictures": ["files"], "checkpoint": ["files"],
    "toy": ["pds", "flow", "files"],
    "svg_outline": [], "svg_style": ["svg_outline"], "svg_source": ["svg_outline", "svg_style", "files"],
    "svg_document": ["svg_outline", "svg_style", "svg_source"],
    "svg_segments": ["svg_outline"],
    "svg_raster": ["svg_outline", "svg_document", "svg_segments", "optimiser", "pictures", "files"],
    "captures": ["files"], "colmap": ["captures", "files"], "ply": ["captures", "files"],
    "scene": ["captures", "colmap", "ply", "files", "pictures"], "fit": ["scene", "checkpoint", "parallel", "progress", "files"],
    "nerf": ["scene", "fit", "checkpoint", "parallel", "files"],
    "splat": ["scene", "ply", "fit", "checkpoint", "parallel", "files"],
    "report": ["files"],
    "edit2d": ["pds", "pictures", "report"], "parallel": [],
    "masks": ["edit2d", "pictures", "progress", "report", "scene"],
    "edit": ["pds", "edit2d", "optimiser", "report", "checkpoint", "parallel", "progress"],
    "table": ["pds", "edit", "parallel", "report", "files", "pictures"], "front": ["table", "report"],
    "options": ["pds", "edit", "files", "parallel", "pictures", "report", "scene"],
    "run": ["files", "checkpoint", "options", "parallel", "pictures", "pds", "prior", "toy", "svg_raster", "scene", "nerf", "splat",
            "fit", "report", "edit2d", "masks", "edit", "table", "front"],
}
LIMITS = {"pds": 250, "run": 400}  # lines; of every other file 900
FILES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "bench").glob("*.py"))
PRODUCT = [path for path in FILES if not path.name.startswith("test_")]


def imports(path):
    """The first names of all modules that a file imports, those inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: a relative import"
            found.add(node.module.split(".")[0])
    return found


def test_every_file_has_its_place():
    assert {path.stem for path in PRODUCT if path.parent == ROOT} == set(DOORS)


@pytest.mark.parametrize("name", DOORS)
def test_a_file_imports_only_what_it_may(name):
    assert imports(ROOT / f"{name}.py") & {*DOORS, "bench", "tests"} <= set(DOORS[name])


def test_the_imports_make_no_circle():
    tuple(graphlib.TopologicalSorter(DOORS).static_order())  # raises CycleError; the files keep to DOORS, see above


def test_pds_needs_torch_alone():
    assert imports(ROOT / "pds.py") - sys.stdlib_module_names == {"torch"}


def test_one_file_of_the_product_knows_diffusers():
    assert [path.name for path in PRODUCT if "diffusers" in imports(path) and path.parent == ROOT] == ["loading.py"]


def test_nothing_imports_run_but_measurements_of_whole_edits():
    assert all(path.parent.name == "bench" for path in PRODUCT if "run" in imports(path))


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path):
    length = len(path.read_text().splitlines())
    assert length <= LIMITS.get(path.stem if path.parent == ROOT else None, 900)


@pytest.mark.parametrize("path", sorted(ROOT.glob("**/test_*.py")), ids=lambda path: path.name)
def test_every_test_file_says_what_it_covers(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
