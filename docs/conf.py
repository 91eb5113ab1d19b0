"""Settings of Sphinx: see CONTRIBUTING.md. `tox -e docs` builds the pages, and takes warnings for errors."""

import operator
import os
import re
from pathlib import Path

import mxfp4np

project = "mxfp4np"
author = "the maintainers of mxfp4np"
copyright = author  # noqa: A001 - Sphinx's name
version = release = mxfp4np.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "numpydoc",
    "myst_nb",
    "sphinx_copybutton",
    "sphinxcontrib.programoutput",
]
exclude_patterns = ["_build"]
nb_execution_mode = "off"  # notebooks are stored with what they show: see docs/notebooks/run.py
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(mxfp4np\.)?(backends|storage|layouts|shapes|text)\..*")]

autodoc_typehints = "none"  # numpydoc's sections have the types of arguments; overloads would fill a page
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"  # but for these, types are words
numpydoc_xref_aliases = {
    "Path": "pathlib.Path",
    "BackendUnavailableError": "mxfp4np.BackendUnavailableError",
    "CheckpointError": "mxfp4np.CheckpointError",
    "CheckpointWarning": "mxfp4np.CheckpointWarning",
    "Conversion": "mxfp4np.Conversion",
    "DeviceMemoryError": "mxfp4np.DeviceMemoryError",
    "Encoding": "mxfp4np.Encoding",
    "LayoutError": "mxfp4np.LayoutError",
    "MXFP4Array": "mxfp4np.MXFP4Array",
    "TensorNotFoundError": "mxfp4np.TensorNotFoundError",
    "Verification": "mxfp4np.Verification",
    "bool": "bool",
    "callable": "collections.abc.Callable",
    "iterable": "collections.abc.Iterable",
    "sequence": "collections.abc.Sequence",
}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Inventories are small and lie here, so that pages are built without a network.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.txt"),
    "numpy": ("https://numpy.org/doc/stable", "inventories/numpy.txt"),
}

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"mxfp4np {release}"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_show_sphinx = False
html_copy_source = False

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = {
    "CHANGELOG.md": "contributing/changelog.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "README.md": "index.md",
    "SECURITY.md": "contributing/security.md",
    "benchmarks/RESULTS.md": "contributing/results.md",
    "benchmarks/results/results.md": "contributing/figures.md",
}
"""Files of the repository that are pages too: links to them lead to the pages."""


def relink(text: str, file: Path) -> str:
    """Return the Markdown of ``file`` with links that are right in the repository as they have to be in the pages."""

    def target(found: re.Match[str]) -> str:
        inside = (file.parent / found[1]).resolve()
        if not inside.is_relative_to(ROOT):
            return found[0]
        page = PAGES.get(inside.relative_to(ROOT).as_posix())
        return f"](/{page or os.path.relpath(inside, DOCS)}{found[2] or ''})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)", target, text)


def add_type(_: object, what: str, name: str, member: object, __: object, lines: list[str]) -> None:
    """Put the type of an attribute, as the source has it, before its description."""
    *owner, field = name.split(".")[1:]
    if what == "property":
        found = member.fget.__annotations__.get("return")
    elif what == "attribute" and owner:
        classes = operator.attrgetter(".".join(owner))(mxfp4np).__mro__
        found = next((x for c in classes if (x := vars(c).get("__annotations__", {}).get(field))), None)
    else:
        return
    if lines and lines[0].startswith("Alias for field"):  # what Python says of a named tuple's fields
        lines.clear()
    text = f"``{getattr(found, '__forward_arg__', found)}``"
    lines[:1] = [f"{text}: {lines[0]}" if lines else text]


def setup(app: object) -> None:
    """Have links adapted in every page, and in every file that a page includes; add types."""

    def read(_: object, name: str, content: list[str]) -> None:
        content[0] = relink(content[0], DOCS / f"{name}.md")

    def include(_: object, path: Path, __: str, content: list[str]) -> None:
        content[0] = relink(content[0], DOCS / path)

    app.connect("source-read", read)
    app.connect("include-read", include)
    app.connect("autodoc-process-docstring", add_type)
