"""What `encode` packs: what tensors are by their names, and which axis is their inputs."""

import json

import numpy as np
import pytest

import mxfp4np
from mxfp4np import LayoutError
from mxfp4np.rewrite.choose import inputs_of, kind_of

KINDS = {
    "a head": "lm_head head output model.output embed_out unembedding score classifier.dense lm_head.decoder decoder "
    "lm_heads.3 medusa_head.0.1 model.layers.61.shared_head.head mtp.0.head transformer.output_layer proj_out "
    "cls.predictions.decoder vocab_projector transformer.ff_out qa_outputs",
    "an embedding": "model.embed_tokens embed tok_embeddings transformer.wte transformer.wpe emb token_embd shared "
    "model.shared visual.patch_embed.proj model.visual.pos_emb embeddings.word_embeddings model.patch_embedder.proj",
    "a router or gate": "layers.0.mlp.router layers.0.mlp.gate layers.0.block_sparse_moe.gate layers.0.ffn.gate "
    "layers.0.feed_forward.gate.wg layers.0.mlp.shared_expert_gate layers.0.mlp.router.classifier blk.0.ffn_gate_inp "
    "layers.0.mlp.router.gate blk.0.ffn_gate_inp_shexp layers.0.moe.gating",
    "a norm": "model.norm layers.0.input_layernorm transformer.ln_f h.0.ln_1 layers.0.self_attn.q_norm",
    "a position or bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias blocks.0.attn.rel_pos_h "
    "encoder.rel_pos_bias layers.0.attn.linear_pos layers.0.attn.relative_position_bias_table",
    "a convolution": "layers.0.conv1d layers.0.conv.conv visual.patch_conv",
    "a low-rank adapter": "layers.0.self_attn.q_proj.lora_A layers.0.self_attn.q_proj.lora_B.default blocks.0.w_lora",
    None: "layers.0.mlp.gate_proj layers.0.mlp.gate_up_proj layers.0.mlp.shared_expert.up_proj blk.0.ffn_gate "
    "layers.0.mlp.shared_experts.down_proj layers.0.mlp.shared.up_proj layers.0.self_attn.q_a_proj layers.0.attn.wq_a "
    "layers.0.self_attn.kv_a_proj_with_mqa encoder.layer.0.attention.output.dense encoder.layer.0.output.dense "
    "layers.0.conv.in_proj layers.0.ffn.experts.0.w1 layers.0.mlp.switch_mlp.gate_proj layers.0.linear_attn.out_proj "
    "layers.0.attention.q_head decoder.layers.0.fc1 diffusion_head.layers.0.ffn.up_proj layers.0.ff_out "
    "roberta_prelayernorm.encoder.layer.0.attention.self.query visual.blocks.0.attn.qkv model.mtp.layers.0.eh_proj",
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, names in KINDS.items() for name in names.split()])
def test_kinds(name, kind):
    assert kind_of(f"{name}.weight") == kind
    assert kind_of(f"language_model.{name}.weight") == kind


@pytest.mark.parametrize(
    ("name", "others", "expected"),
    [
        ("a.q_proj.weight", {}, (-1, "")),
        ("a.q_proj.weight", {"a.q_proj.bias": (64,)}, (-1, "a.q_proj.bias")),
        ("a.q_proj.weight", {"a.q_proj.bias": (96,)}, (-2, "a.q_proj.bias")),
        ("a.q_proj.weight", {"a.q_proj.bias": (5,)}, (-1, "")),
        ("h.0.attn.c_attn.weight", {}, (None, "")),
        ("h.0.attn.c_attn.weight", {"h.0.attn.c_attn.bias": (96,)}, (-2, "h.0.attn.c_attn.bias")),
        ("h.0.attn.c_attn.weight", {"h.0.attn.c_attn.bias": (64,)}, (-1, "h.0.attn.c_attn.bias")),
    ],
)
def test_inputs_of_matrices(name, others, expected):
    assert inputs_of(name, {name: (64, 96), **others}) == expected


@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("mlp1_weight", "mlp2_weight")])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((4, 192, 64), (4, 64, 96), -1),
        ((4, 64, 192), (4, 96, 64), -2),
        ((4, 128, 64), (4, 64, 64), -1),  # one matrix of two is square
        ((4, 64, 128), (4, 64, 64), -2),
        ((4, 64, 64), (4, 32, 64), -2),
        ((4, 64, 64), (4, 64, 32), -1),
        ((4, 64, 96), (4, 64, 64), None),
        ((4, 64, 96), (64,), None),
    ],
)
def test_inputs_of_stacked_experts(names, first, second, expected):
    one, other = (f"layers.0.experts.{name}" for name in names)
    shapes = {one: first, other: second}
    assert inputs_of(one, shapes) == (expected, other if expected else "")
    if len(second) == 3:
        assert inputs_of(other, shapes) == (expected, one if expected else "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("l.0.mlp.switch_mlp.up_proj.weight", -1), ("l.0.moe.input_linear.weight", -1), ("l.0.experts.weight", None)],
)
def test_inputs_of_stacked_experts_by_name(name, expected):
    assert inputs_of(name, {name: (4, 64, 64)}) == (expected, "")


# In encode


def write(folder, shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    folder.mkdir()
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    mxfp4np.save_file(tensors, folder / "model.safetensors")
    return folder, tensors


EXPERTS = "model.layers.0.mlp.experts."
IN_OUT = {f"{EXPERTS}gate_up_proj": (2, 64, 192), f"{EXPERTS}down_proj": (2, 96, 64)}
OUT_IN = {f"{EXPERTS}gate_up_proj": (2, 192, 64), f"{EXPERTS}down_proj": (2, 64, 96)}
BLOCK = {"block.0.mlp.mlp1_weight": (2, 192, 64), "block.0.mlp.mlp2_weight": (2, 64, 96)}


@pytest.mark.parametrize(
    ("layout", "shapes"), [("gpt-oss-hf", IN_OUT), ("gpt-oss-hf", OUT_IN), ("gpt-oss", BLOCK)], ids=str
)
def test_stacked_experts_are_packed_along_their_inputs(tmp_path, layout, shapes):
    """However they are stored; the other way is refused."""
    source, tensors = write(tmp_path / "source", shapes)
    mxfp4np.encode_checkpoint(source, tmp_path / "out", layout=layout)
    turned = shapes is IN_OUT
    with mxfp4np.Checkpoint(tmp_path / "out") as packed:
        for name, values in tensors.items():
            expected = mxfp4np.encode(np.ascontiguousarray(values.swapaxes(1, 2) if turned else values))
            assert np.array_equal(packed.packed(name).blocks, expected.blocks)
    wrong, right = ("no", "yes") if turned else ("yes", "no")
    message = rf"axis {-2 if turned else -1} is its inputs, as .* shows, and would be packed along its outputs: give "
    with pytest.raises(LayoutError, match=message + f"--transpose {right}"):
        mxfp4np.encode_checkpoint(source, tmp_path / "other", layout=layout, transpose=wrong)
    assert mxfp4np.encode_checkpoint(source, tmp_path / "other", layout=layout, transpose=right).complete


def test_what_may_be_either_is_left_alone_or_refused(tmp_path):
    shapes = {"l.0.experts.weight": (4, 64, 64), "l.0.q_proj.weight": (64, 64), "h.0.mlp.c_proj.weight": (64, 64)}
    source, tensors = write(tmp_path / "source", shapes)
    result = mxfp4np.encode_checkpoint(source, tmp_path / "default", layout="mlx")
    assert result.packed == ["l.0.q_proj.weight"]
    for name in ("l.0.experts.weight", "h.0.mlp.c_proj.weight"):
        with pytest.raises(LayoutError, match="nothing says which axis its inputs are: give --transpose no"):
            mxfp4np.encode_checkpoint(source, tmp_path / "out", layout="mlx", include=name)
        for transpose in ("yes", "no"):
            target = tmp_path / f"{name}-{transpose}"
            mxfp4np.encode_checkpoint(source, target, layout="mlx", include=name, transpose=transpose)
            values = tensors[name].swapaxes(-1, -2) if transpose == "yes" else tensors[name]
            expected = mxfp4np.encode(np.ascontiguousarray(values))
            with mxfp4np.Checkpoint(target) as packed:
                assert np.array_equal(packed.packed(name).blocks, expected.blocks)


def test_transposing_leaves_linear_layers_alone_unless_asked_for(tmp_path):
    source, _ = write(tmp_path / "source", {"l.0.experts.weight": (4, 64, 64), "l.0.q_proj.weight": (64, 64)})
    result = mxfp4np.encode_checkpoint(source, tmp_path / "a", layout="mlx", transpose="yes")
    assert result.packed == ["l.0.experts.weight"]
    result = mxfp4np.encode_checkpoint(source, tmp_path / "b", layout="mlx", transpose="yes", include="*q_proj*")
    assert result.packed == ["l.0.q_proj.weight"]


def test_a_matrix_whose_bias_counts_its_columns_is_no_linear_layer(tmp_path):
    source, _ = write(
        tmp_path / "source", {"a.weight": (64, 96), "a.bias": (96,), "b.weight": (64, 96), "b.bias": (64,)}
    )
    assert mxfp4np.encode_checkpoint(source, tmp_path / "a", layout="mlx").packed == ["b.weight"]
    with pytest.raises(LayoutError, match=r"axis -2 is its inputs, as a\.bias shows.*give --transpose yes"):
        mxfp4np.encode_checkpoint(source, tmp_path / "b", layout="mlx", include="a.weight")


def test_the_summary_says_when_the_largest_were_left(tmp_path, command):
    shapes = {f"model.layers.{i}.mlp.experts.gate_up_proj": (2, 64, 192) for i in range(3)}
    small = {"model.layers.0.self_attn.q_proj.weight": (64, 64), "model.norm.weight": (64,)}
    source, _ = write(tmp_path / "source", {**shapes, **small, "model.embed_tokens.weight": (32, 64)})
    arguments = ("encode", source, tmp_path / "out", "--layout", "compressed-tensors")
    line = (
        "left as they are: 4 tensors, 303 kB, the largest model.layers.0.mlp.experts.gate_up_proj, which has shape "
        "[2, 64, 192]: expected 2 axes; --include chooses others"
    )
    assert command(*arguments, "--dry-run")[1].splitlines()[-1] == line
    status, out, _ = command(*arguments)
    assert status == 0
    assert line in out.splitlines()
    left = json.loads(command(*arguments, "--force", "--json")[1])["left"]
    assert [matrix["name"] for matrix in left] == [*shapes, "model.embed_tokens.weight"]
    assert left[-1] == {"name": "model.embed_tokens.weight", "nbytes": 8192, "reason": "is an embedding"}
    # Nothing that the caller chose is mentioned, nor what is smaller than all that is packed.
    chosen = (*arguments, "--force", "--dry-run", "--include", "*q_proj*")
    assert "left as" not in command(*chosen)[1]
    assert "left as" not in command(*arguments, "--force", "--dry-run", "--exclude", "*gate_up_proj")[1]
