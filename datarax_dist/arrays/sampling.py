"""What a piece of an array shrinks to, with the very codec that it would be stored with."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import tensorstore as ts

__all__ = ["compress_sample"]

_PIECES = 4
_PIECE_BYTES = 1 << 18
_ZSTD = {"name": "zstd", "configuration": {"level": 3}}  # as Orbax has it


def compress_sample(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Compresses a little from several places of an array, which is not empty.

    Returns:
        Its bytes over those before, and the seconds of one thread for each byte before.
    """
    data = _pieces(values)
    size = len(data)
    context = ts.Context({"data_copy_concurrency": {"limit": 1}})
    store = ts.KvStore.open({"driver": "memory"}, context=context).result()
    array = ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "memory"},
            "metadata": {
                "shape": [size],
                "data_type": "uint8",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [size]}},
                "codecs": [{"name": "bytes"}, _ZSTD],
            },
            "store_data_equal_to_fill_value": True,
        },
        context=context,
        create=True,
        open=True,
    ).result()
    begin = time.monotonic()
    array.write(data).result()
    seconds = time.monotonic() - begin
    return len(store.read(b"c/0").result().value) / size, seconds / size


def _pieces(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bytes from evenly spread places of an array."""
    rows = values.reshape(-1) if values.flags.c_contiguous else values.ravel(order="K")
    count = max(1, _PIECE_BYTES // values.itemsize)
    last = max(0, len(rows) - count)
    begins = sorted({last * number // max(1, _PIECES - 1) for number in range(_PIECES)})
    pieces = [np.ascontiguousarray(rows[begin : begin + count]) for begin in begins]
    return np.concatenate([piece.view(np.uint8) for piece in pieces])
