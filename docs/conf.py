"""Settings of Sphinx: see CONTRIBUTING.md. `tox -e docs` builds the pages, and takes warnings for errors."""

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
    "myst_parser",
    "sphinx_copybutton",
    "sphinxarg.ext",
]
exclude_patterns = ["_build"]
default_role = "py:obj"
suppress_warnings = ["myst.domains"]  # sphinx-argparse's domain is incomplete
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(mxfp4np\.)?(backends|storage|layouts|shapes|text)\..*")]

autodoc_typehints = "none"  # numpydoc's sections have the types, and overloads would fill a page
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

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
        page = PAGES.get(str(inside.relative_to(ROOT)))
        return f"](/{page or os.path.relpath(inside, DOCS)}{found[2] or ''})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)", target, text)


def setup(app: object) -> None:
    """Have links adapted in every page, and in every file that a page includes."""

    def read(_: object, name: str, content: list[str]) -> None:
        content[0] = relink(content[0], DOCS / f"{name}.md")

    def include(_: object, path: Path, __: str, content: list[str]) -> None:
        content[0] = relink(content[0], DOCS / path)

    app.connect("source-read", read)
    app.connect("include-read", include)
