"""The page that ``inspect --html`` and ``encode --html`` write: what is in it, its bounds, and names of strangers."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from helpers import DATA, pair, save_raw

import mxfp4np
from mxfp4np.cli import page, report

HOSTILE = "</script><script>alert(1)</script><!--\u202e\x1b\"'&\u2028"


def data_of(path):
    """Return what a page shows, and check what holds for every page."""
    text = path.read_text("utf-8")
    assert text.count("<script") == 2
    assert text.count("</script") == 2
    assert re.findall(r"(?:src|href)=|url\(|@import|https?:", text) == []
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    shown = re.search(r'<script type="application/json" id="data">(.*)</script>', text)[1]
    assert shown.isascii()
    assert not re.search("[<>&]", shown)
    found = json.loads(shown)
    assert all(text.isprintable() for text in texts(found))
    return found


def texts(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts(one)


@pytest.fixture
def model(tmp_path):
    """Stacked experts in two layers, one of zeros and one with a NaN block; attention; and what is broken."""
    folder = tmp_path / "model"
    folder.mkdir()
    arrays = {}
    for layer in range(2):
        packed = pair(3, 4, 2, seed=layer)
        if layer == 1:
            packed.blocks[2] = 0
            packed.scales[0, 1, 1] = 255
        arrays[f"layers.{layer}.experts.down_proj"] = packed
        arrays[f"layers.{layer}.attn.q"] = pair(2, 2, seed=5 + layer)
        arrays[f"layers.{layer}.norm.weight"] = np.ones(4, np.float32)
    save_raw(folder / "model.safetensors", arrays | {"odd_blocks": np.zeros((2, 1, 16), np.uint8)})
    return folder


@pytest.fixture
def shown(command, tmp_path):
    """Return a function that writes a page by a command, and returns what it shows."""

    def run(*arguments):
        path = tmp_path / "report.html"
        status, _, err = command(*arguments, "--html", path)
        assert (status, err) == (0, "")
        return data_of(path)

    return run


def test_tensors_are_grouped_by_what_layers_repeat(model, shown):
    found = shown("inspect", model)
    groups = {(".".join(group["path"])).split(".")[-1]: group for group in found["groups"]}
    down = groups["down_proj"]
    assert (down["tensors"], down["shape"], down["format"], down["layout"]) == (2, "3x4x64", "MXFP4", "gpt-oss")
    assert (down["stored"], down["decoded"]) == (2 * 3 * 4 * 2 * 17, 2 * 3 * 4 * 64 * 2)
    assert "half of an MXFP4 pair" in groups["odd"]["problem"]
    assert found["others"] == {"groups": 0, "tensors": 0, "stored": 0}
    assert ["tensors", "7"] in found["facts"]


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("layers.#.w", ["layers", "#", "w"]),
        ("layers.0,2,4,..,60.experts.0-7.w", ["layers", "0,2,4,..,60", "experts", "0-7", "w"]),
        ("a..b", ["a..b"]),
        ("", [""]),
    ],
)
def test_parts_of_a_name_with_ranges(label, parts, monkeypatch):
    monkeypatch.setattr(page, "label", lambda _: label)
    assert page._path([]) == parts


def test_heat_maps_have_layers_down_and_experts_across(model, shown):
    found = shown("inspect", model)["pictures"]
    experts, rest = found["list"]
    assert (experts["rows"], experts["columns"]) == (["0", "1"], ["0", "1", "2"])
    assert (rest["rows"], rest["columns"]) == (["0", "1"], ["layers.attn.q"])
    expected = []
    with mxfp4np.Checkpoint(model) as checkpoint:
        for layer in range(2):
            scales = checkpoint.packed(f"layers.{layer}.experts.down_proj").scales.astype(int)
            expected += [np.mean([x for x in scales[e].ravel() if x != 255]) - 127 for e in range(3)]
    means, zeros, nan = experts["values"]
    assert means[:5] == [round(x, 1) for x in expected[:5]]
    assert means[5] is None  # all its blocks are zero
    assert zeros == [0, 0, 0, 0, 0, 8]
    assert nan == [0, 0, 0, 1, 0, 0]
    assert rest["values"][1:] == [None, None]


def test_experts_that_are_tensors_of_their_own_are_columns_too(tmp_path, shown):
    arrays = {f"layers.{i}.experts.{j}.w": pair(2, 1, seed=j) for i in range(2, 12) for j in (1, 10, 9) if i + j != 12}
    save_raw(tmp_path / "m.safetensors", arrays)
    (picture,) = shown("inspect", tmp_path / "m.safetensors")["pictures"]["list"]
    assert picture["rows"] == [str(i) for i in range(2, 12)]
    assert picture["columns"] == ["1", "9", "10"]
    assert [i for i, value in enumerate(picture["values"][0]) if value is None] == [2, 4, 27]


@pytest.mark.parametrize("size", [50, 4 << 20])
def test_histograms_are_those_of_stats(model, shown, command, monkeypatch, size):
    monkeypatch.setattr(report, "STATS_BYTES", size)
    found = shown("inspect", model)["histograms"]
    tensors = json.loads(command("inspect", model, "--stats", "--json")[1])["tensors"]
    stats = {tensor["name"]: tensor["stats"] for tensor in tensors if "stats" in tensor}
    whole, *groups = found["list"]
    assert [group["name"].split(".")[-1] for group in groups] == ["q", "down_proj"]
    for one, names in ((whole, ""), (groups[0], "attn.q"), (groups[1], "down_proj")):
        members = [found for name, found in stats.items() if name.endswith(names)]
        for key in ("blocks", "zero_blocks", "nan_scales", "negative_zeros"):
            assert one[key] == sum(member[key] for member in members)
        assert one["codes"] == np.sum([member["codes"] for member in members], 0).tolist()


def test_scales_of_other_formats_have_no_codes(shown):
    found = shown("inspect", DATA / "modelopt")
    assert found["pictures"]["list"]
    assert found["histograms"]["list"]


def test_findings_are_those_of_verify(model, shown, command):
    found = shown("inspect", model)["findings"]
    assert found["list"] == json.loads(command("verify", model, "--json")[1])["findings"]
    assert "NaN" in str(found["list"])


def test_a_pattern_bounds_what_is_read_and_checked(model, shown):
    found = shown("inspect", model, "*.q")
    assert len(found["groups"]) == len(found["histograms"]["list"]) == 1
    assert found["findings"]["summary"].startswith("verified 2 tensors")


def test_what_has_nothing_packed_has_a_page_too(tmp_path, shown):
    save_raw(tmp_path / "m.safetensors", {"w": np.ones(3, np.float32)})
    found = shown("inspect", tmp_path / "m.safetensors")
    assert found["pictures"]["list"] == found["histograms"]["list"] == []


def test_names_of_strangers_are_text(tmp_path, shown):
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    arrays = {f"{HOSTILE}.{i}": pair(2, 3, 1, seed=i) for i in range(2)}
    broken = {f"{HOSTILE}{'x' * 1000}_blocks": np.zeros((2, 1, 16), np.uint8)}
    save_raw(folder / "model.safetensors", arrays | broken | {"{{data}}{{policy}}": np.ones(1, np.float32)})
    found = shown("inspect", folder)
    assert max(map(len, texts(found))) <= 1000
    assert "<!--\\u202e\\x1b\"'&\\u2028" in "".join(texts(found["groups"]))
    assert "{{data}}{{policy}}" in str(found["groups"])


def test_what_is_shown_is_bounded(tmp_path, shown, monkeypatch):
    arrays = {f"{chr(97 + i)}{chr(97 + j)}": pair(2 + i, 1, seed=i) for i in range(8) for j in range(5)}
    save_raw(tmp_path / "m.safetensors", arrays)
    monkeypatch.setattr(page, "MOST_GROUPS", 10)
    monkeypatch.setattr(page, "MOST_PICTURES", 4)
    monkeypatch.setattr(page, "MOST_CELLS", 39)
    found = shown("inspect", tmp_path / "m.safetensors")
    assert {group["stored"] for group in found["groups"]} == {9 * 17, 8 * 17}  # the largest
    assert found["others"] == {"groups": 30, "tensors": 30, "stored": 5 * 17 * sum(range(2, 8))}
    assert (len(found["histograms"]["list"]), found["histograms"]["left_out"]) == (5, 36)
    assert (found["pictures"]["list"], found["pictures"]["left_out"]) == ([], 1)
    monkeypatch.setattr(page, "MOST_CELLS", 40)
    (picture,) = shown("inspect", tmp_path / "m.safetensors")["pictures"]["list"]
    assert len(picture["columns"]) == 40


def test_an_axis_of_very_many_is_none_of_experts(tmp_path, shown, monkeypatch):
    monkeypatch.setattr(report, "MOST_EXPERTS", 3)
    save_raw(tmp_path / "m.safetensors", {"a": pair(4, 2, 1), "b": pair(3, 2, 1)})
    pictures = shown("inspect", tmp_path / "m.safetensors")["pictures"]["list"]
    assert [picture["columns"] for picture in pictures] == [["0", "1", "2"], ["a"]]


def test_many_layers_and_experts_make_a_small_page(tmp_path, shown):
    packed = pair(1, 1)
    arrays = {f"layers.{i}.experts.{j}.{w}": packed for i in range(20) for j in range(50) for w in ("up", "down")}
    save_raw(tmp_path / "m.safetensors", arrays)
    found = shown("inspect", tmp_path / "m.safetensors")
    assert len(found["groups"]) == len(found["pictures"]["list"]) == 2
    assert (tmp_path / "report.html").stat().st_size < 60_000


def test_errors_of_an_encoding(tmp_path, command):
    rng = np.random.default_rng(0)
    arrays = {
        f"m.{i}.{w}.weight": rng.normal(size=(4, 64)).astype(np.float32) for i in range(3) for w in ("up", HOSTILE)
    }
    arrays["m.1.up.weight"][0, 3] = np.nan
    (tmp_path / "plain").mkdir()
    save_raw(tmp_path / "plain" / "model.safetensors", arrays)
    path = tmp_path / "errors.html"
    options = ["encode", tmp_path / "plain", tmp_path / "packed", "--layout", "compressed-tensors", "--html", path]
    assert command(*options, "--dry-run")[0] == 0
    assert not path.exists()
    status, out, _ = command(*options, "--json", "--verify")
    assert status == 0
    errors = json.loads(out)["errors"]
    found = data_of(path)
    assert "nothing wrong" in found["findings"]["summary"]
    up = next(row for row in found["errors"] if row["name"].endswith("up.weight"))
    members = {name: one for name, one in errors.items() if name.endswith("up.weight")}
    assert (up["tensors"], up["nan_blocks"]) == (3, 1)
    assert up["worst"] == max(one["relative_error"] for one in members.values())
    assert errors[up["worst_tensor"]]["relative_error"] == up["worst"]
    assert up["block"] == max(one["worst_block_error"] for one in members.values())
    assert found["layers"]["names"] == ["0", "1", "2"]
    assert min(found["layers"]["errors"]) > 0.05
    (picture,) = found["pictures"]["list"]
    assert (picture["rows"], len(picture["columns"])) == (["0", "1", "2"], 2)
    column = picture["columns"].index("m.up.weight")
    assert picture["values"][0][column::2] == [pytest.approx(one["relative_error"], 1e-3) for one in members.values()]


@pytest.mark.parametrize("arguments", [["inspect"], ["encode", "dst"]])
@pytest.mark.parametrize(
    ("name", "message"),
    [("model.safetensors", "ends in .html"), ("none/x.html", "there is no folder"), ("folder.html", "is a folder")],
)
def test_where_no_page_can_be_written(model, refused, monkeypatch, arguments, name, message):
    monkeypatch.chdir(model)
    (model / "folder.html").mkdir()
    before = (model / "model.safetensors").read_bytes()
    assert message in refused(arguments[0], model, *arguments[1:], "--html", name)
    assert (model / "model.safetensors").read_bytes() == before
    assert not (model / "dst").exists()


def test_the_command_says_what_it_wrote(model, command, tmp_path):
    path = tmp_path / "r.HTML"
    assert command("inspect", model, "--html", path)[1].startswith(f"wrote {path}: ")
    assert json.loads(command("inspect", model, "--html", path, "--json")[1])["bytes"] == path.stat().st_size
    assert command("inspect", model, "--html", path, "--quiet")[1] == ""
