"""How the arrays of a job lie in memory: the one record that the driver fills and the kernels read by name.

A job is a stack of matrices of blocks. Matrix ``m``, row ``n`` and block ``g`` of it lie at

    codes   job.codes  + m * job.codes_matrix  + n * job.codes_row  + g * job.codes_step     16 bytes
    scale   job.scales + m * job.scales_matrix + n * job.scales_row + g * job.scales_step    1 byte

and element ``i`` of a row of values, the first of which is element ``job.start`` of the row's first block, at

    value   job.values + m * job.values_matrix + n * job.values_row + i * job.values_step    job.itemsize bytes

Values are what is decoded to or encoded from. Addresses and strides are in bytes.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

GROUP_ROWS: Final = 128
"""Rows that kernels to and from columns do together: 256 bytes or more of each column at a time."""

JOB: Final = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("codes", "codes_matrix", "codes_row", "codes_step"),
            *("scales", "scales_matrix", "scales_row", "scales_step"),
            *("values", "values_matrix", "values_row", "values_step"),
            *("matrices", "rows", "blocks_per_row"),
            *("start", "length"),  # of a row, in elements
            "itemsize",
            "table",  # an address; each kernel's file describes its own
            *("least_scale", "most_scale", "mantissa_bits"),  # of the table: the scales whose values are all normal
            "prefetch",  # the distance from codes that are decoded to codes that are prefetched, in bytes
        )
    ]
)


_values_of = operator.itemgetter(*(JOB.names or ()))


def make_job(fields: Mapping[str, int]) -> array[int]:
    """Return the record of a job that has these fields, as the array of 64-bit integers that it is.

    Filling a NumPy record takes 1.6 microseconds, or 7 field by field, of the 10 for a single block; this takes 0.5.

    Examples
    --------
    >>> np.frombuffer(make_job(dict.fromkeys(JOB.names, 7)), JOB)[0]["rows"]
    np.int64(7)
    """
    return array("q", _values_of(fields))


def field_offsets(record: np.dtype[Any]) -> list[int]:
    """Return how many bytes from its address the fields of a record are."""
    fields: Any = record.fields
    return [fields[name][1] for name in fields]
