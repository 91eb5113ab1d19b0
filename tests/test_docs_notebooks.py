"""The notebooks in docs/: they run, and show what is stored in them."""

import re
import runpy
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")

RUN = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "notebooks" / "run.py"), run_name="run")


def shown(notebook):
    """Return the text that each cell shows, numbers to four digits, and whether there are pictures."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type in ("execute_result", "display_data"), output
            text = output.data.get("text/html", output.data["text/plain"])
            yield (
                re.sub(r"\d+\.\d+(e-?\d+)?", lambda number: f"{float(number[0]):.4g}", text),
                "image/png" in output.data,
            )


@pytest.mark.parametrize("path", RUN["NOTEBOOKS"], ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # those of Jupyter
def test_notebooks_show_what_is_stored_in_them(path, tmp_path):
    stored = nbformat.read(path, as_version=4)
    assert list(shown(RUN["executed"](path, tmp_path))) == list(shown(stored))
    assert any(picture for _, picture in shown(stored))
