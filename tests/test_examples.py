"""The examples: gpt-oss's forward pass on tiny random checkpoints, by itself and beside the real implementations."""

import json
import re
import sys
from itertools import pairwise
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import mxfp4np
from examples import gpt_oss

# Small, and such that everything matters: the window is shorter than a prompt, the clamp is reached, pairs of channels
# turn unscaled, scaled and between, and no two sizes that could be mistaken for each other are equal.
SIZES = {
    "num_hidden_layers": 4,
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 10,
    "swiglu_limit": 1.5,
    "rope_theta": 1000.0,
}
HUGGING_FACE = {
    **SIZES,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 384,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 48,
        "truncate": False,
    },
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}
ORIGINAL = {
    **SIZES,
    "num_experts": 8,
    "experts_per_token": 3,
    "initial_context_length": 48,
    "rope_scaling_factor": 8.0,
    "rope_ntk_alpha": 1.0,
    "rope_ntk_beta": 4.0,
}
PROMPT = np.random.default_rng(1).integers(0, 200, 70).tolist()  # longer than the window, and than the context


def weights():
    """Yield (name in Hugging Face's folders, name in the original release, array), queries, keys and values apart."""
    rng = np.random.default_rng(0)
    hidden, heads, experts, inner = 64, {"q": 6, "k": 2, "v": 2}, 8, 96

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)

    def linear(theirs, original, rows, columns):
        yield f"{theirs}.weight", f"{original}.weight", normal(rows, columns, scale=columns**-0.5)
        yield f"{theirs}.bias", f"{original}.bias", normal(rows, scale=0.3)

    def norm(theirs, original):
        return f"{theirs}.weight", f"{original}.scale", 1 + normal(hidden, scale=0.1)

    yield (
        "model.embed_tokens.weight",
        "embedding.weight",
        normal(200, hidden, scale=0.01),
    )  # so small that epsilon counts
    for i in range(SIZES["num_hidden_layers"]):
        layer, block = f"model.layers.{i}", f"block.{i}"
        yield norm(f"{layer}.input_layernorm", f"{block}.attn.norm")
        for name, count in heads.items():
            yield from linear(f"{layer}.self_attn.{name}_proj", f"{block}.attn.qkv", 32 * count, hidden)
        yield from linear(f"{layer}.self_attn.o_proj", f"{block}.attn.out", hidden, 32 * heads["q"])
        yield f"{layer}.self_attn.sinks", f"{block}.attn.sinks", normal(heads["q"])
        yield norm(f"{layer}.post_attention_layernorm", f"{block}.mlp.norm")
        yield from linear(f"{layer}.mlp.router", f"{block}.mlp.gate", experts, hidden)
        for theirs, original, shape in (("gate_up", 1, (2 * inner, hidden)), ("down", 2, (hidden, inner))):
            stem, other = f"{layer}.mlp.experts.{theirs}_proj", f"{block}.mlp.mlp{original}"
            packed = mxfp4np.encode(normal(experts, *shape, scale=2 * shape[1] ** -0.5))
            yield f"{stem}_blocks", f"{other}_weight.blocks", packed.blocks
            yield f"{stem}_scales", f"{other}_weight.scales", packed.scales
            yield f"{stem}_bias", f"{other}_bias", normal(experts, shape[0], scale=0.3)
    yield norm("model.norm", "norm")
    yield "lm_head.weight", "unembedding.weight", normal(200, hidden, scale=0.5)


def write(folder, config, tensors):
    mxfp4np.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A tiny model as Hugging Face has it."""
    folder = tmp_path_factory.mktemp("hugging-face")
    return write(folder, HUGGING_FACE, {theirs: array for theirs, _, array in weights()})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The same model as in the original release."""
    tensors = {}
    for _, name, array in weights():
        tensors.setdefault(name, []).append(array)
    folder = tmp_path_factory.mktemp("original")
    return write(folder, ORIGINAL, {name: np.concatenate(arrays) for name, arrays in tensors.items()})


def opened(folder):
    return gpt_oss.Model(mxfp4np.Checkpoint(folder))


def logits(model, tokens, *cuts):
    """Return the logits at all positions, of tokens that are appended in pieces."""
    caches, cuts = model.caches(), [0, *cuts, len(tokens)]
    return model.logits(np.concatenate([model.forward(tokens[a:b], caches) for a, b in pairwise(cuts)]))


def without_cache(logits_of, count=64):
    """Return the likeliest tokens after the prompt, each from a pass over the whole sequence."""
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(logits_of(tokens)[-1].argmax()))
    return tokens[len(PROMPT) :]


def test_both_layouts_are_the_same_model(hugging_face, original):
    assert np.array_equal(logits(opened(hugging_face), PROMPT), logits(opened(original), PROMPT))


@pytest.mark.parametrize("cuts", [[1], [5, 6, 7, 40], range(1, 70)])
def test_pieces_of_a_sequence_give_the_logits_of_the_whole(hugging_face, cuts):
    model = opened(hugging_face)
    assert np.abs(logits(model, PROMPT, *cuts) - logits(model, PROMPT)).max() < 1e-2


def test_tokens_are_the_same_with_a_cache_and_without(hugging_face, monkeypatch):
    model = opened(hugging_face)
    tokens = without_cache(lambda sequence: logits(model, sequence))
    assert len(set(tokens)) > 20
    assert list(gpt_oss.generate(model, PROMPT, 64)) == tokens
    monkeypatch.setattr(gpt_oss, "CHUNK", 16)
    assert list(gpt_oss.generate(model, PROMPT, 64)) == tokens


@pytest.mark.parametrize("window", [1, 10, np.inf])
def test_a_cache_gives_what_is_in_reach_and_forgets_the_rest(window):
    rng = np.random.default_rng(0)
    cache = gpt_oss.Cache(SimpleNamespace(kv_heads=2, head_dim=4), window)
    whole = rng.standard_normal((2, 2, 400, 4), np.float32)
    cuts = [0, 37, *range(38, 60), 100, *range(101, 401)]
    for a, b in pairwise(cuts):
        found = cache.extend(whole[:, :, a:b])
        assert np.array_equal(found, whole[:, :, int(max(0, a - window + 1)) : b])
    assert cache.seen == 400
    assert cache.buffer.shape[2] <= 2 * min(window, 400)


def test_gates_far_below_the_limit_overflow_nothing():
    found = gpt_oss.swiglu(np.array([-1e4, 3, 1e4, -1e4, 1e4, 1e4], np.float32), 7.0)
    assert found == pytest.approx([0, -42, 56], rel=1e-4)


def test_samples_follow_the_probabilities_and_the_seed():
    scores = np.array([1.0, 3.0, 0.0, 2.0], np.float32)
    model = SimpleNamespace(caches=list, forward=lambda tokens, _: tokens, logits=lambda _: scores)
    tokens = list(gpt_oss.generate(model, [0], 4000, 2.0, 1))
    expected = np.exp(scores / 2) / np.exp(scores / 2).sum()
    assert np.abs(np.bincount(tokens) / 4000 - expected).max() < 0.03
    assert list(gpt_oss.generate(model, [0], 50, 2.0, 1)) == tokens[:50]
    assert list(gpt_oss.generate(model, [0], 50, 2.0, 2)) != tokens[:50]
    assert list(gpt_oss.generate(model, [0], 50, 1e-3)) == [1] * 50


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs the program and returns its status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpt_oss.py", *map(str, arguments)])
        try:
            gpt_oss.main()
        except SystemExit as end:
            return (end.code, *capsys.readouterr())
        return (0, *capsys.readouterr())

    return run


def without_cache_of(folder, count):
    model = opened(folder)
    return without_cache(lambda sequence: logits(model, sequence), count)


def test_the_program_prints_tokens_speed_and_memory(original, run):
    status, out, err = run(original, "--tokens", *PROMPT, "--count", 5)
    assert (status, out.split()) == (0, [str(token) for token in without_cache_of(original, 5)])
    figures = re.fullmatch(r"70 tokens .*: (.+) tokens/s; 5 generated: (.+) tokens/s; peak memory (.+) GB, .*\n", err)
    assert all(float(figure) > 0 for figure in figures.groups())


def test_where_the_system_does_not_tell_the_peak_of_memory_it_is_left_out(original, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    status, _, err = run(original, "--tokens", *PROMPT, "--count", 2)
    assert status == 0
    assert re.fullmatch(r"70 tokens .*: .+ tokens/s; 2 generated: .+ tokens/s\n", err)


def change(**values):
    return lambda config, _: config.update(values)


def change_rope(**values):
    return lambda config, _: config["rope_scaling"].update(values)


def drop(key):
    return lambda config, _: config.pop(key)


def replace(name, array):
    return lambda _, tensors: tensors.update({name: array})


def unpack(_, tensors):
    stem = "model.layers.0.mlp.experts.down_proj"
    del tensors[f"{stem}_scales"], tensors[f"{stem}_blocks"]
    tensors[stem] = np.zeros((8, 64, 96), np.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda config, _: config.clear(), "config.json is missing or empty: it has the sizes of the model"),
        (drop("head_dim"), "config.json: expected a positive int as head_dim, found None"),
        (drop("num_local_experts"), "expected a positive int as num_local_experts or num_experts, found None"),
        (change(vocab_size="200"), "expected a positive int as vocab_size, found '200'"),
        (change(swiglu_limit=-1), "expected a positive float as swiglu_limit, found -1"),
        (change(rope_theta=float("inf")), "expected a positive float as rope_theta, found inf"),
        (change(rope_scaling=3), "expected a positive float as factor or rope_scaling_factor, found None"),
        (change(model_type="llama"), "config.json: model_type is 'llama', expected 'gpt_oss'"),
        (change_rope(truncate=True), "config.json: truncate is True, expected False"),
        (change(layer_types=["full_attention"] * 2), "layer_types is .*, expected .'sliding_attention', 'full_at"),
        (change(layer_types=4), "layer_types is 4, expected"),
        (change(num_attention_heads=5), "config.json: these do not fit each other: Config"),
        (change_rope(beta_slow=4), "config.json: these do not fit each other: Config"),
        (change(num_hidden_layers=5), "no tensor 'model.layers.4.input_layernorm.weight'"),
        (change(num_key_value_heads=3), r"self_attn.{qkv}_proj.weight is .*, config.json expects \[384, 64\]"),
        (replace("lm_head.weight", np.float32(1)), r"lm_head.weight is \[\], config.json expects \[200, 64\]"),
        (unpack, "model.layers.0.mlp.experts.down_proj is not packed, expected MXFP4"),
    ],
)
def test_a_bad_folder_gives_one_sentence(hugging_face, tmp_path, run, damage, message):
    config = json.loads((hugging_face / "config.json").read_text())
    tensors = {theirs: array for theirs, _, array in weights()}
    damage(config, tensors)
    status, out, err = run(write(tmp_path, config, tensors), "--tokens", 1)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"gpt_oss.py: .*{message}.*\n", err), err
    assert str(tmp_path) in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", 200], "the prompt must be of tokens from 0 to 199, found [200]"),
        (["--tokens", -1], "the prompt must be of tokens from 0 to 199, found [-1]"),
        (["--tokens", 1, "--count", 0], "--count must be at least 1, --temperature and --seed at least 0"),
        (["--tokens", 1, "--temperature", "nan"], "--count must be at least 1, --temperature and --seed at least 0"),
        (["--prompt", "one"], "tokenizer.json is missing: put it there, or give --tokens instead of --prompt"),
        ([], "one of the arguments --prompt --tokens is required"),
    ],
)
def test_bad_prompts_and_options_are_refused(hugging_face, run, arguments, message):
    status, out, err = run(hugging_face, *arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_no_folder_and_no_tokenizers_are_said(original, tmp_path, run, monkeypatch):
    status, _, err = run(tmp_path / "none", "--tokens", 1)
    assert (status, err.count("\n")) == (2, 1)
    assert str(tmp_path / "none") in err
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "model.safetensors").symlink_to(original / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    status, _, err = run(tmp_path, "--prompt", "one")
    assert (status, err.count("\n")) == (2, 1)
    assert "python -m pip install 'mxfp4np[examples]'" in err


# Beside the real implementations


def assert_close(found, expected):
    """Compare logits at all positions, by the largest of each position."""
    error = np.abs(found - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
    assert error.shape == (len(PROMPT),)
    assert error.max() < 1e-3, error


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_logits_and_tokens_are_those_of_transformers(hugging_face):
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    dequantize = Mxfp4Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(hugging_face, quantization_config=dequantize, dtype=torch.float32)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}

    def logits_of(tokens):
        with torch.no_grad():
            return theirs(torch.tensor([tokens])).logits[0].numpy()

    ours = opened(hugging_face)
    assert_close(logits(ours, PROMPT), logits_of(PROMPT))
    tokens = list(gpt_oss.generate(ours, PROMPT, 64))
    assert tokens == without_cache(logits_of)
    assert tokens == theirs.generate(torch.tensor([PROMPT]), max_new_tokens=64, do_sample=False)[0, 70:].tolist()


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_logits_are_those_of_the_original_release(original):
    import torch
    from gpt_oss.torch.model import Transformer

    theirs = Transformer.from_checkpoint(str(original), torch.device("cpu")).float()
    with torch.no_grad():
        assert_close(logits(opened(original), PROMPT), theirs(torch.tensor(PROMPT)).numpy())


@pytest.mark.peers
def test_text_goes_through_the_tokenizer(hugging_face, run, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    for file in hugging_face.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tokens = without_cache_of(hugging_face, 12)
    words = {f"w{i}": i for i in range(200)}
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    status, _, err = run(tmp_path, "--prompt", "w1")
    assert (status, err.count("\n")) == (2, 1)
    assert f"{path} is no tokenizer: " in err

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    prompt = " ".join(f"w{token}" for token in PROMPT)
    status, out, _ = run(tmp_path, "--prompt", prompt, "--count", 12)
    assert (status, out.split()) == (0, [f"w{token}" for token in tokens])

    words["<|return|>"] = words.pop(f"w{tokens[4]}")  # generation ends there
    tokenizer.model = models.WordLevel(words, unk_token="w0")
    tokenizer.save(str(path))
    status, out, _ = run(tmp_path, "--prompt", prompt, "--count", 12)
    assert (status, out.split()) == (0, [*(f"w{token}" for token in tokens[:4]), "<|return|>"])
