"""The page of ``inspect --html`` in Chromium, without a network: what it draws, sorts and finds, and what fits."""

import os
import shutil

import numpy as np
import pytest
from helpers import pair, save_raw

from mxfp4np.cli import main

CHROMIUM = os.environ.get("MXFP4NP_CHROMIUM") or shutil.which("chromium")
HOSTILE = "<img src=x onerror='document.title=1'></script><script>document.title=1</script>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
sync_api = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser():
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    arrays = {f"model.layers.{i}.experts.{w}": pair(8, 4, 2, seed=i) for i in range(6) for w in ("up", "down")}
    arrays |= {f"model.layers.{i}.norm.weight": np.ones(2**i, np.float32) for i in range(6)}
    save_raw(folder / "m.safetensors", arrays | {HOSTILE: np.zeros(3, np.float32), "odd_blocks": pair(2, 1).blocks})
    assert main(["inspect", str(folder / "m.safetensors"), "--quiet", "--html", str(folder / "r.html")]) == 0
    return folder / "r.html"


@pytest.fixture(params=[(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")], ids=str)
def shown(browser, file, request):
    """Return the page, which may not complain, nor ask for anything but itself."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    yield page
    assert complaints == []
    context.close()


def names(page):
    return page.locator("td.name div span").all_inner_texts()


def test_the_page_fits_and_runs_nothing_of_a_name(shown):
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert shown.title() not in ("", "1")
    assert HOSTILE.split(".", maxsplit=1)[0] in " ".join(names(shown))
    assert shown.locator("img").count() == 0
    assert shown.locator("h2").all_inner_texts() == [
        "What verify finds",
        "Tensors",
        "Scales by layer and expert",
        "Codes and scales",
    ]


def test_paper_and_ink_follow_the_scheme(shown):
    dark = shown.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    colors = "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    brightness = [sum(map(int, text[4:-1].split(", "))) for text in shown.evaluate(colors)]
    assert (brightness[0] < brightness[1]) == dark


def test_search_finds_layers_within_ranges_and_formats(shown):
    def found(text):
        shown.fill("input[type=search]", text)
        return names(shown)

    assert "up" in " ".join(found("experts.up"))
    assert "norm" not in " ".join(found("mxfp4"))
    assert "up" in " ".join(found("layers.3.experts.u"))
    assert found("layers.3.expert.u") == []
    assert found("nothing like it") == []
    assert "norm" in " ".join(found(""))


def test_columns_sort_and_branches_close(shown):
    shown.get_by_role("button", name="stored").click()
    down = [shown.evaluate("document.querySelector('th[aria-sort]').getAttribute('aria-sort')"), names(shown)]
    shown.get_by_role("button", name="stored").click()
    up = [shown.evaluate("document.querySelector('th[aria-sort]').getAttribute('aria-sort')"), names(shown)]
    assert (down[0], up[0]) == ("descending", "ascending")
    assert down[1][0].startswith("model.layers")
    assert up[1][-1] != down[1][-1]
    before = len(names(shown))
    shown.locator("td.name button").first.click()
    assert len(names(shown)) < before


def test_cells_are_read_where_they_lie(shown):
    shown.locator("figure canvas").first.scroll_into_view_if_needed()
    box = shown.locator("figure canvas").first.bounding_box()
    shown.mouse.move(box["x"] + box["width"] * 7.5 / 8, box["y"] + box["height"] * 2.5 / 6)
    assert shown.locator(".reading").first.inner_text().startswith("layer 2, expert 7: mean exponent of scales 2^-")


def test_pixels_are_the_means(shown):
    def drawn(index):
        script = "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
        return np.reshape(shown.locator("figure canvas").nth(index).evaluate(script), (6, 8, 4))

    means = shown.evaluate("data.pictures.list.map((picture) => picture.values[0])")
    low, high = min(map(min, means)), max(map(max, means))
    for index in range(2):
        green = drawn(index)[..., 1].ravel()  # which grows with the value
        assert (np.diff(green[np.argsort(means[index], kind="stable")]) >= 0).all()
        assert (drawn(index)[..., 3] == 255).all()
    assert [low, high] == [float(text[2:]) for text in shown.locator(".legend span").all_inner_texts()]


def test_histograms_follow_the_choice(shown):
    shown.get_by_label("tensors").select_option(index=1)
    bars = shown.locator(".columns").first.locator("div")
    assert bars.count() == 16
    titles = [bar.get_attribute("title") for bar in bars.all()]
    assert [title.split(":")[0] for title in titles[:2]] == ["-6", "-4"]
    assert sum(int(title.split(": ")[1].split(",")[0]) for title in titles) == 6 * 8 * 4 * 64
