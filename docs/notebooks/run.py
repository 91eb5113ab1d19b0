"""Run the notebooks: ``python docs/notebooks/run.py`` stores what they show. The pages are built from that."""

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))


def executed(path: Path, folder: Path) -> Any:
    """Return a notebook with what its cells show, run in a folder, to which the sample is written."""
    import nbformat
    from nbclient import NotebookClient

    from mxfp4np.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        status = main(["demo", "--quiet", "--size", "20MB", "--out", str(folder / "demo")])
    if status:
        sys.exit(status)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(folder))
    for cell in notebook.cells:
        cell.metadata.clear()  # when it ran
        for output in cell.get("outputs", ()):
            for kind, shown in output.get("data", {}).items():
                output.data[kind] = shown.replace(f"{folder}/", "")
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    import nbformat

    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)
