"""gpt-oss in NumPy: the whole forward pass, and text from it, over experts that stay packed in the mapped file.

    python -m pip install 'mxfp4np[examples]'
    python examples/gpt_oss.py gpt-oss-20b --prompt "The capital of France is"
    python examples/gpt_oss.py gpt-oss-20b/original --tokens 976 9029 328 10128 382 --temperature 0.7

The folder is Hugging Face's or the original release's. Begin to read at `Model.forward`. There is one sequence, no
batch: arrays begin with their T tokens, except in attention, where heads come first. S is the number of positions that
are attended to, these T the last of them.

The experts, nine tenths of the weights, are never decoded as a whole: `mxfp4np.linear` multiplies with views of the
file, and only the experts that the router chooses are read. Attention and unembedding are stored as bfloat16, for which
NumPy has no fast product. They are converted to float32 once, when the model is opened: 5 GB for gpt-oss-20b. To
convert them tile by tile in each product would save that memory, but takes as long again as the product in one thread;
and NumPy converts in one thread, while it multiplies in all. The embedding, of which a token needs one row, stays a
view of the file.

A chat is text in OpenAI's harmony format: "<|start|>user<|message|>Hello<|end|><|start|>assistant".
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mxfp4np

Floats = NDArray[np.float32]

CHUNK = 256  # tokens of a prompt in one forward pass: experts are decoded once for all, and attention scores stay small

TENSORS = {
    # Name here: name in Hugging Face's folders, in the original release (N is the layer), and sizes, as in `Config`.
    "embedding": ("model.embed_tokens.weight", "embedding.weight", "vocab hidden"),
    "attention_norm": ("model.layers.N.input_layernorm.weight", "block.N.attn.norm.scale", "hidden"),
    "qkv": ("model.layers.N.self_attn.{qkv}_proj.weight", "block.N.attn.qkv.weight", "qkv hidden"),
    "qkv_bias": ("model.layers.N.self_attn.{qkv}_proj.bias", "block.N.attn.qkv.bias", "qkv"),
    "sinks": ("model.layers.N.self_attn.sinks", "block.N.attn.sinks", "heads"),
    "out": ("model.layers.N.self_attn.o_proj.weight", "block.N.attn.out.weight", "hidden queries"),
    "out_bias": ("model.layers.N.self_attn.o_proj.bias", "block.N.attn.out.bias", "hidden"),
    "mlp_norm": ("model.layers.N.post_attention_layernorm.weight", "block.N.mlp.norm.scale", "hidden"),
    "router": ("model.layers.N.mlp.router.weight", "block.N.mlp.gate.weight", "experts hidden"),
    "router_bias": ("model.layers.N.mlp.router.bias", "block.N.mlp.gate.bias", "experts"),
    "gate_up": ("model.layers.N.mlp.experts.gate_up_proj", "block.N.mlp.mlp1_weight", "experts gate_up hidden"),
    "gate_up_bias": ("model.layers.N.mlp.experts.gate_up_proj_bias", "block.N.mlp.mlp1_bias", "experts gate_up"),
    "down": ("model.layers.N.mlp.experts.down_proj", "block.N.mlp.mlp2_weight", "experts hidden intermediate"),
    "down_bias": ("model.layers.N.mlp.experts.down_proj_bias", "block.N.mlp.mlp2_bias", "experts hidden"),
    "norm": ("model.norm.weight", "norm.scale", "hidden"),
    "unembedding": ("lm_head.weight", "unembedding.weight", "vocab hidden"),
}

FIXED = {
    # Values of config.json for which this program is written; the original release does not state them.
    "model_type": "gpt_oss",
    "rope_type": "yarn",
    "truncate": False,
    "rms_norm_eps": 1e-5,
    "swiglu_alpha": 1.702,
    "hidden_act": "silu",
}


def key(*names: str) -> Any:
    """Return a field with its name in config.json: Hugging Face's, and the original release's if that differs."""
    return field(metadata={"keys": names})


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a model."""

    layers: int = key("num_hidden_layers")
    vocab: int = key("vocab_size")
    hidden: int = key("hidden_size")
    heads: int = key("num_attention_heads")
    kv_heads: int = key("num_key_value_heads")
    head_dim: int = key("head_dim")
    window: int = key("sliding_window")
    experts: int = key("num_local_experts", "num_experts")
    top_k: int = key("num_experts_per_tok", "experts_per_token")
    intermediate: int = key("intermediate_size")
    swiglu_limit: float = key("swiglu_limit")
    rope_theta: float = key("rope_theta")
    yarn_factor: float = key("factor", "rope_scaling_factor")
    yarn_context: int = key("original_max_position_embeddings", "initial_context_length")
    yarn_slow: float = key("beta_slow", "rope_ntk_alpha")
    yarn_fast: float = key("beta_fast", "rope_ntk_beta")

    @classmethod
    def of(cls, checkpoint: mxfp4np.Checkpoint) -> Config:
        """Return what the config.json of a checkpoint says, in either layout."""
        config, path = dict(checkpoint.config), checkpoint.folder / "config.json"
        if not config:
            raise FileNotFoundError(f"{path} is missing or empty: it has the sizes of the model")
        for nested in ("rope_scaling", "rope_parameters"):  # before and since transformers 5
            if isinstance(config.get(nested), dict):
                config.update(config[nested])
        kinds = config.get("layer_types")
        windows = ["sliding_attention", "full_attention"] * len(kinds) if isinstance(kinds, list) else []
        for name, expected in {**FIXED, "layer_types": windows[: len(windows) // 2]}.items():
            if config.get(name, expected) != expected:
                raise ValueError(f"{path}: {name} is {config[name]!r}, expected {expected!r}")
        values = {}
        for item in fields(cls):
            keys = item.metadata["keys"]
            value = values[item.name] = next((config[key] for key in keys if key in config), None)
            if not isinstance(value, int if item.type == "int" else int | float) or not 0 < value < math.inf:
                raise ValueError(f"{path}: expected a positive {item.type} as {' or '.join(keys)}, found {value!r}")
        c = cls(**values)
        fits = c.heads % c.kv_heads == c.head_dim % 2 == 0 and c.top_k <= c.experts
        if not fits or c.yarn_fast <= c.yarn_slow or c.rope_theta <= 1:
            raise ValueError(f"{path}: these do not fit each other: {c}")
        return c


class Cache:
    """Keys and values of one layer, of all positions, or of those that a sliding window can still reach.

    The buffer is [2, kv_heads, room, head_dim]. When it is full, what is out of reach is dropped and the rest moves to
    the front of a new one, with room for as much again.
    """

    def __init__(self, config: Config, window: float) -> None:
        self.reach = window - 1  # positions before its own that a token attends to; infinite without a window
        self.length = 0
        self.seen = 0
        self.buffer: Floats = np.empty((2, config.kv_heads, 0, config.head_dim), np.float32)

    def extend(self, new: Floats) -> Floats:
        """Append [2, kv_heads, T, head_dim]; return the S positions that these T attend to, themselves the last."""
        count = new.shape[2]
        if self.length + count > self.buffer.shape[2]:
            kept = self.buffer[:, :, max(0, self.length - self.reach) : self.length]
            self.length = kept.shape[2]
            self.buffer = np.empty((*new.shape[:2], 2 * (self.length + count), new.shape[3]), np.float32)
            self.buffer[:, :, : self.length] = kept
        self.buffer[:, :, self.length : self.length + count] = new
        self.length += count
        self.seen += count
        return self.buffer[:, :, max(0, self.length - count - self.reach) : self.length]


def rms_norm(x: Floats, weight: Floats) -> Floats:
    """Scale each token to a mean square of 1, then each channel by its weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def swiglu(x: Floats, limit: float) -> Floats:
    """Return ``(up + 1) * gate * sigmoid(1.702 * gate)``, of gate and up that alternate.

    The gate is clamped from above only: from below, the sigmoid takes it to 0.
    """
    gate, up = np.minimum(x[..., 0::2], limit), np.clip(x[..., 1::2], -limit, limit)
    sigmoid = 0.5 + 0.5 * np.tanh(0.5 * 1.702 * gate)  # 1 / (1 + exp(-x)), but never overflows
    return (up + 1) * gate * sigmoid


def yarn_frequencies(c: Config) -> tuple[NDArray[np.float64], float]:
    """Return the angle of each pair of channels from one position to the next, and the factor of cosines and sines.

    YaRN (https://arxiv.org/abs/2309.00071) extends the context that the model was trained on by a factor. Pairs that
    made at least `yarn_fast` turns within it stay as they are; those that made fewer than `yarn_slow` turn more
    slowly by that factor; those between are a mixture. gpt-oss does not round where these ranges begin and end.
    """
    half = c.head_dim // 2
    frequencies = c.rope_theta ** -(np.arange(half) / half)

    def pair_of(turns: float) -> float:
        return half * math.log(c.yarn_context / (turns * 2 * math.pi)) / math.log(c.rope_theta)

    low, high = pair_of(c.yarn_fast), pair_of(c.yarn_slow)
    slowed = np.clip((np.arange(half) - low) / (high - low), 0, 1)
    return frequencies * (1 - slowed + slowed / c.yarn_factor), 0.1 * math.log(c.yarn_factor) + 1


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate channels i and i + head_dim / 2 of each head, [heads, T, head_dim], by the angles of their positions."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Model:
    """A model whose weights are those of an open checkpoint."""

    def __init__(self, checkpoint: mxfp4np.Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = c = Config.of(checkpoint)
        self.embedding = checkpoint[self._find("embedding")[0]]
        self.layers = [self._layer(i) for i in range(c.layers)]
        self.norm, self.unembedding = self._load("norm"), self._load("unembedding")
        self.frequencies, self.concentration = yarn_frequencies(c)

    def forward(self, tokens: Sequence[int], caches: list[Cache]) -> Floats:
        """Append tokens to the sequence in the caches, and return their last hidden states, [T, hidden]."""
        angles = np.outer(caches[0].seen + np.arange(len(tokens)), self.frequencies)
        rotation = [(self.concentration * f(angles)).astype(np.float32) for f in (np.cos, np.sin)]
        x = self.embedding[np.asarray(tokens)].astype(np.float32)
        for layer, cache in zip(self.layers, caches, strict=True):
            x += self.attention(rms_norm(x, layer.attention_norm), layer, cache, rotation)
            x += self.experts(rms_norm(x, layer.mlp_norm), layer)
        return rms_norm(x, self.norm)

    def logits(self, hidden: Floats) -> Floats:
        """Return the logits of the next token, [.., vocab], after hidden states, [.., hidden]."""
        return hidden @ self.unembedding.T

    def caches(self) -> list[Cache]:
        """Return the caches of an empty sequence."""
        return [Cache(self.config, layer.window) for layer in self.layers]

    def attention(self, x: Floats, layer: Any, cache: Cache, rotation: Sequence[Floats]) -> Floats:
        """Let each token of x, [T, hidden], attend to itself and those before it."""
        c, count = self.config, len(x)
        qkv = (x @ layer.qkv.T + layer.qkv_bias).reshape(count, -1, c.head_dim).swapaxes(0, 1)
        q, k, v = np.split(qkv, [c.heads, c.heads + c.kv_heads])  # [heads, T, head_dim]
        keys, values = cache.extend(np.stack([rotate(k, *rotation), v]))  # [kv_heads, S, head_dim]

        # Consecutive query heads share a key head: they are more rows of its product.
        q = rotate(q, *rotation).reshape(c.kv_heads, -1, c.head_dim)
        scores = (q @ keys.swapaxes(1, 2)).reshape(c.heads, count, -1) / math.sqrt(c.head_dim)
        positions = np.arange(scores.shape[-1])
        distance = positions[-count:, None] - positions
        scores += np.where((distance >= 0) & (distance < layer.window), np.float32(0), np.float32(-np.inf))

        # Softmax with one more score for each head, its sink, which has no value: it only takes weight from the others.
        sinks = layer.sinks[:, None, None]
        top = np.maximum(scores.max(axis=-1, keepdims=True), sinks)
        weights = np.exp(np.subtract(scores, top, out=scores), out=scores)
        weights /= weights.sum(axis=-1, keepdims=True) + np.exp(sinks - top)
        heads = weights.reshape(c.kv_heads, -1, len(positions)) @ values
        heads = heads.reshape(c.heads, count, c.head_dim).swapaxes(0, 1).reshape(count, -1)
        return heads @ layer.out.T + layer.out_bias

    def experts(self, x: Floats, layer: Any) -> Floats:
        """Pass each token of x, [T, hidden], through its `top_k` experts, and add their results, weighted."""
        router = x @ layer.router.T + layer.router_bias
        chosen = np.argsort(-router, axis=-1, kind="stable")[:, : self.config.top_k]  # [T, top_k]
        scores = np.take_along_axis(router, chosen, axis=-1)  # the highest first
        weights = np.exp(scores - scores[:, :1])
        weights /= weights.sum(axis=-1, keepdims=True)
        result = np.zeros_like(x)
        for expert in np.unique(chosen):  # each is read once, for all tokens that chose it
            token, rank = np.nonzero(chosen == expert)
            gate_up = mxfp4np.linear(x[token], layer.gate_up[expert], layer.gate_up_bias[expert])
            y = swiglu(gate_up, self.config.swiglu_limit)
            y = mxfp4np.linear(y, layer.down[expert], layer.down_bias[expert])
            result[token] += weights[token, rank, None] * y
        return result

    def _layer(self, number: int) -> SimpleNamespace:
        """Return the weights of a layer by their names in `TENSORS`, and its window, which every second layer has."""
        names = [name for name, stored in TENSORS.items() if ".N." in stored[0]]
        window = self.config.window if number % 2 == 0 else math.inf
        return SimpleNamespace(window=window, **{name: self._load(name, number) for name in names})

    def _load(self, name: str, layer: int = 0) -> Any:
        stored = self._find(name, layer)
        if name in ("gate_up", "down"):
            return self.checkpoint.packed(*stored)
        return np.concatenate([self.checkpoint[part] for part in stored], dtype=np.float32, casting="unsafe")

    def _find(self, name: str, layer: int = 0) -> list[str]:
        """Return the stored names of a tensor, three for the queries, keys and values of Hugging Face."""
        c, (hugging_face, original, sizes) = self.config, TENSORS[name]
        stored = original if "embedding.weight" in self.checkpoint else hugging_face
        stored = stored.replace(".N.", f".{layer}.")
        parts = [stored.replace("{qkv}", x) for x in "qkv"] if "{qkv}" in stored else [stored]
        shapes = [self.checkpoint.info(part).shape for part in parts]

        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        size = vars(c) | {"queries": queries, "qkv": queries + 2 * keys, "gate_up": 2 * c.intermediate}
        rows, *columns = (size[word] for word in sizes.split())
        if sum(shape[0] for shape in shapes if shape) != rows or {shape[1:] for shape in shapes} != {tuple(columns)}:
            folder, found = self.checkpoint.folder, ", ".join(map(str, map(list, shapes)))
            raise ValueError(f"{folder}: {stored} is {found}, config.json expects {[rows, *columns]}")
        if name in ("gate_up", "down") and (found := self.checkpoint.info(stored).format) != "MXFP4":
            raise ValueError(f"{self.checkpoint.folder}: {stored} is {found or 'not packed'}, expected MXFP4")
        return parts


def generate(model: Model, prompt: Sequence[int], count: int, temperature: float = 0.0, seed: int = 0) -> Iterator[int]:
    """Yield ``count`` tokens that follow a prompt: the likeliest ones, or sampled at a temperature above 0."""
    rng, caches = np.random.default_rng(seed), model.caches()
    *chunks, tokens = [prompt[i : i + CHUNK] for i in range(0, len(prompt), CHUNK)]
    for chunk in chunks:
        model.forward(chunk, caches)
    for _ in range(count):
        logits = model.logits(model.forward(tokens, caches)[-1])
        if temperature > 0:  # the largest of logits with Gumbel noise is a sample of their softmax
            logits = logits / temperature + rng.gumbel(size=len(logits))
        tokens = [int(logits.argmax())]
        yield tokens[0]


def open_tokenizer(path: Path) -> Any:
    """Return a tokenizer of the tokenizers package."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: put it there, or give --tokens instead of --prompt")
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))
    except ImportError:
        raise ImportError("text needs the tokenizers package: python -m pip install 'mxfp4np[examples]'") from None
    except Exception as error:  # noqa: BLE001  (it raises nothing narrower)
        raise ValueError(f"{path} is no tokenizer: {error}") from None


def main() -> None:
    """Print the tokens that follow a prompt as they come, then the speed and the peak of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT")
    prompts.add_argument("--tokens", metavar="ID", type=int, nargs="+", help="the prompt as token ids; prints ids")
    parser.add_argument("--count", type=int, default=64, help="tokens to generate at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling (default: 0, the likeliest token)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    options = parser.parse_args()
    if options.count < 1 or not 0 <= options.temperature < math.inf or options.seed < 0:
        parser.error("--count must be at least 1, --temperature and --seed at least 0")
    try:
        checkpoint = mxfp4np.Checkpoint(options.folder)
        tokenizer = None if options.tokens else open_tokenizer(checkpoint.folder / "tokenizer.json")
        model = Model(checkpoint)
        prompt = options.tokens or tokenizer.encode(options.prompt).ids
        if not prompt or not 0 <= min(prompt) <= max(prompt) < model.config.vocab:
            raise ValueError(f"the prompt must be of tokens from 0 to {model.config.vocab - 1}, found {prompt}")  # noqa: TRY301
    except (mxfp4np.MXFP4Error, ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")

    stop = set()  # without a tokenizer, all tokens that were asked for are generated
    if tokenizer:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        stop = {tokenizer.token_to_id(text) for text in ("<|return|>", "<|call|>", "<|endoftext|>")}
    times = [time.perf_counter()]
    for token in generate(model, prompt, options.count, options.temperature, options.seed):
        times.append(time.perf_counter())
        print((stream.step(tokenizer, token) or "") if tokenizer else f"{token} ", end="", flush=True)
        if token in stop:
            break
    print()
    reading, generating = times[1] - times[0], times[-1] - times[1]
    print(
        f"{len(prompt)} tokens of the prompt: {len(prompt) / reading:.2f} tokens/s; "
        f"{len(times) - 1} generated: {(len(times) - 2) / (generating or math.inf):.2f} tokens/s" + peak_memory(),
        file=sys.stderr,
    )


def peak_memory() -> str:
    """Return the peak of memory as text, nothing where the system does not tell, as on Windows."""
    try:
        import resource
    except ImportError:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"; peak memory {peak / 1e9:.2f} GB, pages read of the mapped file among them"


if __name__ == "__main__":
    main()
