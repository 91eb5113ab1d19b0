"""One safetensors file: hostile ones are refused, valid ones are read right, damaged ones give an error of ours."""

import errno
import json
import math
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from contract import run_python
from helpers import IO, assert_same, both_io, entry, error_of, file_bytes, write_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mxfp4np
from mxfp4np import CheckpointError
from mxfp4np.storage.safetensors import SafetensorsFile
from mxfp4np.storage.tensorfile import DTYPES, SAFETENSORS_DTYPES

linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")


# Hostile files

X = entry("U8", [4], 0, 4)
TWO = {"x": X, "y": entry("U8", [4], 4, 8)}
X_TEXT = b'"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'

HOSTILE = {
    # content, what the message says besides the file
    "empty file": (b"", "it ends after 0 of at least 8 bytes: download or copy it again"),
    "seven bytes": (b"\x02" + bytes(6), "7 of at least 10 bytes"),
    "pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "a file of GGUF": (b"GGUF\x03\0\0\0" + bytes(100), r"begins with b'GGUF\x03\x00\x00\x00', which is not the length"),
    "a page of HTML": (b"<!DOCTYPE html>" + bytes(100), "it is a file of another kind"),
    "an offset of 400 digits": (file_bytes({"x": entry("U8", [4], 1.5, 10**400)}, b"abcd"), "not a valid"),
    "no header": (bytes(8), "it begins with zeros: it is damaged, download or copy it again"),
    "truncated header": (file_bytes({"x": X})[:20], "it ends after 20 of at least "),
    "truncated data": (file_bytes({"x": X}, b"abc"), "bytes: download or copy it again"),
    "truncated data of two": (file_bytes(TWO, b"abcdefg"), f"of at least {len(file_bytes(TWO, b'abcdefgh')):,} bytes"),
    "extra data": (file_bytes({"x": X}, b"abcde"), f"accounts for {len(file_bytes({'x': X}, b'abcd')):,}: download or"),
    "data without tensors": (file_bytes({}, b"a"), "it has 11 bytes, and its header accounts for 10: "),
    "header length 2**63": (file_bytes({"x": X}, b"abcd", length=2**63), ""),
    "header length 2**64 - 1": (file_bytes({"x": X}, b"abcd", length=2**64 - 1), ""),
    "header length 100 MB": (file_bytes({"x": X}, b"abcd", length=100_000_000), ""),
    "header length one too many": (file_bytes({}, length=3), ""),
    "overlap": (file_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"abcdef"), "b"),
    "gap": (file_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, b"abcdefghij"), "b"),
    "gap at the beginning": (file_bytes({"a": entry("U8", [4], 2, 6)}, b"abcdef"), "a"),
    "reversed offsets": (file_bytes({"x": entry("U8", [4], 4, 0)}, b"abcd"), "x"),
    "offsets near 2**64": (file_bytes({"x": entry("U8", [4], 2**64 - 5, 2**64 - 1)}, b"abcd"), "x"),
    "offsets beyond 2**64": (file_bytes({"x": entry("U8", [4], 2**64, 2**64 + 4)}, b"abcd"), ""),
    "one offset": (file_bytes({"x": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}, b"abcd"), ""),
    "float offset": (file_bytes({"x": entry("U8", [4], 0, 4.0)}, b"abcd"), ""),
    "negative shape": (file_bytes({"x": entry("U8", [-4], 0, 4)}, b"abcd"), "-4"),
    "two negative shapes": (file_bytes({"x": entry("U8", [-2, -2], 0, 4)}, b"abcd"), "-2"),
    "overflowing shape": (file_bytes({"x": entry("U8", [2**40, 2**40], 0, 4)}, b"abcd"), ""),
    "shape whose size wraps to the right one": (file_bytes({"x": entry("U8", [2**62 + 1, 4], 0, 4)}, b"abcd"), ""),
    "shape that overflows in bits": (file_bytes({"x": entry("F64", [2**58], 0, 0)}), ""),
    "shape larger than the data": (file_bytes({"x": entry("U8", [5], 0, 4)}, b"abcd"), ""),
    "shape smaller than the data": (file_bytes({"x": entry("U8", [3], 0, 4)}, b"abcd"), ""),
    "null shape": (file_bytes({"x": entry("U8", None, 0, 4)}, b"abcd"), ""),
    "unknown dtype": (file_bytes({"x": entry("U9", [4], 0, 4)}, b"abcd"), "U9"),
    "dtype in lower case": (file_bytes({"x": entry("u8", [4], 0, 4)}, b"abcd"), "u8"),
    "dtype is a number": (file_bytes({"x": entry(8, [4], 0, 4)}, b"abcd"), ""),
    "half a byte": (file_bytes({"x": entry("F4", [3], 0, 1)}, b"a"), ""),
    "F4 scalar": (file_bytes({"x": entry("F4", [], 0, 1)}, b"a"), ""),
    "no dtype": (file_bytes({"x": {"shape": [4], "data_offsets": [0, 4]}}, b"abcd"), "dtype"),
    "duplicate tensor, other offsets": (
        file_bytes(b"{" + X_TEXT + b"," + X_TEXT.replace(b"[0,4]", b"[4,8]") + b"}", b"abcdabcd"),
        "x",
    ),
    "duplicate tensor, same offsets": (file_bytes(b"{" + X_TEXT + b"," + X_TEXT + b"}", b"abcd"), "x"),
    "duplicate tensor, other dtype": (
        file_bytes(b"{" + X_TEXT + b"," + X_TEXT.replace(b"U8", b"I8") + b"}", b"abcd"),
        "x",
    ),
    "duplicate tensor, name escaped": (
        file_bytes(b"{" + X_TEXT + b"," + X_TEXT.replace(b'"x"', b'"\\u0078"') + b"}", b"abcd"),
        "x",
    ),
    "duplicate tensor, field escaped": (
        file_bytes(b"{" + X_TEXT + b"," + X_TEXT.replace(b"data_offsets", b"data\\u005foffsets") + b"}", b"abcd"),
        "x",
    ),
    "duplicate tensor, written as lists": (
        file_bytes(b'{"x":["U8",[4],[0,4]],"x":["I8",[4],[0,4]]}', b"abcd"),
        "x",
    ),
    "duplicate field": (file_bytes(b"{" + X_TEXT.replace(b'"shape"', b'"dtype":"I8","shape"') + b"}", b"abcd"), ""),
    "duplicate metadata": (
        file_bytes(b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"},' + X_TEXT + b"}", b"abcd"),
        "__metadata__",
    ),
    "metadata list": (file_bytes({"__metadata__": [], "x": X}, b"abcd"), ""),
    "metadata string": (file_bytes({"__metadata__": "a", "x": X}, b"abcd"), ""),
    "metadata number value": (file_bytes({"__metadata__": {"a": 1}, "x": X}, b"abcd"), ""),
    "metadata null value": (file_bytes({"__metadata__": {"a": None}, "x": X}, b"abcd"), ""),
    "metadata is a tensor": (file_bytes({"__metadata__": X}, b"abcd"), ""),
    "invalid UTF-8": (file_bytes(b"{" + X_TEXT.replace(b"x", b"\xff") + b"}", b"abcd"), "UTF-8"),
    "lone surrogate": (file_bytes(b"{" + X_TEXT.replace(b"x", b"\\ud800") + b"}", b"abcd"), ""),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{" + X_TEXT + b"}", b"abcd"), ""),
    "UTF-16": (file_bytes(("{" + X_TEXT.decode() + "}").encode("utf-16"), b"abcd"), ""),
    "not JSON": (file_bytes(b"hello, world", b"abcd"), "JSON"),
    "NaN": (file_bytes(b'{"x":NaN}'), ""),
    "header is a list": (file_bytes([]), ""),
    "header is null": (file_bytes(b"null"), ""),
    "header is a number": (file_bytes(b"1"), ""),
    "tensor is null": (file_bytes({"x": None}), ""),
    "deep objects": (file_bytes(b'{"a":' * 100_000), ""),
    "deep lists": (file_bytes(b'{"a":' + b"[" * 1_000_000), ""),
    "deep list in a field nobody reads": (
        file_bytes(
            b'{"__metadata__":{"data_offsets":"1"},'
            + X_TEXT[:-1]
            + b',"more":'
            + b"[" * 100_000
            + b"]" * 100_000
            + b"}}",
            b"abcd",
        ),
        "",
    ),
    "number of 5,000 digits in a field nobody reads": (
        file_bytes(b'{"__metadata__":{"data_offsets":"1"},' + X_TEXT[:-1] + b',"more":' + b"1" * 5000 + b"}}", b"abcd"),
        "",
    ),
    # No bytes, so the format's own parser has nothing against them, but no array has such a shape either.
    "65 axes": (file_bytes({"x": entry("U8", [1] * 65, 0, 1)}, b"a"), "x"),
    "no elements, one axis beyond 2**63": (file_bytes({"x": entry("U8", [0, 2**63], 0, 0)}), "x"),
    "no elements, other axes overflow": (file_bytes({"x": entry("F32", [0, 2**40, 2**40], 0, 0)}), "x"),
    "pair without elements, other axes overflow": (
        file_bytes({"x.blocks": entry("U8", [0, 2**58, 16], 0, 0), "x.scales": entry("U8", [0, 2**58], 0, 0)}),
        "x",
    ),
}


def open_and_get(path, io):
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        return {name: ckpt[name] for name in ckpt}


@both_io
@pytest.mark.parametrize(("content", "says"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused_by_name_and_fast(tmp_path, content, says, io):
    path = tmp_path / "hostile file.safetensors"
    path.write_bytes(content)
    error = error_of(lambda: open_and_get(path, io))
    assert isinstance(error, CheckpointError), repr(error)
    assert str(path) in str(error)
    assert says in str(error).replace(str(path), "")
    assert "\n" not in str(error)


@both_io
def test_hostile_file_in_a_folder_is_named(tmp_path, io):
    write_raw(tmp_path / "a.safetensors", {"x": X}, b"abcd")
    write_raw(tmp_path / "b.safetensors", {"y": X}, b"abc")
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        mxfp4np.Checkpoint(tmp_path, io=io)


PEAK_OF_OPENING = """
    import sys
    from pathlib import Path
    import mxfp4np

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10

    small, path, io = sys.argv[1:]
    mxfp4np.Checkpoint(small, io=io).close()
    before = peak()
    try:
        mxfp4np.Checkpoint(path, io=io).close()
        found = "opened"
    except mxfp4np.CheckpointError as error:
        assert path in str(error)
        found = "refused"
    print(found, peak() - before)
"""


@linux_only
@both_io
@pytest.mark.parametrize(
    ("length", "size", "found", "limit"),
    [
        (100_000_000, 100, "refused", 8 << 20),
        (100_000_001, 200_000_000, "refused", 8 << 20),
        (2**63, 200_000_000, "refused", 8 << 20),
        (99_999_992, 100_000_000, "opened", 350 << 20),
    ],
    ids=["100 MB in a short file", "over 100 MB", "2**63", "just under 100 MB"],
)
def test_huge_headers_take_bounded_time_and_memory(tmp_path, length, size, found, limit, io):
    small = write_raw(tmp_path / "small.safetensors", {"x": X}, b"abcd")
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{}")
        if found == "opened":
            file.write(b" " * (length - 2))
        file.truncate(size)
    begin = time.monotonic()
    output = run_python(PEAK_OF_OPENING, small, path, io)
    assert time.monotonic() - begin < 30
    path.unlink()
    assert output.split()[0] == found
    assert int(output.split()[1]) < limit


# Things that are no files


@both_io
def test_missing_file(tmp_path, io):
    path = tmp_path / "absent.safetensors"
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        mxfp4np.Checkpoint(path, io=io)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        SafetensorsFile(path, io)


@both_io
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "in a folder"])
def test_named_pipe_is_refused_and_does_not_hang(tmp_path, io, inside):
    path = tmp_path / "x.safetensors"
    os.mkfifo(path)
    error = error_of(lambda: mxfp4np.Checkpoint(tmp_path if inside else path, io=io))
    assert isinstance(error, CheckpointError)
    assert str(path) in str(error)


@both_io
def test_folder_with_the_name_of_a_file(tmp_path, io):
    folder = tmp_path / "x.safetensors"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):  # a folder, and an empty one
        mxfp4np.Checkpoint(folder, io=io)
    for path in (tmp_path, [folder]):
        with pytest.raises((CheckpointError, OSError), match=r"x\.safetensors"):
            mxfp4np.Checkpoint(path, io=io)


@both_io
def test_symlink_loop(tmp_path, io):
    path = tmp_path / "loop.safetensors"
    path.symlink_to(path)
    with pytest.raises(OSError, match=r"loop\.safetensors") as info:
        mxfp4np.Checkpoint(path, io=io)
    assert info.value.errno == errno.ELOOP


@both_io
def test_symlink_to_a_file_is_followed(tmp_path, io):
    target = write_raw(tmp_path / "blob", {"x": X}, b"abcd")
    link = tmp_path / "x.safetensors"
    link.symlink_to(target)
    with mxfp4np.Checkpoint(link, io=io) as ckpt:
        assert bytes(ckpt["x"]) == b"abcd"


@pytest.fixture
def public_folder():
    """Return a folder that any user can reach, which those below pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@both_io
def test_unreadable_file(public_folder, io):
    if not hasattr(os, "setuid"):
        pytest.skip("needs POSIX permissions")
    write_raw(public_folder / "readable.safetensors", {"x": X}, b"abcd").chmod(0o644)
    write_raw(public_folder / "secret.safetensors", {"x": X}, b"abcd").chmod(0)
    code = """
        import os, sys
        import mxfp4np

        folder, io = sys.argv[1:]
        os.chdir(folder)
        mxfp4np.Checkpoint("readable.safetensors", io=io)["x"]  # imports everything
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        assert bytes(mxfp4np.Checkpoint("readable.safetensors", io=io)["x"]) == b"abcd"
        if os.access("secret.safetensors", os.R_OK):
            print("readable")
        else:
            try:
                mxfp4np.Checkpoint("secret.safetensors", io=io)
            except PermissionError as error:
                print(error)
    """
    output = run_python(code, public_folder, io)
    if output == "readable\n":
        pytest.skip("this user reads files whatever their mode")
    assert "secret.safetensors" in output


# Unusual, and valid


@both_io
def test_names_and_metadata_may_be_called_data_offsets(tmp_path, io):
    metadata = {"data_offsets": "data_offsets", "quoted": '"data_offsets"', "dtype": "U8"}
    header = {"__metadata__": metadata, "data_offsets": entry("U8", [4], 0, 4), "shape": entry("I8", [1], 4, 5)}
    path = write_raw(tmp_path / "x.safetensors", header, b"abcd\xff")
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        assert ckpt.metadata == metadata
        assert bytes(ckpt["data_offsets"]) == b"abcd"
        assert ckpt["shape"].tolist() == [-1]
        assert list(ckpt) == ["data_offsets", "shape"]


@both_io
@pytest.mark.parametrize("metadata", [None, {}])
def test_empty_metadata(tmp_path, metadata, io):
    path = write_raw(tmp_path / "x.safetensors", {"__metadata__": metadata, "x": X}, b"abcd")
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        assert ckpt.metadata == {}
        assert bytes(ckpt["x"]) == b"abcd"


@both_io
def test_file_without_tensors(tmp_path, io):
    with mxfp4np.Checkpoint(write_raw(tmp_path / "x.safetensors", {}), io=io) as ckpt:
        assert (list(ckpt), ckpt.metadata, dict(ckpt.stored)) == ([], {}, {})


@both_io
def test_zero_size_and_scalar_tensors(tmp_path, io):
    header = {
        "none": entry("F32", [0], 0, 0),
        "rows": entry("BF16", [0, 3], 0, 0),
        "columns": entry("F32", [3, 0, 2], 0, 0),
        "one": entry("F32", [], 0, 4),
        "ones": entry("F32", [1, 1], 4, 8),
        "last": entry("I64", [0], 8, 8),
        "f4": entry("F4", [2, 0], 8, 8),
    }
    data = np.array([1.5, -2.5], "<f4").tobytes()
    with mxfp4np.Checkpoint(write_raw(tmp_path / "x.safetensors", header, data), io=io) as ckpt:
        arrays = {name: ckpt[name] for name in ckpt}
        assert {name: array.shape for name, array in arrays.items()} == {
            name: tuple(fields["shape"]) for name, fields in header.items()
        }
        assert arrays["rows"].dtype == ml_dtypes.bfloat16
        assert isinstance(arrays["one"], np.ndarray)
        assert arrays["one"] == 1.5
        assert arrays["ones"].tolist() == [[-2.5]]
        assert ckpt.get("columns", index=np.s_[1:]).shape == (2, 0, 2)
        assert [list(ckpt.chunks(name, 64)) for name in ("none", "rows", "columns")] == [[], [], []]


@both_io
def test_pair_without_elements(tmp_path, io):
    header = {
        "rows.blocks": entry("U8", [0, 2, 16], 0, 0),
        "rows.scales": entry("U8", [0, 2], 0, 0),
        "groups.blocks": entry("U8", [3, 0, 16], 0, 0),
        "groups.scales": entry("U8", [3, 0], 0, 0),
    }
    with mxfp4np.Checkpoint(write_raw(tmp_path / "x.safetensors", header), io=io) as ckpt:
        for name, shape in (("rows", (0, 64)), ("groups", (3, 0))):
            assert ckpt.info(name).shape == ckpt.packed(name).shape == ckpt[name].shape == shape
            assert list(ckpt.chunks(name, 64)) == []


@both_io
def test_names_with_control_characters(tmp_path, io):
    names = [
        "",
        "a\nb",
        "\x00",
        "\x1b[31mred",
        "a/../b",
        "tab\t",
        'quote"',
        "back\\slash",
        "\u2028",
        "\U0001f600",
        "é",
        " ",
    ]
    header = {name: entry("U8", [1], i, i + 1) for i, name in enumerate(names)}
    path = write_raw(tmp_path / "x.safetensors", header, bytes(range(len(names))))
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        assert list(ckpt) == names
        assert [int(ckpt[name][0]) for name in ckpt] == list(range(len(names)))
        with pytest.raises(mxfp4np.TensorNotFoundError) as info:
            ckpt["red\n\x1b"]
        assert str(info.value).isprintable()


@both_io
def test_unaligned_tensors(tmp_path, io):
    header = {"pad": entry("U8", [1], 0, 1), "x": entry("F64", [2, 3], 1, 49), "b": entry("BF16", [1], 49, 51)}
    values = np.arange(6, dtype="<f8").reshape(2, 3)
    path = write_raw(tmp_path / "x.safetensors", header, b"\x07" + values.tobytes() + b"\x80\x3f")
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        np.testing.assert_array_equal(ckpt["x"], values)
        assert float(ckpt["b"][0]) == 1.0


@both_io
def test_header_order_is_not_data_order(tmp_path, io):
    header = {"b": entry("U8", [2], 2, 4), "a": entry("U8", [2], 0, 2)}
    with mxfp4np.Checkpoint(write_raw(tmp_path / "x.safetensors", header, b"abcd"), io=io) as ckpt:
        assert list(ckpt) == ["a", "b"]
        assert (bytes(ckpt["a"]), bytes(ckpt["b"])) == (b"ab", b"cd")


# Every dtype, from bytes written by hand

BY_HAND = [
    # dtype, shape in the header, bytes, NumPy's name, shape, values
    ("BOOL", [3], "01 00 01", "bool", [True, False, True]),
    ("U8", [2], "00 ff", "uint8", [0, 255]),
    ("I8", [3], "01 80 ff", "int8", [1, -128, -1]),
    ("U16", [2], "0100 ffff", "uint16", [1, 65535]),
    ("I16", [2], "0080 feff", "int16", [-32768, -2]),
    ("U32", [2], "01000000 ffffffff", "uint32", [1, 2**32 - 1]),
    ("I32", [2], "00000080 feffffff", "int32", [-(2**31), -2]),
    ("U64", [2], "0001000000000000 ffffffffffffffff", "uint64", [256, 2**64 - 1]),
    ("I64", [2], "0000000000000080 feffffffffffffff", "int64", [-(2**63), -2]),
    ("F16", [2, 2], "003e 00bc 0100 ff7b", "float16", [[1.5, -1.0], [2.0**-24, 65504.0]]),
    ("F32", [2], "0000c03f 000080bf", "float32", [1.5, -1.0]),
    ("F64", [2], "000000000000f83f 000000000000f0bf", "float64", [1.5, -1.0]),
    ("C64", [1], "0000c03f 000000c0", "complex64", [1.5 - 2j]),
    ("BF16", [3], "c03f 80bf 807f", "bfloat16", [1.5, -1.0, math.inf]),
    ("F8_E4M3", [4], "38 b8 7e 01", "float8_e4m3fn", [1.0, -1.0, 448.0, 2.0**-9]),
    ("F8_E5M2", [4], "3c bc 7b 01", "float8_e5m2", [1.0, -1.0, 57344.0, 2.0**-16]),
    ("F8_E4M3FNUZ", [4], "40 c0 7f 01", "float8_e4m3fnuz", [1.0, -1.0, 240.0, 2.0**-10]),
    ("F8_E5M2FNUZ", [4], "40 c0 7f 01", "float8_e5m2fnuz", [1.0, -1.0, 57344.0, 2.0**-17]),
    ("F8_E8M0", [4], "7f 80 00 fe", "float8_e8m0fnu", [1.0, 2.0, 2.0**-127, 2.0**127]),
    # Below a byte: packed bytes, along the last axis where rows are whole bytes, else flat.
    ("F4", [2, 4], "21 43 65 87", "uint8", [[0x21, 0x43], [0x65, 0x87]]),
    ("F4", [2, 3], "21 43 65", "uint8", [0x21, 0x43, 0x65]),
    ("F6_E2M3", [2, 4], "01 02 03 04 05 06", "uint8", [[1, 2, 3], [4, 5, 6]]),
    ("F6_E3M2", [4], "01 02 03", "uint8", [1, 2, 3]),
    ("F6_E3M2", [4, 2], "01 02 03 04 05 06", "uint8", [1, 2, 3, 4, 5, 6]),
]


def skip_where_unknown(dtype):
    if dtype.lower().endswith("fnuz") and version("safetensors").startswith("0.7."):
        pytest.skip("safetensors knows the FNUZ dtypes from 0.8 on")


@both_io
@pytest.mark.parametrize(
    ("dtype", "shape", "data", "numpy", "values"),
    BY_HAND,
    ids=[f"{row[0]}{row[1]}".replace(" ", "") for row in BY_HAND],
)
def test_dtype_reads_right_from_bytes_written_by_hand(tmp_path, dtype, shape, data, numpy, values, io):
    skip_where_unknown(dtype)
    data = bytes.fromhex(data)
    path = write_raw(tmp_path / "x.safetensors", {"x": entry(dtype, shape, 0, len(data))}, data)
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        for array in (ckpt["x"], ckpt.stored["x"]):
            assert array.dtype.name == numpy
            assert array.shape == np.shape(values)
            assert array.tobytes() == data
            numbers = array if array.dtype.kind in "bui" else array.astype("complex128")
            assert numbers.tolist() == values
        info = ckpt.info("x")
        assert (info.dtype, info.shape, info.layout, info.nbytes) == (dtype, tuple(shape), None, len(data))


def test_every_dtype_is_tested():
    assert {row[0] for row in BY_HAND} == set(DTYPES)


@both_io
@pytest.mark.parametrize("dtype", sorted(SAFETENSORS_DTYPES))
def test_dtype_round_trips_through_save_file(tmp_path, dtype, io):
    skip_where_unknown(dtype)
    dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    bits = np.random.default_rng(0).integers(0, 2 if dtype == np.bool_ else 256, 5 * 3 * dtype.itemsize, np.uint8)
    array = bits.view(dtype).reshape(5, 3)
    mxfp4np.save_file({"x": array}, tmp_path / "x.safetensors")
    with mxfp4np.Checkpoint(tmp_path / "x.safetensors", io=io) as ckpt:
        assert_same(ckpt["x"], array)


# Fuzzing

FUZZ_BASES = (
    file_bytes(
        {
            "__metadata__": {"format": "pt"},
            "w.blocks": entry("U8", [2, 2, 16], 0, 64),
            "w.scales": entry("U8", [2, 2], 64, 68),
        },
        bytes(range(64)) + b"\x7f\x00\xff\x80",
    ),
    file_bytes(
        {
            "a": entry("F32", [2, 3], 0, 24),
            "b": entry("BF16", [4], 24, 32),
            "c": entry("F4", [2, 4], 32, 36),
            "d": entry("I64", [], 36, 44),
            "e": entry("U8", [0, 5], 44, 44),
            "data_offsets": entry("BOOL", [3], 44, 47),
        },
        bytes(range(47)),
    ),
)

names = st.sampled_from(
    [
        "a",
        "w",
        "w.blocks",
        "w.scales",
        "w_blocks",
        "w_scales",
        ".blocks",
        "_scales",
        "data_offsets",
        "__metadata__",
        "",
        "\x00",
    ]
)
dtypes = st.sampled_from([*DTYPES, "U8", "U8", "U8", "u8", "", "F128", None, 8])
sizes = st.sampled_from(
    [0, 0, 1, 2, 3, 4, 8, 16, 16, 17, 32, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1, 1.0]
)
shapes = st.lists(sizes, max_size=5) | st.sampled_from([None, 4, "4", [[1]], [1] * 64, [1] * 65, [0] * 70])
junk = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(0, 9), max_size=2)
offsets = st.sampled_from([0, 1, 16, 24, 44, 47, 64, 68, 2**32, 2**63, 2**64 - 1, 2**64, -1, 0.5, None])


@st.composite
def edited_header(draw, base):
    """Change names, fields and order in the header of a file, half the time with offsets that fit again."""
    length = int.from_bytes(base[:8], "little")
    pairs = list(json.loads(base[8 : 8 + length]).items())
    data = base[8 + length :]
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(pairs) - 1))
        name, fields = pairs[i]
        kind = draw(st.integers(0, 8))
        if kind == 0:
            pairs[i] = (draw(names), fields)
        elif kind == 1:
            pairs.append((draw(names | st.just(name)), fields))
        elif kind == 2 and len(pairs) > 1:
            del pairs[i]
        elif kind == 3:
            pairs[i] = (name, draw(junk))
        elif isinstance(fields, dict):
            field = draw(st.sampled_from([*fields, "more"]))
            values = {"dtype": dtypes, "shape": shapes, "data_offsets": st.lists(offsets, max_size=3)}
            pairs[i] = (name, {**fields, field: draw(values.get(field, junk))})
    if draw(st.booleans()):
        begin = 0
        for i, (name, fields) in enumerate(pairs):
            try:
                end = begin + math.prod(fields["shape"]) * DTYPES[fields["dtype"]][0] // 8
            except (KeyError, TypeError):
                continue
            if isinstance(end, int) and 0 <= end - begin <= 4096:
                pairs[i] = (name, {**fields, "data_offsets": [begin, end]})
                begin = end
        data = (data * 4096)[:begin]
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(fields)}" for name, fields in pairs) + "}"
    return file_bytes(text.encode(), data)


@st.composite
def damaged_bytes(draw, content):
    """Flip, insert, delete and cut bytes, mostly in the header."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        end = len(content) if draw(st.booleans()) else min(len(content), 8 + int.from_bytes(content[:4], "little"))
        at = draw(st.integers(0, max(0, end - 1)))
        kind = draw(st.integers(0, 4))
        if kind <= 1:
            content[at] = draw(st.integers(0, 255) | st.sampled_from(list(b'"{}[],:0123456789\\')))
        elif kind == 2:
            content[at:at] = draw(st.binary(min_size=1, max_size=4))
        elif kind == 3:
            del content[at : at + draw(st.integers(1, 8))]
        else:
            del content[at:]
    return bytes(content)


@st.composite
def mutated_file(draw):
    base = draw(st.sampled_from(FUZZ_BASES))
    how = draw(st.integers(0, 5))
    if how <= 3:
        base = draw(edited_header(base))
    return base if 1 <= how <= 3 else draw(damaged_bytes(base))


def fetch_all(ckpt):
    for name in ckpt:
        try:
            info = ckpt.info(name)
        except mxfp4np.LayoutError:  # a broken pair; every way to it says so
            for call in (ckpt.get, ckpt.packed):
                with pytest.raises(mxfp4np.LayoutError):
                    call(name)
            continue
        array = np.asarray(ckpt[name])
        assert array.tobytes() is not None
        if info.layout is not None:
            packed = ckpt.packed(name)
            assert array.shape == packed.shape == info.shape
            assert len(packed.blocks.tobytes()) + len(packed.scales.tobytes()) == info.nbytes
        else:
            assert array.nbytes == info.nbytes
    for array in ckpt.stored.values():
        assert np.asarray(array).tobytes() is not None


def error_of_fuzzed(path, io):
    try:
        with mxfp4np.Checkpoint(path, io=io) as ckpt:
            fetch_all(ckpt)
    except mxfp4np.MXFP4Error as error:
        return error


@pytest.fixture(scope="module")
def fuzz_path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors"


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=mutated_file())
def test_fuzzed_file_opens_or_gives_an_error_of_ours(fuzz_path, content):
    fuzz_path.write_bytes(content)
    errors = [error_of_fuzzed(fuzz_path, io) for io in IO]
    assert type(errors[0]) is type(errors[1])
    assert all(error is None or str(fuzz_path) in str(error) for error in errors)


@pytest.mark.parametrize("content", FUZZ_BASES, ids=["pair", "plain"])
def test_fuzz_bases_are_valid(fuzz_path, content):
    fuzz_path.write_bytes(content)
    for io in IO:
        with mxfp4np.Checkpoint(fuzz_path, io=io) as ckpt:
            fetch_all(ckpt)
