"""The README and the pages in docs/: their examples run, and they name what there is."""

import argparse
import contextlib
import doctest
import io
import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

import mxfp4np
from mxfp4np.cli import main
from mxfp4np.cli.commands import parser
from mxfp4np.layouts.table import LAYOUTS, SCALED_LAYOUTS

ROOT = Path(__file__).parent.parent
README, DOCS, DATA = ROOT / "README.md", ROOT / "docs", Path(__file__).parent / "data"
COMMANDS = DOCS / "command-line.md"
NEEDS = {"howto/gguf-mlx.md": "gguf", "howto/gpu.md": "gpu", "howto/torch-jax.md": "peers"}
"""Pages whose examples need optional packages, and the marker of tests that have them."""

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
PAGES = [README, *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]


def names(path):
    return path.relative_to(ROOT if path == README else DOCS).as_posix()


def blocks(path):
    """Return the examples of a page in order: language, line number and text."""
    text = path.read_text("utf-8")
    found = re.finditer(r"^```(python|sh|console)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(block[1], text.count("\n", 0, block.start(2)), block[2]) for block in found]


def with_examples():
    for path in PAGES:
        if blocks(path):
            marks = [getattr(pytest.mark, NEEDS[names(path)])] if names(path) in NEEDS else []
            yield pytest.param(path, id=names(path), marks=marks)


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """Return a folder with what the examples open."""
    folder = tmp_path_factory.mktemp("samples")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["demo", "--quiet", "--size", "20MB", "--out", str(folder / "demo")]) == 0
    shutil.copytree(DATA / "mlx", folder / "model-mlx")
    shutil.copy(DATA / "gguf" / "model.gguf", folder)
    return folder


def run_python(text, namespace, name, line):
    """Run an example; what is shown behind prompts has to be what comes."""
    if ">>> " not in text:
        exec(compile("\n" * line + text, name, "exec"), namespace)
        return
    test = doctest.DocTestParser().get_doctest(text, namespace, name, name, line)
    test.globs = namespace  # the parser copies it, and later examples need what this one defines
    report = io.StringIO()
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.write, clear_globs=False)
    assert not report.getvalue(), report.getvalue()


def run_command(line, number):
    """Run a command of this package, and return what it prints; other commands are not run."""
    words = shlex.split(line, comments=True)
    if words[:1] != ["mxfp4np"]:
        return None
    if words[1] == "demo":
        words += ["--size", "4MB", "--out", f"demo-again-{number}"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(words[1:]) == 0, line
    return out.getvalue()


@pytest.mark.parametrize("path", list(with_examples()))
def test_examples_run(path, samples, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(samples, folder)
    monkeypatch.chdir(folder)
    if names(path) == "howto/gguf-mlx.md":
        pytest.importorskip("gguf")
    elif names(path) == "howto/gpu.md":
        pytest.importorskip("cupy")
    namespace = {}
    for language, line, text in blocks(path):
        if language == "python":
            run_python(text, namespace, names(path), line)
        elif language == "sh":
            for number, command in enumerate(text.replace("\\\n", " ").splitlines(), line):
                run_command(command, number)
        else:
            command, _, shown = text.removeprefix("$ ").partition("\n")
            assert run_command(command, line) == shown, f"{names(path)}:{line}"


def test_most_pages_have_examples_and_commands():
    found = [language for path in PAGES for language, _, _ in blocks(path)]
    assert min(found.count("python"), found.count("sh")) > 15


def test_the_two_commands_for_a_fresh_machine_are_what_ci_and_the_reader_run():
    install, test = next(text for language, _, text in blocks(README) if language == "sh").strip().splitlines()
    assert install == "python -m pip install . && mxfp4np demo"
    assert test == "python -m pip install tox && python -m tox"
    ci = ROOT / ".ci" / "run"
    if ci.exists():
        assert test in ci.read_text("utf-8")


def test_the_readme_is_read_in_three_minutes():
    assert len(README.read_text("utf-8").splitlines()) < 150


def anchors(path):
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere_in_the_repository(path):
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)", path.read_text("utf-8")):
        other = path.parent / target if target else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), f"{target}#{anchor}"


def test_the_long_description_has_no_link_into_the_repository():
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["metadata"]["hooks"]
    text = README.read_text("utf-8")
    for rule in hook["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert "Ten minutes (`docs/start.md`)" in text
    assert not re.findall(r"\]\((?!\w+:)", text)


def test_the_page_on_layouts_names_all_of_them():
    text = (DOCS / "layouts.md").read_text("utf-8")
    assert not [layout.name for layout in (*LAYOUTS, *SCALED_LAYOUTS) if layout.name not in text]


def test_the_reference_has_every_public_name():
    text = "".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
    described = re.findall(r"^\.\. auto\w+:: mxfp4np\.(\w+)$", text, re.MULTILINE)
    assert not set(mxfp4np.__all__) - {"__version__"} - set(described)


def test_the_page_on_the_command_line_has_every_command():
    (commands,) = (x.choices for x in parser()._actions if isinstance(x, argparse._SubParsersAction))
    described = re.findall(r"^```\{program-output\} mxfp4np (\w+) --help$", COMMANDS.read_text("utf-8"), re.MULTILINE)
    assert described == list(commands)


def test_the_image_runs_commands_that_there_are():
    """With the settings of the page, in the folder that is warmed up."""
    text, page = (
        path.read_text("utf-8") for path in (ROOT / "examples" / "Dockerfile", DOCS / "howto" / "containers.md")
    )
    assert 'ENTRYPOINT ["python", "-m", "mxfp4np"]' in text
    for command in re.findall(r"^RUN python -m mxfp4np (.*)$", text, re.MULTILINE):
        parser().parse_args(shlex.split(command))
    for setting in re.findall(r"NUMBA_\w+=\S+", text):
        assert setting in page


def test_pictures_are_those_that_the_package_draws():
    drawn = runpy.run_path(str(DOCS / "pictures.py"))
    assert {path.stem for path in (DOCS / "images").iterdir()} == set(drawn["PICTURES"])
    for name, draw in drawn["PICTURES"].items():
        assert (DOCS / "images" / f"{name}.svg").read_text("utf-8") == draw().svg(), name
