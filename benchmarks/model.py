"""One layer of gpt-oss-20b in `examples/gpt_oss.py`, from a mapped file, in milliseconds a token.

Its limit is to read what a token needs: the packed bytes of its experts, and the float32 matrices of attention. Beside
it, transformers with dequantised weights, where it is installed: its experts and its layer, from the same file. All use
as many threads as the process has CPUs; for fewer, set ``MXFP4NP_NUM_THREADS`` and ``OPENBLAS_NUM_THREADS``.
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from itertools import chain, cycle, islice
from operator import truediv
from pathlib import Path
from statistics import median

import ml_dtypes
import numba
import numpy as np

import mxfp4np
from benchmarks.timing import Row, amount
from examples import gpt_oss
from mxfp4np.backends.threads import default_num_threads
from mxfp4np.cli.timing import Run, in_threads, in_turn

CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_hidden_layers": 1,
    "vocab_size": 1024,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}
EXPERTS, TOKEN, PROMPT = "experts, one token", "layer, one token", "layer, each token of a prompt"
LIMIT = "limit: reading their weights"
CONTEXT = 256  # tokens in the cache before the one that is timed, and of the prompt
CHUNK = 1 << 17  # words of 8 bytes that a thread reads at a time


def tensors() -> Iterator[tuple[str, np.ndarray]]:
    """Yield random tensors under Hugging Face's names."""
    rng = np.random.default_rng(0)
    sizes = ("hidden_size", "intermediate_size", "num_local_experts", "vocab_size", "num_attention_heads")
    hidden, inner, experts, vocab, heads = (CONFIG[size] for size in sizes)
    queries, keys = heads * CONFIG["head_dim"], CONFIG["num_key_value_heads"] * CONFIG["head_dim"]

    def normal(name: str, *shape: int) -> tuple[str, np.ndarray]:
        return name, (rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5).astype(ml_dtypes.bfloat16)

    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"model.layers.0.{name}.weight", np.ones(hidden, ml_dtypes.bfloat16)
    yield "model.norm.weight", np.ones(hidden, ml_dtypes.bfloat16)
    yield normal("model.embed_tokens.weight", vocab, hidden)
    yield normal("lm_head.weight", vocab, hidden)
    yield normal("model.layers.0.self_attn.sinks", heads)
    for name, rows, columns in (
        ("self_attn.q_proj", queries, hidden),
        ("self_attn.k_proj", keys, hidden),
        ("self_attn.v_proj", keys, hidden),
        ("self_attn.o_proj", hidden, queries),
        ("mlp.router", experts, hidden),
    ):
        yield normal(f"model.layers.0.{name}.weight", rows, columns)
        yield normal(f"model.layers.0.{name}.bias", rows)
    for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        stem = f"model.layers.0.mlp.experts.{name}"
        yield f"{stem}_blocks", rng.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        yield f"{stem}_scales", rng.integers(117, 121, (experts, rows, columns // 32), np.uint8)
        yield normal(f"{stem}_bias", experts, rows)


@numba.njit(nogil=True)
def xor(words):
    """Return the exclusive or of an array: a loop that does nothing but read."""
    total = np.uint64(0)
    for i in range(words.size):
        total ^= words[i]
    return total


def read(arrays: list[np.ndarray], threads: int) -> None:
    """Read contiguous arrays."""
    words = [array.reshape(-1).view(np.uint64) for array in arrays]
    chunks = [array[i : i + CHUNK] for array in words for i in range(0, len(array), CHUNK)]
    in_threads(lambda begin, _: xor(chunks[begin]), len(chunks), 1, threads)


def ours(folder: Path, threads: int) -> dict[tuple[str, str], Run]:
    """Return what the example does, and the reading that it cannot do without, by case and variant."""
    model = gpt_oss.Model(mxfp4np.Checkpoint(folder))
    c, layer, caches = model.config, model.layers[0], model.caches()
    experts = [[*layer.gate_up[e].inputs, *layer.down[e].inputs] for e in range(c.experts)]
    chosen = [list(chain(*experts[e : e + c.top_k])) for e in range(0, c.experts, c.top_k)]
    for arrays in chosen:
        read(arrays, threads)  # so that no run waits for pages to be mapped
    hidden, tokens, prompt = inputs(c.hidden), cycle(range(c.vocab)), list(range(CONTEXT))
    packed, weights = cycle(chosen), cycle([[layer.qkv, layer.out, *arrays] for arrays in chosen])
    model.forward(prompt, caches)
    return {
        (EXPERTS, LIMIT): lambda: read(next(packed), threads),
        (EXPERTS, "this library"): lambda: model.experts(next(hidden), layer),
        (TOKEN, LIMIT): lambda: read(next(weights), threads),
        (TOKEN, "this library"): lambda: model.forward([next(tokens)], caches),
        (PROMPT, "this library"): lambda: model.forward(prompt, model.caches()),
    }


def inputs(size: int) -> Iterator[np.ndarray]:
    """Yield hidden states of one token, always of another one, so that the router chooses other experts."""
    return cycle(np.random.default_rng(1).standard_normal((64, 1, size), np.float32))


def transformers(folder: Path, threads: int, dtype: str) -> dict[tuple[str, str], Run]:
    """Return what transformers does with dequantised weights, nothing if it is not installed."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, Mxfp4Config
    except ImportError:
        return {}
    torch.set_num_threads(threads)
    torch.set_grad_enabled(mode=False)
    kind = getattr(torch, dtype)
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True), dtype=kind)
    model, size = whole.model, CONFIG["hidden_size"]
    hidden = cycle([torch.from_numpy(x)[None].to(kind) for x in islice(inputs(size), 64)])
    prompt = torch.arange(CONTEXT)[None]
    cache = model(prompt, use_cache=True).past_key_values
    tokens = cycle(torch.arange(CONFIG["vocab_size"])[:, None, None])
    runs: dict[str, Run] = {
        EXPERTS: lambda: model.layers[0].mlp(next(hidden)),
        TOKEN: lambda: model(next(tokens), past_key_values=cache, use_cache=True),
        PROMPT: lambda: model(prompt, use_cache=True),
    }
    return {(case, f"transformers, {dtype}"): run for case, run in runs.items()}


def measure(options: Namespace) -> list[Row]:
    """Return a row for each case and variant, in milliseconds a token."""
    threads = default_num_threads()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        mxfp4np.save_file(tensors(), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIG))
        runs = ours(folder, threads)
        for dtype in ("bfloat16", "float32"):
            runs |= transformers(folder, threads, dtype)
        taken = dict(zip(runs, in_turn(list(runs.values()), options.rounds), strict=True))
    rows = []
    for case, variant in sorted(taken, key=lambda key: (EXPERTS, TOKEN, PROMPT).index(key[0])):
        seconds, limit = taken[case, variant], taken.get((case, LIMIT))
        values = [1e3 * s / (CONTEXT if case == PROMPT else 1) for s in seconds]
        times = median(map(truediv, seconds, limit)) if limit else None
        rows.append({**amount(case, variant, threads, values, "ms"), "times": times})
    return rows
