"""CheckpointShard: what one rank of a parallel job needs of a checkpoint, under the same names.

Which part that is follows from a plan, names, and shapes alone: this module reads through `Checkpoint.get` and its
readers, and knows nothing of files.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .array import MXFP4Array
from .backends import get_backend
from .errors import LayoutError, TensorNotFoundError
from .format import BLOCK_SIZE, TorchDType, as_dtype, decoded_dtype, dtype_named
from .layouts.packed import TensorInfo
from .scaled import ScaledArray
from .shapes import swapped
from .storage.tensorfile import element

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

STYLES: Final = ("experts", "colwise", "rowwise", "gate_up")
"""The words of a plan."""

_EXPERT: Final = re.compile(r"((?:.*\.)?experts\.)(\d+)\..*", re.DOTALL)
_REQUIRED: Final = object()


class Cut(NamedTuple):
    """A part of a tensor: ranges of one axis, one after the other; zeros follow one that is shorter than ``length``."""

    axis: int
    ranges: tuple[range, ...]
    length: int

    @property
    def padded(self) -> bool:
        """Whether there are zeros."""
        return any(len(range_) < self.length for range_ in self.ranges)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the part of a tensor of this shape."""
        return (*whole[: self.axis], len(self.ranges) * self.length, *whole[self.axis + 1 :])

    def place(self, begin: int, end: int) -> tuple[slice, ...]:
        """Return the index of a range of the axis."""
        return (*[slice(None)] * self.axis, slice(begin, end))


class CheckpointShard(Mapping[str, Any]):
    """What one rank of a parallel job needs of a checkpoint; made by `Checkpoint.shard`.

    It is a mapping as the checkpoint is, of the same names, and gives the rank's part of each tensor, decoded by `get`
    or still packed by `packed`. Nothing else is read, from files that are mapped, read, or remote.

    The plan says how tensors are divided, as the tensor-parallel plans of transformers do: patterns of names, of which
    the first that fits decides, and for each the number of an axis or one of four words. Tensors that no pattern fits
    are whole on every rank.

    ``"experts"``
        Expert-parallel. A stack ``[expert, out, in]`` is divided along its first axis, a stack of biases too. Of
        experts with tensors of their own, ``experts.17.up_proj``, a rank has the names of its own experts only.
    ``"colwise"``
        Column-parallel: the outputs are divided, the last axis but one of weights and the last of biases. Where rows of
        gate and up alternate, as in gpt-oss's ``gate_up_proj``, pairs of them stay together.
    ``"rowwise"``
        Row-parallel: the inputs are divided, the last axis of weights, between whole blocks. The results of all ranks
        are to be added up, so that biases are whole on every rank: add them once.
    ``"gate_up"``
        As ``"colwise"``, for gate and up in one tensor, one below the other: a rank has its rows of gate, then its
        rows of up. Where they alternate, it is the same as ``"colwise"``.

    Ranks have equal parts, in order. Parts begin and end between blocks, tiles or pairs. Where these do not divide, it
    is an error that says which number of ranks does; or, with ``pad``, all parts are as long as the first, and zeros
    stand for what the last ones lack. Outputs are then counted in blocks of 32 as well, so that the outputs of
    ``gate_up_proj`` that a rank has are the inputs of ``down_proj`` that it has.

    Parameters
    ----------
    checkpoint : Checkpoint
    rank : int
        From 0.
    size : int
        Number of ranks.
    plan : mapping of str to int or str
        For shell-style patterns of names an axis, as NumPy counts them, or ``"experts"``, ``"colwise"``, ``"rowwise"``
        or ``"gate_up"``.
    pad : bool
        Whether to add zeros where an axis does not divide.

    Raises
    ------
    ValueError
        If there is no such rank, a pattern fits no name, or the plan says something else.
    """

    def __init__(
        self, checkpoint: Checkpoint, rank: int, size: int, plan: Mapping[str, int | str], *, pad: bool = False
    ) -> None:
        self.checkpoint, self.rank, self.size = checkpoint, operator.index(rank), operator.index(size)
        self.plan, self.pad = dict(plan), pad
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be from 0 to size - 1, found rank {rank} of {size}")
        for pattern, style in self.plan.items():
            if isinstance(style, bool) or not (isinstance(style, int) or style in STYLES):
                raise ValueError(f"plan: {pattern!r}: expected an axis or {', '.join(STYLES)}, found {style!r}")
            if not any(fnmatchcase(name, pattern) for name in checkpoint):
                raise ValueError(f"plan: {pattern!r}: no tensor in {checkpoint.folder} is called like this")

    # Mapping

    def __getitem__(self, name: str) -> Any:
        """Return the rank's part of a tensor: `get` without options."""
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.checkpoint if self._has(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint and self._has(name)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} of {self.checkpoint!r}>"

    def info(self, name: str) -> TensorInfo:
        """Return what is known of a tensor from the headers alone, with the shape of the rank's part.

        Raises
        ------
        TensorNotFoundError
            If there is none of this name, or only other ranks have it.
        LayoutError
            If it does not divide, or is not divided as the plan says.
        """
        info, cut = self._cut(name)
        return info if cut is None else info._replace(shape=cut.shape(info.shape))

    # Arrays

    def get(  # type: ignore[override]
        self,
        name: str,
        dtype: DTypeLike | TorchDType | None = None,
        *,
        default: Any = _REQUIRED,
        out: NDArray[Any] | None = None,
        transpose: bool = False,
        backend: str | None = None,
        num_threads: int | None = None,
    ) -> Any:
        """Return the rank's part of a tensor, decoded if it is packed.

        Parameters
        ----------
        name, dtype, default, out, transpose, backend, num_threads
            As for `Checkpoint.get`; ``out`` has the shape of the part.

        Returns
        -------
        numpy.ndarray or cupy.ndarray
            As from `Checkpoint.get`: of a plain tensor a view of the file, unless there is something to be joined, or
            zeros to be added.

        Raises
        ------
        TensorNotFoundError
            If there is no such tensor, or only other ranks have it, and no default.
        LayoutError
            If the tensor does not divide, or is not divided as the plan says; otherwise as `Checkpoint.get`.
        """
        if default is not _REQUIRED and name not in self:
            return default
        info, cut = self._cut(name)
        options: dict[str, Any] = {"backend": backend, "num_threads": num_threads}
        if cut is None or (len(cut.ranges) == 1 and not cut.padded):
            index = None if cut is None else cut.place(cut.ranges[0].start, cut.ranges[0].stop)
            return self.checkpoint.get(name, dtype, out=out, index=index, transpose=transpose, **options)
        shape = swapped(cut.shape(info.shape)) if transpose else cut.shape(info.shape)
        if out is None:
            if info.layout is None:
                given = dtype_named(element(info.dtype)[1]) if dtype is None else as_dtype(dtype)
            else:
                given = decoded_dtype("bfloat16" if dtype is None else dtype)
            device = self.checkpoint.device
            out = get_backend("numpy" if device == "cpu" else None, device).empty(shape, given)
        elif out.shape != shape:
            raise ValueError(f"out must have shape {shape}, found {out.shape}")
        target = out.swapaxes(-1, -2) if transpose else out
        for number, range_ in enumerate(cut.ranges):
            begin, filled = number * cut.length, number * cut.length + len(range_)
            part, index = target[cut.place(begin, filled)], cut.place(range_.start, range_.stop)
            if range_:
                self.checkpoint.get(name, dtype, out=part, index=index, **options)
            target[cut.place(filled, begin + cut.length)] = 0
        return out

    def packed(self, name: str) -> MXFP4Array | ScaledArray:
        """Return the rank's part of a tensor of MXFP4, FP8, MXFP8 or NVFP4 without decoding it.

        It is a view of the file, unless there is something to be joined, or zeros to be added: codes and scales of 0.

        Raises
        ------
        TensorNotFoundError, LayoutError
            As `get`, and as `Checkpoint.packed`.
        """
        info, cut = self._cut(name)
        if cut is None or info.layout in (None, "gguf"):
            return self.checkpoint.packed(name)
        reader = self.checkpoint.reader(name)
        parts = [reader.load(reader.array[cut.place(x.start, x.stop)]) for x in cut.ranges]
        return _joined(parts, cut.axis - len(info.shape), cut.length) if len(parts) > 1 or cut.padded else parts[0]

    # Plan

    def _style(self, name: str) -> int | str | None:
        name = name.removesuffix("/gate").removesuffix("/up")
        return next((style for pattern, style in self.plan.items() if fnmatchcase(name, pattern)), None)

    @cached_property
    def _experts(self) -> dict[str, int]:
        """The number of experts by what their names begin with."""
        counts: dict[str, int] = {}
        for match in filter(None, map(_EXPERT.fullmatch, self.checkpoint)):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
        return counts

    def _has(self, name: Any) -> bool:
        """Tell whether the rank has a tensor: all ranks have those that are not of one expert."""
        match = _EXPERT.fullmatch(name)
        if match is None or self._style(name) != "experts":
            return True
        mine, _ = self._share(self._experts[match[1]], 1, "experts", f"{self.checkpoint.folder}: {match[1]!r}")
        return int(match[2]) in mine

    def _cut(self, name: str) -> tuple[TensorInfo, Cut | None]:
        """Return what is known of a tensor, and the rank's part of it: None if it is whole."""
        info, style = self.checkpoint.info(name), self._style(name)
        if not self._has(name):
            raise TensorNotFoundError(
                f"no tensor {name!r} in rank {self.rank} of {self.size}: it belongs to an expert of another rank"
            )
        shape, ndim = info.shape, len(info.shape)
        bias = name.removesuffix("/gate").removesuffix("/up").endswith("bias")
        one = style is None or (style == "rowwise" and bias) or (style == "experts" and _EXPERT.fullmatch(name))
        if one or not ndim or (self.size == 1 and not self.pad):
            return info, None
        where = f"{info.stored[0].file.path}: tensor {name!r}"
        if info.format is not None and info.layout is None:
            raise LayoutError(f"{where} is {info.format}, which is not decoded, and cannot be divided: see .stored")
        outputs = ndim - 1 if bias else ndim - 2
        if isinstance(style, int):
            axis, possible = style + ndim if style < 0 else style, -ndim <= style < ndim
        else:
            axis = {"experts": 0, "rowwise": ndim - 1}.get(style or "", outputs)
            possible = outputs >= (1 if style == "experts" else 0)
        if not possible:
            raise LayoutError(f"{where}: expected a shape that {style!r} can divide, found {list(shape)}")
        unit = 1 if info.unit is None else {ndim - 2: info.unit[0], ndim - 1: info.unit[1]}.get(axis, 1)
        pairs = axis == outputs and f"{name}/gate" in self.checkpoint
        below = style == "gate_up" and not pairs and not name.endswith(("/gate", "/up"))
        sections = 2 if pairs or below else 1
        if shape[axis] % (sections * unit if below else sections):
            raise LayoutError(
                f"{where}: expected gate and up of a multiple of {unit} rows each, found {shape[axis]:,} rows"
            )
        if self.pad and style in ("colwise", "rowwise", "gate_up"):
            unit = math.lcm(unit, BLOCK_SIZE)
        what = "experts" if style == "experts" else "columns" if axis > outputs else "rows"
        length = shape[axis] // sections
        mine, each = self._share(length, unit, f"{what} of gate" if sections > 1 else what, where)
        if pairs:
            return info, Cut(axis, (range(2 * mine.start, 2 * mine.stop),), 2 * each)
        begins = [number * length for number in range(sections)]
        return info, Cut(axis, tuple(range(x + mine.start, x + mine.stop) for x in begins), each)

    def _share(self, length: int, unit: int, what: str, where: str) -> tuple[range, int]:
        """Return which of ``length`` the rank has, in whole units, and how many it has with zeros."""
        units, rest = divmod(length, unit)
        if not self.pad and (rest or units % self.size):
            found = f"{length:,} {what}" + (f" in units of {unit}" if unit > 1 else "")
            if rest:
                advice = "no number of ranks divides them"
            else:
                fewer = next(number for number in range(self.size, 0, -1) if units % number == 0)
                more = next((number for number in range(self.size, units + 1) if units % number == 0), None)
                advice = f"{fewer} or {more} do" if more else f"{fewer} do"
            raise LayoutError(f"{where} has {found}, which {self.size} ranks do not divide: {advice}, or give pad=True")
        each = unit * -(-length // (unit * self.size))
        begin = min(self.rank * each, length)
        return range(begin, min(begin + each, length)), each


def _joined(parts: Sequence[MXFP4Array] | Sequence[ScaledArray], axis: int, length: int) -> MXFP4Array | ScaledArray:
    """Return arrays one after the other along an axis, counted from the last, each made as long with codes of 0."""

    def together(arrays: Iterable[NDArray[Any]], axis: int, values: int, fill: int = 0) -> NDArray[Any]:
        """Join arrays in which an index of the axis stands for some values."""
        pieces: list[NDArray[Any]] = []
        for array in arrays:
            missing = -(-length // values) - array.shape[axis]
            shape = [*array.shape]
            shape[axis] = missing
            pieces += [array, np.full(shape, fill, array.dtype)]
        return np.concatenate(pieces, axis)

    first = parts[0]
    if isinstance(first, MXFP4Array):
        values = BLOCK_SIZE if axis == -1 else 1
        blocks = together((part.blocks for part in parts), axis - 1, values)
        return MXFP4Array(blocks, together((part.scales for part in parts), axis, values), first.order)
    codes = together((part.blocks for part in parts), axis, 2 if axis == -1 and first.element == "E2M1" else 1)
    tile = first.tile_rows, first.block_size
    scales = together((part.scales for part in parts), axis, {-2: tile[0], -1: tile[1]}.get(axis, 1))
    second = first.second
    if second is not None and second.ndim:  # the same for all rows
        second = second[..., :1, :]
        if axis < -2:  # there is one part
            second = together([second], axis, 1, fill=1)
    return ScaledArray(codes, scales, first.element, tile, second, divide=first.divide)
