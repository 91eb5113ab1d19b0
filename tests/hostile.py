"""Hostile checkpoints, made from a seed: structured lies, and mutations of what is true; and what must hold for each.

``python tests/hostile.py FIRST COUNT`` runs cases and prints what is wrong, a line each; with ``--keep FOLDER`` it
leaves the files of the first case there.
"""

import contextlib
import faulthandler
import io
import json
import math
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

import mxfp4np
from mxfp4np import BackendUnavailableError, CheckpointError, MXFP4Error
from mxfp4np.cli import main

DATA = Path(__file__).parent / "data"

SECONDS = 2.0
"""Of the processor, for each command."""

BYTES = 64 << 20
"""Of memory for each command, beside twice the files."""

LINE = 4096
"""Characters that a command may print for each tensor."""

# Values at their limits

LARGE = [2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1]
NUMBERS = [0, 1, 2, 31, 32, 33, -1, 2**64, 10**400, 1.5, 1e300, float("nan"), float("inf"), True, None, "7", [], {}]
NAMES = [
    "",
    "w",
    "\x1b[31mred\x1b]0;title\x07",
    "a\nb\r\tc\0d",
    "\u202egnp.exe",
    "\ud800",
    "__metadata__",
    "../../etc/passwd",
    "x" * 3000,
    "0.1.2.3",
    "%s{0}{name!r}",
    "-o",
    "model.layers.0.mlp.mlp1_weight/gate",
]
PARTS = [  # suffixes of codes and scales, their dtypes, and the axes of codes after the rows
    (".blocks", ".scales", "U8", "U8", (2, 16)),
    ("_blocks", "_scales", "U8", "U8", (2, 16)),
    (".weight_packed", ".weight_scale", "U8", "U8", (32,)),
    (".weight", ".weight_scale", "U8", "U8", (32,)),
    (".weight", ".scale", "I8", "F8_E8M0", (32,)),
    (".weight", ".scales", "U32", "U8", (8,)),
    ("._weight_qdata", "._weight_scale", "U8", "F8_E8M0", (32,)),
    (".weight", ".weight.scales", "U8", "U8", (32,)),
    (".weight", ".weight_scale_inv", "F8_E4M3", "F32", (64,)),
    (".qweight", ".g_idx", "I32", "I32", (4,)),
    (".weight", ".biases", "U32", "F16", (8,)),
]
SIZES = {"U8": 1, "I8": 1, "F8_E8M0": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "U32": 4, "I64": 8}
DTYPES = [*SIZES, "F4", "F6_E2M3", "C64", "BOOL", "F99", "", 7, None, "U8\0"]
FILES = [
    "a.safetensors",
    "./b.safetensors",
    "gone.safetensors",
    "../x",
    "/etc/passwd",
    "x\0y",
    "y" * 300,
    "\ud800",
    ".",
]


class Raw(str):
    """JSON that is not made by `dumps`."""

    __slots__ = ()


class Pairs(list):
    """An object of JSON that may have a name twice."""


def dumps(value):
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ",".join(f"{json.dumps(name)}:{dumps(inner)}" for name, inner in pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


def text_of(value):
    return dumps(value).encode("utf-8", "surrogatepass")


def hostile_json(rng):
    """Return JSON of a kind that nobody expects."""
    depth = rng.choice([3, 70, 500, 20_000])
    many = rng.choice([10, 1000, 50_000])
    return rng.choice(
        [
            rng.choice(NUMBERS),
            rng.choice(NAMES),
            Raw("[" * depth + "]" * depth),
            Raw('{"a":' * depth + "1" + "}" * depth),
            Raw("1" * rng.choice([10, 5000])),
            Raw(rng.choice(["", "{", '{"a":1,}', "nul", '"\\ud800"', "\ufeff{}", "// no"])),
            Raw("[" + ",".join(["[]"] * many) + "]"),
            Pairs([("a", 1), ("a", 2)]),
            {rng.choice(NAMES): rng.choice(NUMBERS)},
            ["[" * many],
            [f"{i:x}" for i in range(many)],
        ]
    )


# Safetensors


def name_of(rng):
    if rng.random() < 0.02:
        return rng.choice("ab.") * rng.choice([30_000, 300_000])
    return rng.choice(NAMES) if rng.random() < 0.1 else f"model.layers.{rng.randrange(3)}.w{rng.randrange(9)}"


def tensors_of(rng):
    """Return entries of a header that are true, mostly: name, dtype, shape."""
    found = {}
    for _ in range(rng.choice([0, 1, 2, 3, 300 if rng.random() < 0.03 else 4])):
        name = name_of(rng)
        if rng.random() < 0.6:
            codes, scales, codes_dtype, scales_dtype, axes = rng.choice(PARTS)
            name = rng.choice([name, "x.mlp1_weight", "x.gate_up_proj"])
            lead = rng.choice([(), (4,), (2, 3), (0,), (1, 128)])
            groups = 2
            found[name + codes] = (codes_dtype, (*lead, *axes))
            found[name + scales] = (scales_dtype, rng.choice([(*lead, groups)] * 9 + [(), lead, (1,), (*lead, 3)]))
            if rng.random() < 0.3:
                found[rng.choice(["x.mlp1_bias", "x.gate_up_proj_bias", name + ".weight_scale_2"])] = (
                    "BF16",
                    rng.choice([(), (4,), (2, 3)]),
                )
        else:
            found[name] = (rng.choice(list(SIZES)), rng.choice([(), (3,), (2, 5), (0,), (1,) * 60, (0, 7)]))
    return found


def header_of(rng, tensors):
    """Return pairs of a header, with lies, and the number of bytes of data."""
    entries, end = Pairs(), 0
    if rng.random() < 0.3:
        documents = {name: dumps(hostile_json(rng)) for name in rng.sample(sorted(tensors), min(1, len(tensors)))}
        entries.append(("__metadata__", {"format": "pt", "tensor_names": dumps(hostile_json(rng)), **documents}))
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + SIZES[dtype] * math.prod(shape)
        entries.append((name, {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}))
    for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 1, 2])):
        if not entries or not isinstance(entries[at := rng.randrange(len(entries))][1], dict):
            continue
        name, entry = entries[at]
        lie = rng.choice(["dtype", "shape", "data_offsets", "twice", "name", "key", "entry", "axis", "offset", "axes"])
        if lie == "twice":
            entries.insert(rng.randrange(len(entries)), (name, entry))
        elif lie == "name":
            entries[at] = (name_of(rng), entry)
        elif lie == "entry":
            entries[at] = (name, hostile_json(rng))
        elif lie == "key":
            entries[at] = (name, Pairs([*entry.items(), (rng.choice([*entry, "more"]), hostile_json(rng))]))
        elif lie == "axes":
            entries[at] = (name, {**entry, "shape": [1] * rng.choice([64, 65, 1000])})
        elif lie == "axis":
            shape = [*tensors.get(name, ("", (1,)))[1], rng.choice([*LARGE, *NUMBERS])]
            entries[at] = (name, {**entry, "shape": rng.sample(shape, len(shape))})
        elif lie == "offset":
            entries[at] = (name, {**entry, "data_offsets": [rng.choice([*LARGE, *NUMBERS, 0]) for _ in "ab"]})
        else:
            entries[at] = (name, {**entry, lie: rng.choice(DTYPES) if lie == "dtype" else hostile_json(rng)})
    return entries, end


def safetensors_bytes(rng, tensors):
    entries, end = header_of(rng, tensors)
    text = text_of(entries)
    text += b" " * (-len(text) % 8)
    length = len(text) if rng.random() < 0.95 else rng.choice([0, 1, len(text) + 1, 100_000_001, *LARGE])
    data = rng.randbytes(end + rng.choice([0] * 19 + [-1, 1, 1000]) if end else 0)
    return length.to_bytes(8, "little") + text + data


# GGUF


def gguf_text(text):
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return len(data).to_bytes(8, "little") + data


def gguf_array(rng):
    kind = rng.choice([0, 4, 7, 8, 9, 12, 13])
    count = rng.choice([0, 1, 3])
    claimed = count if rng.random() < 0.6 else rng.choice([2**60, 2**62, *LARGE])
    if kind == 9:
        depth = rng.choice([1, 3, 1000, 30_000])
        return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, claimed % 2**64) + bytes(4 * count)
    item = gguf_text(rng.choice(NAMES[:3])) if kind == 8 else bytes({0: 1, 4: 4, 7: 1, 12: 8}.get(kind, 1))
    return struct.pack("<IQ", kind, claimed) + item * count


def gguf_bytes(rng):
    values = [b"".join([gguf_text("general.architecture"), struct.pack("<I", 8), gguf_text("llama")])]
    alignment = 32
    if rng.random() < 0.2:
        alignment = rng.choice([1, 2, 8, 32, 64, 0, 3, 2**31, 2**32 - 1])
        values.append(gguf_text("general.alignment") + struct.pack("<II", 4, alignment))
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        kind = rng.choice([0, 1, 5, 6, 7, 8, 9, 9, 9, 10, 12, 13, 2**32 - 1])
        data = gguf_array(rng) if kind == 9 else gguf_text(name_of(rng)) if kind == 8 else rng.randbytes(8)
        size = {0: 1, 1: 1, 5: 4, 6: 4, 7: 1}.get(kind, len(data))
        key = rng.choice(["tokenizer.ggml.tokens", "split.count", "general.architecture", name_of(rng)])
        values.append(gguf_text(key) + struct.pack("<I", kind) + data[:size])
    table, end = [], 0
    for i in range(rng.choice([0, 1, 2, 3, 4])):
        kind, size, nbytes = rng.choice([(0, 1, 4), (1, 1, 2), (30, 1, 2), (8, 32, 34), (39, 32, 17), (99, 1, 1)])
        shape = [size * rng.choice([1, 2]), *rng.choice([[], [3], [2, 3], [0], [1] * 5])]
        offset, name = end, f"blk.{i}.weight" if rng.random() < 0.8 else name_of(rng)
        end += -(-math.prod(shape) // size * nbytes // 32) * 32
        axes = len(shape)
        lie = rng.choice([*[""] * 24, "offset", "axis", "axes", "kind", "name", "near"])
        if lie == "offset":
            offset = rng.choice([*LARGE, 0, 1, 32])
        elif lie == "near":
            offset = max(0, offset + rng.choice([-64, -32, 1, 32]))
        elif lie == "axis":
            shape[rng.randrange(len(shape))] = rng.choice([*LARGE, 0, 1, 33])
        elif lie == "axes":
            axes = rng.choice([0, 64, 65, 2**31])
        elif lie == "kind":
            kind = rng.choice([2, 7, 12, 20, 31, 40, 2**31])
        elif lie == "name":
            name = b"\xff\xfe" * 3
        dims = b"".join(struct.pack("<Q", n % 2**64) for n in shape)
        table.append(gguf_text(name) + struct.pack("<I", axes) + dims + struct.pack("<IQ", kind, offset))
    counts = [len(table), len(values)]
    if rng.random() < 0.1:
        counts[rng.randrange(2)] = rng.choice([0, 5, *LARGE])
    version = 3 if rng.random() < 0.95 else rng.choice([0, 1, 2, 4, 3 << 24, 2**32 - 1])
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(table)
    padding = -len(head) % alignment if 0 < alignment < 1000 else 0
    return head + bytes(padding) + rng.randbytes(max(0, end + rng.choice([0] * 9 + [-1])))


# What is beside files of tensors


def config_of(rng):
    """Return a config.json, or another document of a quantiser, with one value that nobody expects."""
    methods = ["quark", "modelopt", "mxfp4", "compressed-tensors", "fp8", "torchao", hostile_json(rng)]
    key = rng.choice(["ignore", "exclude", "modules_to_not_convert", "config_groups", "layer_quant_config", "dtype"])
    quantization = {
        "quant_method": rng.choice(methods),
        "dtype": rng.choice(["fp4", "mx"]),
        "quant_algo": rng.choice(["MXFP4", "\x1b[1mMXFP4", "int4"]),
        "mx_element_dtype": rng.choice(["fp6\x1b", "fp4"]),
        "num_bits": rng.choice([4, "\x1b[2J", [8] * 9]),
        key: hostile_json(rng),
    }
    if rng.random() < 0.2:
        quantization["layer_quant_config"] = dict.fromkeys(
            ["[" * 20_000, "*a" * 900, *("?*" * i for i in range(99))], 1
        )
    config = {
        "model_type": rng.choice(["gpt_oss", hostile_json(rng)]),
        "architectures": rng.choice([["GptOssForCausalLM"], hostile_json(rng)]),
        "text_config": rng.choice([{"dtype": "float32"}, hostile_json(rng)]),
        rng.choice(["quantization_config", "quantization", "compression_config"]): quantization,
    }
    return rng.choice([config, config, config, hostile_json(rng)])


def index_of(rng, half, tensors):
    weight_map = Pairs((name, "b.safetensors" if name in half else "a.safetensors") for name in tensors)
    if rng.random() < 0.2:
        weight_map = Pairs((name, rng.choice(FILES)) for name in tensors)
    if rng.random() < 0.2:
        weight_map.append((name_of(rng), rng.choice([*FILES, hostile_json(rng)])))
    metadata = hostile_json(rng) if rng.random() < 0.1 else {"total_size": -1}
    return {"metadata": metadata, "weight_map": weight_map if rng.random() < 0.95 else hostile_json(rng)}


def record_of(rng):
    patterns = [["*"], 5, ["*", [["*"]]], ["[" * 100_000], ["*a" * 5000], [f"{i}*" for i in range(2000)], "\x1b"]
    record = {"include": [], "exclude": [], "transpose": "auto", "dtype": "bfloat16"}
    for _ in range(rng.choice([0, 1, 2])):
        record[rng.choice(["include", "exclude", "drop", "transpose"])] = rng.choice([*patterns, hostile_json(rng)])
    return rng.choice([record, record, record, hostile_json(rng)])


def mutate(rng, data):
    """Return bytes that differ a little, above all near the beginning."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = int(len(data) * rng.random() ** rng.choice([1, 4]))
        how = rng.randrange(6)
        if how == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at : at + 8] = rng.choice(LARGE).to_bytes(8, "little")
        elif how == 2:
            del data[at:]
        elif how == 3:
            del data[at : at + rng.choice([1, 8, 100])]
        elif how == 4:
            data[at:at] = data[: rng.choice([1, 8, 100])]
        else:
            data[at : at + 4] = rng.choice([b"[[[[", b'"":0', b"\x1b[2J", b"\xff" * 4, b"1e99", b"-999"])
    return bytes(data)


SAMPLES = [
    path
    for path in sorted(DATA.rglob("model*"))
    if path.suffix in (".safetensors", ".gguf") and path.stat().st_size < 1 << 18
]


def make(folder, seed):
    """Write the case of a seed to a folder; return what is to be opened."""
    rng = random.Random(seed)
    kind = rng.choice(["safetensors", "safetensors", "uqff", "folder", "folder", "gguf", "gguf", "sample"])
    if kind == "sample":
        sample = rng.choice(SAMPLES)
        for path in sample.parent.glob("*.json"):
            shutil.copyfile(path, folder / path.name)
        path = folder / sample.name
        path.write_bytes(mutate(rng, sample.read_bytes()))
        return rng.choice([folder, path])
    if kind == "gguf":
        path = folder / "m.gguf"
        data = gguf_bytes(rng)
    elif kind == "folder":
        tensors = tensors_of(rng)
        half = {name: spec for i, (name, spec) in enumerate(tensors.items()) if i % 2}
        rest = tensors if rng.random() < 0.1 else {name: spec for name, spec in tensors.items() if name not in half}
        (folder / "b.safetensors").write_bytes(safetensors_bytes(rng, half))
        path = folder / "a.safetensors"
        data = safetensors_bytes(rng, rest)
        index = index_of(rng, half, tensors)
        if rng.random() < 0.6:
            (folder / "model.safetensors.index.json").write_bytes(text_of(index))
        for name in ("config.json", "hf_quant_config.json", "quant_model_description.json"):
            if rng.random() < (0.8 if name == "config.json" else 0.2):
                (folder / name).write_bytes(text_of(config_of(rng)))
    else:
        path = folder / f"m.{kind}"
        data = safetensors_bytes(rng, tensors_of(rng))
    path.write_bytes(mutate(rng, data) if rng.random() < 0.15 else data)
    if rng.random() < 0.3:
        (folder / ".mxfp4np.json").write_bytes(text_of(record_of(rng)))
    return folder if kind == "folder" or rng.random() < 0.2 else path


# What must hold


def memory(what):
    """Return bytes that this process has, or had at most since `reset_peak`."""
    with Path("/proc/self/status").open("rb") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


class Failures(list):
    def measure(self, what, nbytes, call):
        """Call a function; note what it does that it must not. Return what it returns, None after an error."""
        reset_peak()
        before, begin = memory(b"VmRSS"), time.process_time()
        result = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = call()
        except (MXFP4Error, ValueError, OSError):
            pass
        except BaseException as error:  # noqa: BLE001
            self.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        seconds, used = time.process_time() - begin, memory(b"VmHWM") - before
        if seconds > SECONDS:
            self.append(f"{what}: {seconds:.1f} s")
        if used > BYTES + 2 * nbytes:
            self.append(f"{what}: {used >> 20} MB of memory for files of {nbytes:,} bytes")
        return result


def read_all(path, mode):
    """Read everything, in each way; return the names of the tensors."""
    with mxfp4np.Checkpoint(path, io=mode) as checkpoint:
        names = list(checkpoint)
        for name in [*names, *(f"{name}/gate" for name in names)]:
            with contextlib.suppress(MXFP4Error):
                assert name in checkpoint or name.endswith("/gate")
                info = checkpoint.info(name)
                array = checkpoint[name]
                assert info.layout is None or array.shape == info.shape, f"{info.shape}, but {array.shape}"
        ends = {}
        for name, tensor in sorted(checkpoint._stored.items(), key=lambda item: item[1].offset):
            assert len(checkpoint.stored[name].tobytes()) == tensor.nbytes, f"{name!r} has not all of its bytes"
            if tensor.nbytes:
                assert ends.get(tensor.file.path, 0) <= tensor.offset, f"{name!r} overlaps another one"
                ends[tensor.file.path] = tensor.offset + tensor.nbytes
        with contextlib.suppress(CheckpointError):
            _ = checkpoint.config
        return names


def run_command(failures, nbytes, tensors, *arguments):
    out, err = io.StringIO(), io.StringIO()

    def call():
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                return main(list(map(str, arguments)))
            except SystemExit as error:
                return error.code

    status = failures.measure(arguments[0], nbytes, call)
    if status not in (0, 1, 2):
        failures.append(f"{arguments[0]}: status {status}")
    printed = out.getvalue() + err.getvalue()
    if "--json" in arguments:
        return
    if not printed.replace("\n", "").isprintable():
        failures.append(f"{arguments[0]}: prints control characters")
    if len(printed) > LINE * (tensors + 4):
        failures.append(f"{arguments[0]}: prints {len(printed):,} characters for {tensors} tensors")


def run_case(folder, seed):
    """Return what is wrong with how the package treats a case, a sentence each."""
    path, target = make(folder, seed), folder.parent / "target"
    nbytes = sum(file.stat().st_size for file in folder.iterdir())
    failures = Failures()
    mode = "pread" if seed % 2 else "mmap"
    names = failures.measure("Checkpoint", nbytes, lambda: read_all(path, mode)) or []
    count = 2 * len(names)
    run_command(failures, nbytes, count, "inspect", path, *(["--json"] if seed % 5 == 0 else []))
    run_command(failures, nbytes, count, "verify", path, *([folder] if seed % 3 == 0 else []))
    run_command(failures, nbytes, count, "convert", path, target, "--dry-run", "--io", mode)
    run_command(failures, nbytes, count, "encode", path, target, "--dry-run")
    name = next((name for name in names if len(name) < 1000 and not name.startswith("-")), "none")
    run_command(failures, nbytes, count, "decode", path, name, "-o", target.with_suffix(".safetensors"))
    return [f"seed {seed}: {failure}" for failure in failures]


def run_cases(first, count):
    """Yield what is wrong with each of several cases."""
    for sample in SAMPLES:  # imports and compiles
        with contextlib.suppress(BackendUnavailableError):  # without the gguf package
            read_all(sample.parent, "mmap")
    for seed in range(first, first + count):
        faulthandler.dump_traceback_later(60, exit=True)
        with tempfile.TemporaryDirectory() as folder:
            inside = Path(folder, "case")
            inside.mkdir()
            yield from run_case(inside, seed)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    first, count, *keep = sys.argv[1:]
    if keep:
        Path(keep[-1]).mkdir(exist_ok=True)
        print(make(Path(keep[-1]), int(first)))
        sys.exit()
    wrong = 0
    for failure in run_cases(int(first), int(count)):
        print(failure.encode("ascii", "backslashreplace").decode(), flush=True)
        wrong += 1
    sys.exit(wrong > 0)
