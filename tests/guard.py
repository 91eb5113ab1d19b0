"""Decode, encode and multiply arrays that begin and end at pages which nobody may touch; run by test_guard_pages.py.

Reading or writing a byte before or behind an array ends the process. The arguments are the number of cases and a seed.
"""

import ctypes
import itertools
import mmap
import sys

import numpy as np
from contract import DTYPES, RULES

import mxfp4np
from mxfp4np import MXFP4Array
from mxfp4np.backends.cpu import driver, launch

PAGE = mmap.PAGESIZE
FILL = 0x55
READ, WRITE = 1, 2

LEADS = [(), (1,), (2,), (7,), (33,), (64,), (129,), (3, 5), (2, 32), (2, 3, 4), (3, 37), (257,)]
GROUPS = [1, 2, 3, 4, 5, 8, 15, 16, 17, 33]

protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """Memory between two pages that are neither read nor written."""

    def __init__(self, pages):
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        whole = np.frombuffer(self._map, np.uint8)
        self.memory = self.used = whole[PAGE:-PAGE]
        self.memory[:] = FILL
        for page in (whole[:PAGE], whole[-PAGE:]):
            assert protect(page.ctypes.data, PAGE, 0) == 0

    def allow(self, what):
        assert protect(self.memory.ctypes.data, self.memory.size, what) == 0

    def place(self, rng, shape, dtype, axes=None, *, dense=1):
        """Return an array at one of the ends, of axes in this order, the last ``dense`` of them without gaps."""
        axes = axes or range(len(shape))
        strides, step = [0] * len(shape), dtype.itemsize
        for position, axis in enumerate(reversed(axes)):
            if position >= dense and rng.random() < 0.3:
                step += int(rng.choice([1, dtype.itemsize, 16, 64] if position else [1, dtype.itemsize]))
            strides[axis] = step
            step *= shape[axis]
        extent = int(sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))) + dtype.itemsize
        offset = 0 if rng.random() < 0.4 else self.memory.size - extent
        array = np.ndarray(shape, dtype, self.memory, offset, strides)
        for axis in range(len(shape) - 1):
            if rng.random() < 0.1:
                array = array[tuple(slice(None, None, -1 if i == axis else None) for i in range(axis + 1))]
        self.used = self.memory[max(0, offset - 1024) : offset + extent + 1024]
        return array

    def is_untouched_but_for(self, array):
        """Fill an array and compare all that is near; afterwards all is as it was in the beginning."""
        array.view(f"u{array.itemsize}")[...] = int.from_bytes(bytes([FILL] * array.itemsize), "little")
        untouched = bool((self.used == FILL).all())
        self.used[:] = FILL
        return untouched


def fill(rng, array):
    source = BYTES[rng.integers(0, 1000) :][: array.size * array.itemsize]
    with np.errstate(invalid="ignore"):
        array[...] = source.view(array.dtype).reshape(array.shape)


def some_policy(rng):
    """Let even small arrays use workers, streaming stores and chunks of any size."""
    launch.ALONE_BLOCKS, launch.THREAD_BLOCKS = (0, 4) if rng.random() < 0.3 else (1 << 15, 1 << 13)
    launch.CHUNK_BLOCKS = tuple(sorted(int(n) for n in rng.integers(1, 100, 2)))
    driver.STREAMING_BYTES = 0 if rng.random() < 0.5 else sys.maxsize


def some_packed(rng, shape):
    """Return blocks and scales: apart, or together in blocks of 17 bytes."""
    kind = rng.random()
    if kind < 0.2:
        both = ARENAS["blocks"].place(rng, (*shape, 17), np.dtype("u1"), dense=1)
        return both[..., 1:], both[..., 0]
    axes = list(range(len(shape)))
    if kind < 0.3:
        axes.reverse()
    blocks = ARENAS["blocks"].place(rng, (*shape, 16), np.dtype("u1"), [*axes, len(shape)], dense=1)
    return blocks, ARENAS["scales"].place(rng, shape, np.dtype("u1"), axes)


def some_values(rng, shape, dtype):
    axes = list(range(len(shape)))
    if len(shape) > 1 and rng.random() < 0.5:
        axes[-2:] = reversed(axes[-2:])
    return ARENAS["values"].place(rng, shape, dtype, axes, dense=int(rng.integers(0, 2)))


def decode(rng, lead, groups, dtype, choice):
    blocks, scales = some_packed(rng, (*lead, groups))
    fill(rng, blocks)
    fill(rng, scales)
    begin, end = 0, 32 * groups
    if rng.random() < 0.6:
        begin, end = sorted(rng.choice(32 * groups + 1, 2, replace=False).tolist())
    part = MXFP4Array(blocks, scales, "pairs" if choice % 2 else "halves")[..., begin:end]
    expected = np.ascontiguousarray(part.decode(dtype, backend="numpy"))
    out = some_values(rng, part.shape, dtype)
    for name in ("blocks", "scales"):
        ARENAS[name].allow(READ)
    part.decode(out=out, num_threads=int(rng.integers(1, 4)))
    for name in ("blocks", "scales"):
        ARENAS[name].allow(READ | WRITE)
        ARENAS[name].used[:] = FILL
    same = np.ascontiguousarray(out).tobytes() == expected.tobytes()
    return same and ARENAS["values"].is_untouched_but_for(out)


def encode(rng, lead, groups, dtype, choice):
    x = some_values(rng, (*lead, 32 * groups), dtype)
    fill(rng, x)
    rule = list(RULES)[choice % 4]
    expected = mxfp4np.encode(x, rule, backend="numpy")
    blocks, scales = some_packed(rng, (*lead, groups))
    ARENAS["values"].allow(READ)
    mxfp4np.encode(x, rule, out=MXFP4Array(blocks, scales), num_threads=int(rng.integers(1, 4)))
    ARENAS["values"].allow(READ | WRITE)
    ARENAS["values"].used[:] = FILL
    same = np.array_equal(blocks, expected.blocks) and np.array_equal(scales, expected.scales)
    blocks[...] = scales[...] = FILL
    return same and all((ARENAS[name].used == FILL).all() for name in ("blocks", "scales"))


def multiply(rng, lead, groups, dtype, choice):
    """Multiply a matrix by vectors of whole numbers, whose products are exact, and by one of integers of 16 bits."""
    rows = int(np.prod(lead))
    blocks, scales = some_packed(rng, (rows, groups))
    fill(rng, blocks)
    scales[...] = rng.integers(125, 130, scales.shape)
    array = MXFP4Array(blocks, scales, "pairs" if choice % 2 else "halves")
    vectors = int(rng.choice([1, 2, 3, 4, 7, 8, 9, 20]))
    x = some_values(rng, (32 * groups, vectors), dtype)
    x[...] = rng.integers(-4, 5, x.shape)
    expected = array.decode("float32", backend="numpy") @ np.ascontiguousarray(x).astype(np.float32)
    for arena in ARENAS.values():
        arena.allow(READ)
    threads = int(rng.integers(1, 4))
    same = np.array_equal(mxfp4np.linear(x.T, array, num_threads=threads), expected.T)
    rounded = mxfp4np.linear(x[:, 0], array, activations="int16", num_threads=threads)
    same &= bool(np.abs(rounded - expected[:, 0]).max() <= 1e-3 * np.abs(expected[:, 0]).max(initial=1))
    for arena in ARENAS.values():
        arena.allow(READ | WRITE)
        arena.used[:] = FILL
    return same


def main(cases, seed):
    done = 0
    combinations = itertools.product(range(8), DTYPES.values(), (decode, encode, multiply))
    for number, (choice, dtype, call) in zip(range(cases), itertools.cycle(combinations)):
        print(seed + number, file=sys.stderr, flush=True)  # the last line is the case that crashed
        rng = np.random.default_rng(seed + number)
        lead, groups = LEADS[rng.integers(len(LEADS))], int(rng.choice(GROUPS))
        some_policy(rng)
        assert call(rng, lead, groups, dtype, choice), (call.__name__, lead, groups, dtype, choice, seed + number)
        done += 1
    print(done, launch.instruction_set())


BYTES = np.random.default_rng(0).integers(0, 256, 4 << 20, np.uint8)
ARENAS = {"blocks": Arena(256), "scales": Arena(64), "values": Arena(1024)}

if __name__ == "__main__":
    if sys.argv[1] == "behind":
        ctypes.memset(ARENAS["values"].memory.ctypes.data + ARENAS["values"].memory.size, 0, 1)
    main(int(sys.argv[1]), int(sys.argv[2]))
