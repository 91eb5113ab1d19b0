"""Whole checkpoints encoded: names, shapes, config of each layout, what is left alone, how far values are off."""

import json
import math

import ml_dtypes
import numpy as np
import pytest

import mxfp4np
from mxfp4np import CheckpointError, LayoutError
from mxfp4np.cli import main
from mxfp4np.format import RULES
from mxfp4np.layouts.table import ENCODED_LAYOUTS
from mxfp4np.rewrite import encode as encoding
from mxfp4np.rewrite.choose import FORMS
from mxfp4np.rewrite.encode import Errors, plan_encoding

BF16 = np.dtype(ml_dtypes.bfloat16)


def normal(*shape, seed=0, dtype=BF16):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(dtype)


GPT_OSS_HF = {
    "model.embed_tokens.weight": normal(96, 64),
    "model.layers.0.mlp.router.weight": normal(4, 64),
    "model.layers.0.mlp.experts.gate_up_proj": normal(4, 64, 96, seed=1),
    "model.layers.0.mlp.experts.gate_up_proj_bias": normal(4, 96),
    "model.layers.0.mlp.experts.down_proj": normal(4, 64, 64, seed=2),
    "model.layers.0.self_attn.q_proj.weight": normal(64, 64),
    "model.norm.weight": normal(64),
}
GPT_OSS = {
    "block.0.mlp.mlp1_weight": normal(4, 96, 64, seed=1),
    "block.0.mlp.mlp2_weight": normal(4, 64, 64, seed=2, dtype=np.float32),
    "block.0.mlp.mlp1_bias": normal(4, 96),
    "block.0.attn.qkv.weight": normal(96, 64),
}
DENSE = {
    "lm_head.weight": normal(96, 64),
    "model.embed_tokens.weight": normal(96, 64),
    "model.layers.0.input_layernorm.weight": normal(64),
    "model.layers.0.mlp.gate.weight": normal(4, 64),
    "model.layers.0.mlp.up_proj.weight": normal(96, 64, seed=1),
    "model.layers.0.mlp.up_proj.bias": normal(96),
    "model.layers.0.mlp.down_proj.weight": normal(64, 96, seed=2, dtype=np.float16),
    "model.layers.0.mlp.odd_proj.weight": normal(64, 100),
    "model.layers.0.ids.weight": np.arange(128).reshape(2, 64),
}
SOURCES = {"gpt-oss-hf": GPT_OSS_HF, "gpt-oss": GPT_OSS, "compressed-tensors": DENSE, "mlx": DENSE}
PACKED = {
    "gpt-oss-hf": {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")},
    "gpt-oss": {"block.0.mlp.mlp1_weight", "block.0.mlp.mlp2_weight"},
    "compressed-tensors": {f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down")},
    "mlx": {f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down")},
}


def write(folder, tensors, config=None):
    folder.mkdir()
    mxfp4np.save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=ENCODED_LAYOUTS)
def layout(request):
    return request.param


def test_every_layout_has_a_form():
    assert tuple(FORMS) == ENCODED_LAYOUTS


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("piece_bytes", [64 * 96 * 2, 8 << 20])
def test_tensors_are_what_encode_makes_of_them(tmp_path, monkeypatch, layout, rule, piece_bytes):
    """And all others are the same bytes; which layout it is, is found out as of any other checkpoint."""
    monkeypatch.setattr(encoding, "CHUNK_BYTES", piece_bytes)
    tensors = SOURCES[layout]
    source = write(tmp_path / "source", tensors, {"model_type": "x"})
    result = mxfp4np.encode_checkpoint(source, tmp_path / "out", rule=rule, layout=layout, max_shard_size=10_000)
    assert result.complete
    assert set(result.packed) == PACKED[layout]
    assert len(result.shards) > 1
    with mxfp4np.Checkpoint(tmp_path / "out") as ours:
        assert set(ours) == set(tensors)
        for name, tensor in tensors.items():
            if name in PACKED[layout]:
                values = tensor.swapaxes(-1, -2) if layout == "gpt-oss-hf" else tensor
                expected = mxfp4np.encode(np.ascontiguousarray(values), rule)
                packed = ours.packed(name)
                assert ours.info(name).layout == layout
                assert np.array_equal(packed.blocks, expected.blocks)
                assert np.array_equal(packed.scales, expected.scales)
                assert len({half.file.path for half in ours.info(name).stored}) == 1
            else:
                assert ours[name].dtype == tensor.dtype
                assert ours[name].tobytes() == tensor.tobytes()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_shapes_and_dtypes_on_disk(tmp_path, layout):
    source = write(tmp_path / "source", SOURCES[layout])
    mxfp4np.encode_checkpoint(source, tmp_path / "out", layout=layout)
    with mxfp4np.Checkpoint(tmp_path / "out") as ours:
        stored = {
            name: [(half.name, half.dtype, half.shape) for half in ours.info(name).stored] for name in PACKED[layout]
        }
    up = "model.layers.0.mlp.up_proj"
    expert = "model.layers.0.mlp.experts.gate_up_proj"
    expected = {
        "gpt-oss-hf": (expert, [(f"{expert}_blocks", "U8", (4, 96, 2, 16)), (f"{expert}_scales", "U8", (4, 96, 2))]),
        "gpt-oss": (
            "block.0.mlp.mlp1_weight",
            [
                ("block.0.mlp.mlp1_weight.blocks", "U8", (4, 96, 2, 16)),
                ("block.0.mlp.mlp1_weight.scales", "U8", (4, 96, 2)),
            ],
        ),
        "compressed-tensors": (
            f"{up}.weight",
            [(f"{up}.weight_packed", "U8", (96, 32)), (f"{up}.weight_scale", "U8", (96, 2))],
        ),
        "mlx": (f"{up}.weight", [(f"{up}.weight", "U32", (96, 8)), (f"{up}.scales", "U8", (96, 2))]),
    }[layout]
    assert stored[expected[0]] == expected[1]


def test_config_says_how_weights_are_packed(tmp_path, layout):
    config = {"model_type": "x", "dtype": "bfloat16", "hidden_size": 64}
    source = write(tmp_path / "source", SOURCES[layout], config)
    mxfp4np.encode_checkpoint(source, tmp_path / "out", layout=layout)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written.pop(key) for key in config} == config
    how = written.pop("quantization_config", None)
    if layout == "gpt-oss-hf":
        assert how["quant_method"] == "mxfp4"
    elif layout == "compressed-tensors":
        assert how["format"] == "mxfp4-pack-quantized"
        left = {
            "lm_head",
            "model.embed_tokens",
            *(f"model.layers.0.{name}" for name in ("mlp.gate", "mlp.odd_proj", "ids")),
        }
        assert set(how["ignore"]) == left
    elif layout == "mlx":
        assert how == written.pop("quantization") == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    else:
        assert how is None
    assert written == {}


def test_errors_of_each_tensor_and_of_all(tmp_path, monkeypatch):
    """Against the sums of the whole arrays; the worst block is where it is, whatever the pieces."""
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 3 * 64 * 2)
    up, down = normal(96, 64, seed=1), normal(64, 96, seed=2)
    up[37, 32:] = 2.0 ** np.linspace(-3, 0, 32)  # rounds worst of all
    up[5, 3] = np.nan
    source = write(tmp_path / "source", {"up.weight": up, "down.weight": down})
    result = mxfp4np.encode_checkpoint(source, tmp_path / "out", layout="mlx")
    errors = norms = 0.0
    for name, values in (("up.weight", up), ("down.weight", down)):
        blocks = values.astype(np.float64).reshape(len(values), -1, 32)
        with np.errstate(invalid="ignore"):
            off = mxfp4np.encode(values).decode("float32").astype(np.float64).reshape(blocks.shape) - blocks
            each, norm = (off**2).sum(-1), (blocks**2).sum(-1)
        relative = np.sqrt(each / norm)
        found = result.errors[name]
        assert found.relative == pytest.approx(math.sqrt(np.nansum(each) / np.nansum(norm)), rel=1e-6)
        assert found.worst == pytest.approx(np.nanmax(relative), rel=1e-6)
        assert relative[found.worst_block] == np.nanmax(relative)
        assert found.nan_blocks == int(np.isnan(each).sum())
        errors, norms = errors + np.nansum(each), norms + np.nansum(norm)
    assert result.errors["up.weight"].nan_blocks == 1
    assert result.relative_error == pytest.approx(math.sqrt(errors / norms), rel=1e-6)
    assert 0.05 < result.relative_error < 0.2
    text = "\n".join(result.lines())
    assert (
        f"worst block {result.errors['up.weight'].worst:.4f} at {list(result.errors['up.weight'].worst_block)}" in text
    )
    assert "1 NaN block" in text


def test_zeros_have_no_error(tmp_path):
    source = write(tmp_path / "source", {"a.weight": np.zeros((4, 64), np.float32)})
    result = mxfp4np.encode_checkpoint(source, tmp_path / "out", layout="mlx")
    assert result.errors["a.weight"] == Errors(0.0, 0.0, 0.0, (), 0)
    assert result.relative_error == 0.0


@pytest.mark.parametrize("rule", ["even", "floor", "rceil"])
def test_there_and_back_again(tmp_path, layout, rule):
    """Packed, converted and packed again, a checkpoint decodes to the same values, and then to the same bytes."""
    source = write(tmp_path / "source", SOURCES[layout])
    mxfp4np.encode_checkpoint(source, tmp_path / "packed", layout=layout)
    mxfp4np.convert(tmp_path / "packed", tmp_path / "plain")
    result = mxfp4np.encode_checkpoint(tmp_path / "plain", tmp_path / "again", rule=rule, layout=layout)
    assert result.relative_error == 0
    assert mxfp4np.verify(tmp_path / "again", tmp_path / "plain").findings == []


def test_patterns_choose(tmp_path):
    source = write(tmp_path / "source", DENSE)
    kwargs = {"layout": "mlx", "include": ["*up_proj.weight", "lm_head.weight"]}
    assert set(mxfp4np.encode_checkpoint(source, tmp_path / "a", **kwargs).errors) == {
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    }
    kwargs = {"layout": "mlx", "exclude": ["*up_proj*"]}
    assert set(mxfp4np.encode_checkpoint(source, tmp_path / "b", **kwargs).errors) == {
        "model.layers.0.mlp.down_proj.weight"
    }


@pytest.mark.parametrize(
    ("pattern", "layout", "message"),
    [
        ("*.ids.weight", "mlx", r"tensor 'model.layers.0.ids.weight' is I64: expected BF16, F16 or F32"),
        ("*.up_proj.bias", "mlx", r"has shape \[96\]: expected 2 or 3 axes"),
        ("*.table", "mlx", r"expected a name that ends in '.weight'"),
        ("*norm.weight", "mlx", r"has shape \[64\]: expected 2 or 3 axes"),
        ("*odd_proj.weight", "mlx", r"has shape \[64, 100\]: expected a multiple of 32 inputs, found 100"),
        ("*odd_proj.weight", "gpt-oss", r"is none that gpt-oss packs: those are \*.mlp1_weight and \*.mlp2_weight"),
        ("nothing", "mlx", "no tensor called nothing that mlx could pack: see --layout and --include"),
        (None, "gpt-oss", r"no tensor called \*.mlp1_weight, \*.mlp2_weight that gpt-oss could pack"),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path, pattern, layout, message):
    source = write(tmp_path / "source", {**DENSE, "a.table": normal(4, 64)})
    with pytest.raises(ValueError, match=message):
        mxfp4np.encode_checkpoint(source, tmp_path / "out", layout=layout, include=[pattern] if pattern else [])
    assert not (tmp_path / "out").exists()


def test_experts_go_to_compressed_tensors_one_by_one_only(tmp_path):
    source = write(tmp_path / "source", {"experts.weight": normal(4, 64, 64)})
    with pytest.raises(LayoutError, match=r"has shape \[4, 64, 64\]: expected 2 axes"):
        mxfp4np.encode_checkpoint(source, tmp_path / "out", layout="compressed-tensors", include=["*"])


def test_transposing_is_the_callers_to_choose(tmp_path):
    source = write(tmp_path / "source", {"a.experts.down_proj": normal(2, 64, 96)})
    for transpose, shape in (("auto", (2, 96, 64)), ("yes", (2, 96, 64)), ("no", (2, 64, 96))):
        mxfp4np.encode_checkpoint(source, tmp_path / transpose, transpose=transpose)
        assert mxfp4np.Checkpoint(tmp_path / transpose).info("a.experts.down_proj").shape == shape


def test_what_is_packed_already_is_refused(tmp_path):
    source = write(tmp_path / "source", GPT_OSS_HF)
    mxfp4np.encode_checkpoint(source, tmp_path / "packed")
    with pytest.raises(LayoutError, match="is quantised already, as gpt-oss-hf: convert the checkpoint first"):
        mxfp4np.encode_checkpoint(tmp_path / "packed", tmp_path / "out")
    tensors = {"model.layers.0.q_proj.weight": np.zeros((32, 32), ml_dtypes.float8_e4m3fn)}
    tensors["model.layers.0.q_proj.weight_scale"] = np.ones((32, 1), np.float32)
    with pytest.raises(LayoutError, match=r"'model.layers.0.q_proj.weight' is quantised already, it is FP8"):
        mxfp4np.encode_checkpoint(write(tmp_path / "fp8", GPT_OSS_HF | tensors), tmp_path / "out")


def test_a_stale_quantization_config_is_replaced(tmp_path):
    source = write(tmp_path / "source", GPT_OSS_HF, {"model_type": "m", "quantization_config": {"quant_method": "fp8"}})
    mxfp4np.encode_checkpoint(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"


@pytest.mark.parametrize(
    "arguments", [{"rule": "up"}, {"layout": "gguf"}, {"transpose": "maybe"}, {"max_shard_size": 0}]
)
def test_wrong_arguments(tmp_path, arguments):
    source = write(tmp_path / "source", GPT_OSS_HF)
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        mxfp4np.encode_checkpoint(source, tmp_path / "out", **arguments)


def test_parts_and_resuming_give_the_same_bytes(tmp_path):
    source = write(tmp_path / "source", GPT_OSS_HF)
    mxfp4np.encode_checkpoint(source, tmp_path / "whole", max_shard_size=5000)
    for i in (3, 1, 2, 1):
        result = mxfp4np.encode_checkpoint(source, tmp_path / "parts", max_shard_size=5000, task=(i, 3))
    assert result.complete
    assert result.written == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    lost = tmp_path / "parts" / next(name for name in names if name.startswith("model-"))
    lost.unlink()
    result = mxfp4np.encode_checkpoint(source, tmp_path / "parts", max_shard_size=5000, resume=True)
    assert result.written < result.nbytes
    assert lost.read_bytes() == (tmp_path / "whole" / lost.name).read_bytes()
    with pytest.raises(CheckpointError, match="begun with other options"):
        mxfp4np.encode_checkpoint(source, tmp_path / "parts", max_shard_size=5000, resume=True, rule="floor")


def test_the_plan_comes_from_headers_alone(tmp_path):
    source = write(tmp_path / "source", GPT_OSS_HF)
    with mxfp4np.Checkpoint(source) as checkpoint:
        plan = plan_encoding(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = mxfp4np.encode_checkpoint(source, tmp_path / "out")
    assert result.shards == {shard.file: shard.nbytes for shard in plan.shards}
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == plan.shards[0].nbytes + len(plan.shards[0].header)


class TestCommand:
    def test_encode(self, tmp_path, capsys):
        source = write(tmp_path / "source", GPT_OSS_HF)
        assert main(["encode", str(source), str(tmp_path / "out"), "--rule", "floor"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert "model.layers.0.mlp.experts.down_proj: relative error 0." in out
        assert "2 tensors packed; relative error of those written now: 0." in out
        assert json.loads((tmp_path / "out" / ".mxfp4np.json").read_text())["rule"] == "floor"

    def test_json(self, tmp_path, capsys):
        source = write(tmp_path / "source", DENSE)
        assert main(["encode", str(source), str(tmp_path / "out"), "--layout", "mlx", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert set(found["packed"]) == PACKED["mlx"]
        assert found["complete"] is True
        assert set(found["errors"]) == PACKED["mlx"]
        assert found["errors"]["model.layers.0.mlp.up_proj.weight"].keys() == {
            "relative_error",
            "worst_block_error",
            "worst_block",
            "nan_blocks",
        }

    def test_dry_run(self, tmp_path, capsys):
        source = write(tmp_path / "source", DENSE)
        assert main(["encode", str(source), str(tmp_path / "out"), "--layout", "mlx", "--dry-run"]) == 0
        *_, shards, _, left = capsys.readouterr().out.splitlines()
        assert shards.startswith("1 shard, ")
        assert left.startswith("left as they are: 4 tensors, 37.9 kB, the largest model.layers.0.mlp.odd_proj.weight")
        assert not (tmp_path / "out").exists()

    def test_one_line_for_what_is_wrong(self, tmp_path, capsys):
        source = write(tmp_path / "source", DENSE)
        assert main(["encode", str(source), str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "that gpt-oss-hf could pack: see --layout and --include" in err


@pytest.mark.gguf
def test_gguf_as_a_source(tmp_path):
    """Its own types are packed already."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra; tox -e peers has it")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = normal(64, 64, dtype=np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("a.weight", values)
    writer.add_tensor("b.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LayoutError, match=r"tensor 'b.weight' is quantised already, it is Q8_0: convert"):
        mxfp4np.encode_checkpoint(tmp_path / "m.gguf", tmp_path / "out", layout="mlx")


@pytest.mark.parametrize("rule", RULES)
def test_the_largest_values_saturate_and_json_stays_strict(tmp_path, command, rule):
    x = np.full((64, 64), 3.3e38, np.float32)
    mxfp4np.save_file({"a.weight": x}, tmp_path / "in.safetensors")
    arguments = ("encode", tmp_path / "in.safetensors", tmp_path / "out", "--layout", "compressed-tensors")
    status, out, _ = command(*arguments, "--rule", rule, "--json")
    assert status == 0
    found = json.loads(out, parse_constant=pytest.fail)
    assert 0.2 < found["relative_error"] < 0.25
    with mxfp4np.Checkpoint(tmp_path / "out") as ckpt:
        assert (ckpt.get("a.weight", "float32") == np.float32(6 * 2.0**125)).all()
