"""How the rows of a shard become chunks, whatever file they will lie in: cut, padded, and compressed where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from softlabels.manifest import ArraySpec, Manifest
from softlabels.store.compressed import compress
from softlabels.store.geometry import CHECKSUM_BYTES, Part, chunk_stride, chunks_in

Chunk: TypeAlias = tuple[NDArray[np.uint8], bytes]
"""A chunk's bytes, and the four bytes of checksum that follow them."""


def chunk_bodies(plan: Manifest, name: str, rows: NDArray[Any]) -> Sequence[NDArray[np.uint8]]:
    """The chunks of one array of a shard, without their checksums.

    Args:
        rows: [rows of the shard, *row_shape].
    Returns:
        One read-only uint8 array a chunk; all of one size where chunks are not compressed. Rows that the last chunk has
        to spare hold the fill value.
    """
    array, per_chunk = plan.arrays[name], plan.shards.rows_per_chunk
    flat = np.ascontiguousarray(rows, dtype=array.dtype).reshape(-1).view(np.uint8)
    chunk_bytes = array.row_bytes * per_chunk
    padding = chunks_in(len(rows), per_chunk) * chunk_bytes - flat.size
    if padding:
        dtype = np.dtype(array.dtype)
        fill = np.full(padding // dtype.itemsize, fill_value(dtype), dtype=dtype)
        flat = np.concatenate([flat, fill.view(np.uint8)])
    flat.flags.writeable = False
    chunks = flat.reshape(-1, chunk_bytes)
    if plan.shards.compression is None:
        return list(chunks)
    dtype = np.dtype(array.dtype)
    return [compress(chunk.view(dtype), plan.shards.compression) for chunk in chunks]


def part_of(plan: Manifest, name: str, chunks: Sequence[Chunk], *, path: str, offset: int, rows: int) -> Part:
    """Where these chunks lie in a file, one after the other from `offset` on."""
    checksums = b"".join(checksum for _, checksum in chunks).hex()
    if plan.shards.compression is None:
        stride = chunk_stride(plan.arrays[name], plan.shards.rows_per_chunk)
        return Part(path=path, offset=offset, stride=stride, rows=rows, checksums=checksums)
    sizes = tuple(body.size + CHECKSUM_BYTES for body, _ in chunks)
    return Part(path=path, offset=offset, stride=0, rows=rows, checksums=checksums, sizes=sizes)


def fill_value(dtype: np.dtype[Any]) -> float | int:
    """What a reader sees where nothing was written: NaN, or the integer that is the least like data. Never zero."""
    if dtype.kind == "f":
        return float("nan")
    return int(np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max)


def dimension_names(name: str, array: ArraySpec) -> tuple[str, ...]:
    """Names of an array's dimensions for people and tools: rows first."""
    if name == "targets":
        return ("row", "class") if len(array.row_shape) == 1 else ("row", "member", "class")
    return ("row", *(f"{name}_{axis}" for axis in range(len(array.row_shape))))
