"""How the arrays of a job lie in memory: the record that the driver fills and the kernels read by name.

A job is a stack of matrices of blocks. Block ``g`` of row ``n`` of matrix ``m`` lies at

    codes   job.codes  + m * job.codes_matrix  + n * job.codes_row  + g * job.codes_step     16 bytes
    scale   job.scales + m * job.scales_matrix + n * job.scales_row + g * job.scales_step    1 byte

and element ``i`` of that row's values at

    value   job.values + m * job.values_matrix + n * job.values_row + i * job.values_step    job.itemsize bytes

Values are what is decoded to or encoded from. The first one of a row is element ``job.skip`` of the row's first block.
Addresses and strides are in bytes.

Work is counted in units, numbered from 0 over all rows of all matrices. Each kernel says what its unit is: one block,
or one block of each row in a group. A thread runs a kernel over a chunk, a range of units.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

GROUP_ROWS: Final = 128
"""Rows in a group, which kernels for transposed values process together: 256 bytes or more of each column."""

COLUMN_ROWS: Final = 32
"""Rows in a group, if their elements have scales: 64 bytes or more of each column."""

READ_BYTES: Final = 128
"""Bytes of a unit where bytes are read and nothing is done with them."""

JOB: Final = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("codes", "codes_matrix", "codes_row", "codes_step"),
            *("scales", "scales_matrix", "scales_row", "scales_step"),
            *("values", "values_matrix", "values_row", "values_step"),
            *("matrices", "rows", "blocks_per_row"),
            *("skip", "length"),  # of a row of values, in elements
            "itemsize",
            "table",  # an address; each kernel's file describes its own
            *("least_scale", "most_scale", "mantissa_bits"),  # of the table; see `tables`
            "prefetch_distance",  # of codes, in bytes
        )
    ]
)


SCALED_JOB: Final = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("codes", "codes_matrix", "codes_row", "codes_step"),
            *("scales", "scales_matrix", "scales_row", "scales_step"),
            *("values", "values_matrix", "values_row", "values_step"),
            *("matrices", "rows", "blocks_per_row"),
            *("skip", "length"),  # of a row of values, in elements
            "itemsize",
            "table",  # address of the factors of scales that are bytes
            *("blocks_per_scale", "first_block"),  # blocks that share a scale; those of the first one that are left out
            "row_bytes",  # of codes, from the first block on
            "prefetch_distance",  # of codes, in bytes
        )
    ]
)
"""The record of a job whose blocks of 32 elements have factors: one for several blocks, or two if each has 16."""

PRODUCT_JOB: Final = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("codes", "codes_row", "codes_step"),
            *("scales", "scales_row", "scales_step"),
            *("rows", "blocks_per_row"),
            *("x", "factors"),  # addresses of what `mxfp4np.backends.cpu.activations` makes
            *("values", "values_row", "values_step"),
            "table",  # address
            "prefetch_distance",  # of codes, in bytes
        )
    ]
)
"""The record of a product: row ``n`` times vector ``m`` is ``values + n * values_row + m * values_step``, a float32."""


_values_of = {record: operator.itemgetter(*(record.names or ())) for record in (JOB, SCALED_JOB, PRODUCT_JOB)}


def make_job(fields: Mapping[str, int], record: np.dtype[Any] = JOB) -> array[int]:
    """Return the record of a job as an array of 64-bit integers.

    This takes 0.5 microseconds. A NumPy record would take 1.6, or 7 if filled field by field; decoding a single block
    takes 10 in all.

    Examples
    --------
    >>> np.frombuffer(make_job(dict.fromkeys(JOB.names, 7)), JOB)[0]["rows"]
    np.int64(7)
    """
    return array("q", _values_of[record](fields))


def field_offsets(record: np.dtype[Any]) -> list[int]:
    """Return the offset of each field of a record, in bytes."""
    fields: Any = record.fields
    return [fields[name][1] for name in fields]
