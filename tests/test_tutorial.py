"""examples/tutorial.ipynb: it runs, with fewer steps; its pictures are kept and small; the last cells are not run."""
import base64
import io

import pytest
from conftest import ROOT
from PIL import Image

nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install nbclient ipykernel")
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def pictures(cells):
    return [Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))) for cell in cells
            for output in cell.outputs if "image/png" in output.get("data", {})]


def test_its_pictures_are_kept_and_only_the_last_cells_were_never_run():
    book = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(book)
    ran = [cell for cell in code(book) if "skip-execution" not in cell.metadata.get("tags", [])]
    assert NOTEBOOK.stat().st_size < 1_000_000 and len(pictures(ran)) == 6
    assert [cell.execution_count for cell in ran] == [*range(1, len(ran) + 1)]
    last = code(book)[len(ran):]
    assert len(last) == 2 and not any(cell.outputs or cell.execution_count for cell in last)
    assert "were never run here" in book.cells[book.cells.index(last[0]) - 1].source


def test_it_runs_from_its_own_folder():
    """With two steps an edit: the same cells show pictures, and the numbers of section 3 agree."""
    nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="no ipykernel: pip install nbclient ipykernel")
    book = nbformat.read(NOTEBOOK, 4)
    first = code(book)[0]
    assert "STEPS, toy.STEPS = 60, 1000" in first.source
    first.source = first.source.replace("60, 1000", "2, 20")
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3",
                            resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert len(pictures(code(book))) == 6
    said = "".join(output.text for output in code(book)[3].outputs if output.get("name") == "stdout")
    rows = [line.split() for line in said.splitlines()[1:]]
    assert len(rows) == 4 and all(abs(float(row[4]) - float(row[5].strip(","))) < 1e-3 for row in rows)
    assert rows[0][4] == rows[1][4] != rows[2][4] and rows[0][2] != rows[1][2]
