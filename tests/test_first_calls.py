"""What people type first: at checkpoints and packed arrays, with torch's tensors, over files in use."""

import copy
import pickle
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from contract import assert_same_bits
from helpers import assert_same, both_io, pair, save_raw

import mxfp4np
from mxfp4np import LayoutError
from mxfp4np.backends import as_array, device_name
from mxfp4np.format import SHORT_NAMES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def path(tmp_path):
    arrays = {"w": pair(5, 6, 3), "bias": np.arange(30, dtype=np.float32).reshape(5, 6), "ids": np.arange(4)}
    mxfp4np.save_file(arrays | {"half": np.ones(3, BFLOAT16)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


# Checkpoints


def test_checkpoints_compare_and_hash_by_identity(path):
    with mxfp4np.Checkpoint(path) as one, mxfp4np.Checkpoint(path) as other:
        assert (one == one, one == other, one != other) == (True, False, True)  # noqa: PLR0124
        assert len({one, other, one}) == 2
        assert one in [other, one]
        assert one.stored != other.stored
        assert one != dict(one)


def test_infos_are_pickled_and_print_no_addresses(path):
    with mxfp4np.Checkpoint(path) as ckpt:
        for name in ckpt:
            info = ckpt.info(name)
            for again in (pickle.loads(pickle.dumps(info)), copy.deepcopy(info)):
                assert again == info
                assert hash(again) == hash(info)
                assert_same(again.stored[0].array(), ckpt.stored[info.stored[0].name])
            assert " at 0x" not in repr(info)
            assert str(path) in repr(info)
        assert len(pickle.dumps(ckpt.info("bias"))) < 1000  # not the headers of all other tensors
        assert " at 0x" not in repr(ckpt.stored) + repr(ckpt)


def test_names_complete_and_notebooks_show_a_table(path):
    with mxfp4np.Checkpoint(path) as ckpt:
        assert ckpt._ipython_key_completions_() == list(ckpt)
        table = ckpt._repr_html_()
    assert table.count("<tr>") == 5
    assert "<td>w</td><td></td><td>5x6x96</td><td>MXFP4</td><td>gpt-oss</td>" in table


def test_a_table_of_a_notebook_collapses_layers_and_escapes_names(tmp_path):
    arrays = {f"layers.{i}.<b>": np.zeros(2, np.float32) for i in range(30)}
    save_raw(tmp_path / "m.safetensors", arrays | {"x_blocks": np.zeros((2, 16), np.uint8)})
    table = mxfp4np.Checkpoint(tmp_path)._repr_html_()
    assert "<td>layers.0-29.&lt;b&gt;</td><td>x30</td>" in table
    assert "broken" in table
    assert table.count("<tr>") == 3


@pytest.mark.parametrize("what", [None, 3, b"model"])
def test_what_is_no_path_is_refused_by_what_was_expected(what):
    with pytest.raises(TypeError, match="path of a folder or file, or a list of paths, found"):
        mxfp4np.Checkpoint(what)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (SimpleNamespace(type="cpu", index=None), "cpu"),
        (SimpleNamespace(type="cpu", index=0), "cpu"),
        (SimpleNamespace(type="cuda", index=None), "cuda"),
        (SimpleNamespace(type="cuda", index=1), "cuda:1"),
        (SimpleNamespace(id=2), "cuda:2"),
        ("cuda:1", "cuda:1"),
        (None, None),
    ],
)
def test_devices_of_torch_and_cupy_are_known_by_their_attributes(device, name):
    assert device_name(device) == name


@pytest.mark.parametrize("device", [0, ["cpu"], SimpleNamespace(id=0, platform="cpu")])
def test_other_devices_are_refused(path, device):
    for call in (mxfp4np.Checkpoint, mxfp4np.load_file):
        with pytest.raises(TypeError, match=r"text such as 'cuda:0', a torch\.device or a cupy"):
            call(path, device)
    with pytest.raises(TypeError, match="device must be"):
        pair(2, 3).decode(device=device)


def test_a_device_of_torch_is_as_good_as_its_text(path):
    device = SimpleNamespace(type="cpu", index=None)
    with mxfp4np.Checkpoint(path, device) as ckpt:
        assert ckpt.device == "cpu"
        assert_same(ckpt["w"], pair(5, 6, 3).decode())
    assert mxfp4np.load_file(path, device).keys() == {"w", "bias", "ids", "half"}
    with pytest.raises(ValueError, match="no device 'meta'"):
        mxfp4np.Checkpoint(path, SimpleNamespace(type="meta", index=None))


# load_file


def test_load_file_takes_what_get_and_checkpoint_take(path):
    dtypes = {name: array.dtype.name for name, array in mxfp4np.load_file(path).items()}
    assert dtypes == {"w": "bfloat16", "bias": "float32", "ids": "int64", "half": "bfloat16"}
    for dtype in ("float32", "float16", "bfloat16", np.float32):
        arrays = mxfp4np.load_file(path, dtype=dtype, device="cpu", layout="gpt-oss", io="pread")
        assert {arrays[name].dtype for name in ("w", "bias", "half")} == {
            np.dtype(dtype) if dtype != "bfloat16" else BFLOAT16
        }
        assert_same(arrays["ids"], np.arange(4))
        assert_same_bits(arrays["w"], pair(5, 6, 3).decode(dtype))
    with pytest.raises(ValueError, match="io must be"):
        mxfp4np.load_file(path, io="x")
    with pytest.raises(ValueError, match="layout must be"):
        mxfp4np.load_file(path, layout="x")
    for dtype in ("float64", "int8"):
        with pytest.raises(ValueError, match="decode to"):
            mxfp4np.load_file(path, dtype=dtype)


# Packed arrays


def test_packed_arrays_have_what_arrays_have():
    packed = pair(5, 6, 3)
    values = packed.decode()
    assert packed.dtype == values.dtype == np.asarray(packed).dtype
    assert_same(packed.T, values.T)
    for dtype in ("bfloat16", "float16", "float32", "float64", np.float64, np.dtype(">f4"), "int32"):
        want = packed.decode("float32").astype(BFLOAT16 if dtype == "bfloat16" else dtype)
        assert_same(packed.astype(dtype), want)
        assert_same(packed.astype(dtype, copy=False), want)


class OfDask:
    """What dask.array.from_array does with what it is given: see its `core.py`, of 2026.8."""

    def __init__(self, x, chunk):
        assert isinstance(x.shape, tuple)
        assert getattr(x, "chunks", None) is None  # dask takes it for the chunks of HDF5
        assert x[tuple(slice(0, 0) for _ in x.shape)].astype(x.dtype).size == 0  # what the result's type is found by
        self.x, self.chunk = x, chunk

    def compute(self):
        out = np.empty(self.x.shape, self.x.dtype)
        for start in np.ndindex(*(-(-n // c) for n, c in zip(self.x.shape, self.chunk, strict=True))):
            index = tuple(slice(i * c, (i + 1) * c, None) for i, c in zip(start, self.chunk, strict=True))
            out[index] = np.asarray(self.x[index])
        return out


@pytest.mark.parametrize("chunk", [(5, 6, 96), (1, 4, 32), (2, 6, 40)])
def test_packed_arrays_work_in_dask(chunk):
    packed = pair(5, 6, 3)
    assert_same(OfDask(packed, chunk).compute(), packed.decode())


@pytest.mark.peers
def test_packed_arrays_work_in_dask_itself():
    import dask.array as da

    packed = pair(5, 6, 3)
    for chunks in ("auto", (1, 4, 32)):
        lazy = da.from_array(packed, chunks=chunks)
        assert_same(lazy.compute(), packed.decode())
        total = lazy.astype("float32").sum(axis=0).compute()
        np.testing.assert_allclose(total, packed.decode("float32").sum(axis=0))


INDICES = [
    [0, 2],
    [4],
    [],
    [-1, 0, 0],
    range(0, 4, 3),
    np.array([3, 1], np.int32),
    np.array([True, False, True, False, False]),
    [True, False, False, False, True],
    np.zeros(5, bool),
    np.array([[0, 1], [3, 4]]),
    np.s_[[0, 2], 1],
    np.s_[[0, 2], :, :32],
    np.s_[[0, 2], 1:5:2, 5:77],
    np.s_[[0, 2], [1, 3]],
    np.s_[:, [1, 3]],
    np.s_[1:4, [5, 0, 1], 40:],
    np.s_[2, [1, 3]],
    np.s_[[[0], [4]], [1, 3]],
    np.s_[..., [1, 3], :],
    np.s_[[2, 0], ..., 31:33],
    np.arange(30).reshape(5, 6) % 4 == 1,
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_lists_and_masks_select_on_leading_axes(path, index):
    packed = pair(5, 6, 3)
    want = packed.decode("float32")[index]
    assert_same(packed[index].decode("float32"), want)
    for io in ("mmap", "pread"):
        with mxfp4np.Checkpoint(path, io=io) as ckpt:
            assert_same(ckpt.get("w", "float32", index=index), want)
            assert_same(ckpt.get("w", "float32", index=index, backend="numpy"), want)
            out = np.empty(want.shape, np.float32)
            assert ckpt.get("w", index=index, out=out) is out
            assert_same(out, want)
            if want.ndim > 1:
                assert_same(ckpt.get("w", "float32", index=index, transpose=True), want.swapaxes(-1, -2).copy())


@both_io
@pytest.mark.parametrize(
    "index",
    [
        [0, 2],
        [],
        np.array([True, False, True, False, False]),
        np.s_[[0, 2], 1:3],
        np.s_[:, [1]],
        (1, 2),
        np.s_[[0, 1], None],
    ],
    ids=str,
)
def test_plain_tensors_take_them_too(path, io, index):
    whole = np.arange(30, dtype=np.float32).reshape(5, 6)
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        assert_same(ckpt.get("bias", index=index), whole[index])


@pytest.mark.parametrize("name", ["w", "plain"])
@pytest.mark.parametrize("index", [[0, 2], np.array([True, False, True, False, False, False, False, False])], ids=str)
def test_nothing_else_is_read(tmp_path, monkeypatch, name, index):
    save_raw(
        tmp_path / "m.safetensors", {"w": pair(8, 64, 4), "plain": np.arange(8 * 512, dtype=np.float32).reshape(8, 512)}
    )
    read = []
    original = mxfp4np.storage.tensorfile.TensorFile._read_into
    monkeypatch.setattr(
        mxfp4np.storage.tensorfile.TensorFile,
        "_read_into",
        lambda self, target, *rest: (read.append(len(target)), original(self, target, *rest)),
    )
    with mxfp4np.Checkpoint(tmp_path, io="pread") as ckpt:
        array = ckpt.get(name, index=index)
        assert len(array) == 2
        assert sum(read) == ckpt.info(name).nbytes * 2 // 8


def test_experts_of_gate_and_up_by_list(tmp_path):
    packed = pair(4, 6, 2)
    save_raw(tmp_path / "m.safetensors", {"a.mlp1_weight": packed, "a.mlp1_bias": np.arange(24.0).reshape(4, 6)})
    for io in ("mmap", "pread"):
        with mxfp4np.Checkpoint(tmp_path, io=io) as ckpt:
            assert_same(ckpt.get("a.mlp1_weight/up", index=[3, 0]), packed.decode()[[3, 0], 1::2])
            assert_same(ckpt.get("a.mlp1_bias/up", index=[3, 0]), np.arange(24.0).reshape(4, 6)[[3, 0], 1::2])


# torch, without torch


class Dtype:
    """A dtype of the module below, which is in the place of torch."""

    __module__ = "fake_torch"

    def __init__(self, name, numpy):
        self.name, self.numpy = name, np.dtype(numpy)

    def __str__(self):
        return f"torch.{self.name}"


class Tensor:
    """What is used of a tensor of torch, which hands NumPy no dtype that it lacks, and nothing with gradients."""

    def __init__(self, array, name=None, requires_grad=False):
        self.array, self.requires_grad = array, requires_grad
        self.dtype = Dtype(name or array.dtype.name, array.dtype)
        self.shape = array.shape

    def detach(self):
        return Tensor(self.array, self.dtype.name)

    def view(self, dtype):
        return Tensor(self.array.view(dtype.numpy), dtype.name)

    def numpy(self):
        if self.requires_grad or self.dtype.name not in ("uint8", "int16", "float16", "float32", "int64"):
            raise TypeError(f"Got unsupported ScalarType {self.dtype}")
        return self.array

    def __array__(self, dtype=None, copy=None):
        return self.numpy()


@pytest.fixture
def fake_torch(monkeypatch):
    module = types.ModuleType("fake_torch")
    module.uint8, module.int16 = Dtype("uint8", np.uint8), Dtype("int16", np.int16)
    monkeypatch.setitem(sys.modules, "fake_torch", module)


@pytest.mark.usefixtures("fake_torch")
def test_tensors_of_torch_are_viewed(tmp_path):
    packed = pair(4, 2)
    blocks, scales = Tensor(packed.blocks), Tensor(packed.scales, "float8_e8m0fnu")
    array = mxfp4np.MXFP4Array(blocks, scales)
    assert np.shares_memory(array.blocks, packed.blocks)
    assert np.shares_memory(array.scales, packed.scales)
    assert_same(mxfp4np.decode(blocks, scales), packed.decode())
    assert np.shares_memory(as_array(Tensor(packed.blocks, "float4_e2m1fn_x2")), packed.blocks)
    for dtype in (BFLOAT16, np.float16, np.float32):
        values = packed.decode("float32").astype(dtype)
        encoded = mxfp4np.encode(Tensor(values, requires_grad=True))
        assert_same(encoded.decode(), mxfp4np.encode(values).decode())
    state = {"a": Tensor(np.ones(2, BFLOAT16)), "b": Tensor(np.ones(2, np.float32), requires_grad=True), "s": scales}
    mxfp4np.save_file(state, tmp_path / "m.safetensors")
    with mxfp4np.Checkpoint(tmp_path) as ckpt:
        assert {name: tensor.dtype for name, tensor in ((n, ckpt.info(n)) for n in ckpt)} == {
            "a": "BF16",
            "b": "F32",
            "s": "F8_E8M0",
        }


@pytest.mark.parametrize(("short", "name"), sorted(SHORT_NAMES.items()))
def test_dtypes_have_short_names(path, short, name):
    with mxfp4np.Checkpoint(path) as ckpt:
        for spelled in (short, short.upper()):
            assert_same(ckpt.get("w", spelled), ckpt.get("w", name))
            assert_same(ckpt.get("bias", spelled), ckpt.get("bias", name))
            assert_same(ckpt.packed("w").decode(spelled), ckpt.get("w", name))
            assert ckpt.info("w").decoded_nbytes(spelled) == ckpt.get("w", name).nbytes
    assert_same(mxfp4np.load_file(path, dtype=short)["bias"], mxfp4np.load_file(path, dtype=name)["bias"])


def test_dtypes_of_torch_are_taken_by_their_names(path):
    dtype = type("dtype", (), {"__module__": "torch", "__str__": lambda self: f"torch.{self.name}"})()
    with mxfp4np.Checkpoint(path) as ckpt:
        for dtype.name in ["float32"]:
            for name in ("w", "half"):
                assert_same(ckpt.get(name, dtype), ckpt.get(name, "float32"))


# Files in use


@both_io
@pytest.mark.parametrize("form", [dict, lambda tensors: iter(tensors.items())], ids=["mapping", "pairs"])
@pytest.mark.skipif(sys.platform == "win32", reason="a file that is mapped cannot be replaced there")
def test_saving_over_the_file_that_is_read(path, io, form):
    with mxfp4np.Checkpoint(path, io=io) as ckpt:
        before = {name: np.array(ckpt[name]) for name in ckpt}
        tensors = {name: ckpt.packed(name) if name == "w" else ckpt[name] for name in ckpt}
        mxfp4np.save_file(form(tensors), path)
        for name, array in before.items():
            assert_same(ckpt[name], array)
            assert_same(mxfp4np.Checkpoint(path)[name], array)
    loaded = mxfp4np.load_file(path)
    mxfp4np.save_file(loaded, path)
    assert_same(mxfp4np.load_file(path)["w"], before["w"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_saving_to_a_link_replaces_the_link_and_deletes_nothing(path):
    link, dangling = path.with_name("link.safetensors"), path.with_name("dangling.safetensors")
    link.symlink_to(path.name)
    dangling.symlink_to("absent")
    before = path.read_bytes()
    for target in (link, dangling):
        mxfp4np.save_file({"x": np.ones(3)}, target)
        assert list(mxfp4np.Checkpoint(target)) == ["x"]
    assert path.read_bytes() == before


def test_links_to_folders_and_files_are_followed(path, tmp_path):
    source, real, target = tmp_path / "source", tmp_path / "real", tmp_path / "target"
    source.mkdir()
    (source / "model.safetensors").symlink_to(path)
    real.mkdir()
    target.symlink_to(real, target_is_directory=True)
    assert mxfp4np.convert(source, target).complete
    assert target.is_symlink()
    assert_same(mxfp4np.Checkpoint(real)["w"], mxfp4np.Checkpoint(path)["w"])
    mxfp4np.save_file({"x": np.ones(3)}, target / "x.safetensors")
    assert (real / "x.safetensors").exists()


# Sums


def test_numpy_adds_bfloat16_in_bfloat16_as_the_warnings_say():
    ones = np.ones(1000, BFLOAT16)
    assert float(ones.sum()) == 256
    assert "wrong by factors" in " ".join(
        (Path(__file__).parent.parent / "README.md").read_text().replace("\n>", "").split()
    )
    assert ones.astype("float32").sum() == 1000
    assert "NumPy adds bfloat16 in bfloat16" in mxfp4np.Checkpoint.get.__doc__


def test_no_warning_reaches_those_who_index(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mxfp4np.Checkpoint(path).get("w", index=[]).shape == (0, 6, 96)


# Names


@pytest.fixture
def unknown(tmp_path):
    packed = pair(4, 6, 2)
    arrays = {
        "l0/q": packed.blocks,
        "l0/s": packed.scales,
        "l1/q": packed.blocks.reshape(4, 6, 32),
        "l1/s": packed.scales,
    }
    save_raw(tmp_path / "m.safetensors", arrays | {"l0/b": np.ones(3), "norm": np.zeros(2)})
    return tmp_path, packed


NAMES = {
    "block.0.w": ("l0/q", "l0/s"),
    "block.1.w": ["l1/q", "l1/s"],
    "block.0.b": "l0/b",
    "block.7.w": ("l7/q", "l7/s"),
}


def logical(stored):
    layer, _, kind = stored.partition("/")
    return f"block.{layer[1:]}.{'b' if kind == 'b' else 'w'}" if kind else stored


@both_io
@pytest.mark.parametrize("names", [NAMES, logical], ids=["mapping", "function"])
def test_names_of_conventions_that_no_layout_knows(unknown, io, names):
    folder, packed = unknown
    with mxfp4np.Checkpoint(folder, io=io, names=names) as ckpt:
        assert sorted(ckpt) == ["block.0.b", "block.0.w", "block.1.w", "norm"]
        for name in ("block.0.w", "block.1.w"):
            assert_same(ckpt[name], packed.decode())
            info = ckpt.info(name)
            assert (info.dtype, info.layout, info.reason) == ("MXFP4", "names", "named pair, U8/U8")
        assert_same(ckpt["block.0.b"], np.ones(3))
        again = pickle.loads(pickle.dumps(ckpt))
        assert list(again) == list(ckpt)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"w": ("l0/q", "l9/s")}, "no tensor 'l9/s' is stored"),
        ({"w": ("l0/q", "l0/s", "norm")}, "codes and scales: found"),
        ({"w": 3}, "codes and scales: found 3"),
        ({"w": [["l0/q"], ["l0/s"]]}, "codes and scales: found "),
        ({"norm": "l0/b"}, "two tensors would have the same name"),
        ({"norm": ("l0/q", "l0/s")}, "two tensors would have the same name"),
        ({"w": "nothing"}, "found no 'nothing'"),
    ],
)
def test_names_that_do_not_fit_are_refused(unknown, names, message):
    with pytest.raises(LayoutError, match=message):
        mxfp4np.Checkpoint(unknown[0], names=names)


def test_named_pairs_are_checked_as_those_of_any_layout(unknown):
    with mxfp4np.Checkpoint(unknown[0], names={"w": ("l0/s", "l0/q"), "v": ("l0/b", "norm")}) as ckpt:
        for name in "wv":
            with pytest.raises(LayoutError, match="expected"):
                ckpt.info(name)


def test_stored_name_of_a_renamed_tensor(unknown):
    ckpt = mxfp4np.Checkpoint(unknown[0], names={"x": "norm"})
    with pytest.raises(mxfp4np.TensorNotFoundError, match=r"'norm' .* it was given another name"):
        ckpt.get("norm")


@both_io
@pytest.mark.parametrize(
    "names",
    [
        lambda stored: f"model.{stored.partition('.')[0]}",
        {"model.a": ("a.weight", "a.weight_scale"), "model.b": ["b.weight_packed", "b.weight_scale"]},
        {"model.a": "a.weight", "model.b": "b.weight"},
    ],
    ids=["function", "pairs", "logical names"],
)
def test_names_of_fp8_and_nvfp4(tmp_path, io, names):
    tensors = {
        "a.weight": np.ones((4, 32), ml_dtypes.float8_e4m3fn),
        "a.weight_scale": np.full((4, 1), 3, np.float32),
        "b.weight_packed": np.full((4, 16), 0x22, np.uint8),
        "b.weight_scale": np.ones((4, 2), ml_dtypes.float8_e4m3fn),
        "b.weight_global_scale": np.full(1, 2, np.float32),
    }
    with mxfp4np.Checkpoint(save_raw(tmp_path / "m.safetensors", tensors), io=io, names=names) as ckpt:
        assert sorted(ckpt) == ["model.a", "model.b"]
        assert [ckpt.info(name).format for name in sorted(ckpt)] == ["FP8", "NVFP4"]
        assert [ckpt[name][1, 2] for name in sorted(ckpt)] == [3, 0.5]


def test_half_of_a_pair_is_not_renamed(path):
    with pytest.raises(LayoutError, match=r"'w\.blocks' is half of a pair"):
        mxfp4np.Checkpoint(path, names={"x": "w.blocks"})
    with mxfp4np.Checkpoint(path, names={"x": "w"}) as ckpt:
        assert ckpt.info("x").layout == "gpt-oss"


def test_names_on_the_command_line(unknown, command, refused, tmp_path):
    file = tmp_path / "names.json"
    file.write_text('{"block.0.w": ["l0/q", "l0/s"]}')
    status, out, _ = command("inspect", unknown[0] / "m.safetensors", "--names", file)
    assert status == 0
    assert "layout names: named pair, U8/U8" in out
    output = tmp_path / "w.npy"
    assert command("decode", unknown[0], "block.0.w", "--names", file, "--dtype", "float32", "-o", output)[0] == 0
    assert_same(np.load(output), unknown[1].decode("float32"))
    file.write_text('["x"]')
    assert "expected a JSON object" in refused("inspect", unknown[0], "--names", file)


# Sizes


@pytest.mark.parametrize(("size", "shards"), [("1KB", 2), ("1 KiB", 2), ("5GB", 1), ("5GiB", 1), (10**9, 1)])
def test_sizes_are_numbers_or_text(tmp_path, size, shards):
    source = tmp_path / "source"
    source.mkdir()
    save_raw(source / "model.safetensors", {name: np.zeros(200, np.float32) for name in "ab"})
    assert len(mxfp4np.convert(source, tmp_path / "out", max_shard_size=size).shards) == shards
    with pytest.raises(ValueError, match="is not a size"):
        mxfp4np.convert(source, tmp_path / "other", max_shard_size="5 apples")


def test_chunks_take_sizes_as_text(path):
    with mxfp4np.Checkpoint(path) as ckpt:
        for size, text in ((1000, "1kB"), (1024, "1KiB")):
            assert len(list(ckpt.chunks("w", text))) == len(list(ckpt.chunks("w", size))) > 1
            assert [index for index, _ in ckpt.packed("w").iter_chunks(text)] == [
                index for index, _ in ckpt.packed("w").iter_chunks(size)
            ]
