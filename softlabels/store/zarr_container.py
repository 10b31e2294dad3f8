"""How a store lies in Zarr v3: one sharded array a field, inner chunks uncompressed with crc32c.

Metadata are written by zarr-python, shards by ourselves to the letter of the specification (sharding_indexed: chunks in
order, then an index of (offset, size) pairs as little-endian uint64 with its own crc32c), because zarr-python writes a
shard at a tenth of the disk's speed, without fsync, and in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from softlabels.manifest import FORMAT, ArraySpec, Manifest
from softlabels.store.container import ShardFile
from softlabels.store.files import Buffer
from softlabels.store.geometry import Part, chunk_stride, chunks_in

EMPTY_CHUNK = np.iinfo(np.uint64).max
"""What the shard index says of a chunk that is not there."""


class ZarrContainer:
    """A store as a Zarr v3 group."""

    def metadata(self, plan: Manifest) -> dict[str, bytes]:
        """The `zarr.json` of the group and of every array, as zarr-python writes them."""
        import zarr
        from zarr.codecs import Crc32cCodec
        from zarr.storage import MemoryStore

        facts = {"format": FORMAT, "format_version": plan.format_version, "manifest": "manifest.json"}
        # In memory first: on disk, zarr-python would neither sync the files nor keep its hands off what lies beside.
        store = MemoryStore()
        group = zarr.create_group(store=store, zarr_format=3, attributes={"softlabels": {**facts, "name": plan.name}})
        for name, array in plan.arrays.items():
            group.create_array(
                name,
                shape=(plan.rows, *array.row_shape),
                shards=(plan.shards.rows_per_shard, *array.row_shape),
                chunks=(plan.shards.rows_per_chunk, *array.row_shape),
                dtype=array.dtype,
                compressors=[Crc32cCodec()],
                filters=None,
                fill_value=fill_value(np.dtype(array.dtype)),
                dimension_names=dimension_names(name, array),
            )
        return {path: value.to_bytes() for path, value in store._store_dict.items()}

    def shard_files(self, plan: Manifest, shard: int, arrays: Mapping[str, NDArray[Any]]) -> list[ShardFile]:
        """One file an array, named as Zarr's default chunk keys are."""
        return [_shard_file(plan, shard, name, arrays[name]) for name in plan.arrays]

    def chunk_is_sound(self, chunk: NDArray[Any]) -> bool:
        """Whether crc32c of all but the last four bytes is what these say."""
        return int.from_bytes(chunk[-4:].tobytes(), "little") == crc32c(chunk[:-4])


def crc32c(chunk: NDArray[np.uint8]) -> int:
    """CRC-32C (RFC 3720) of bytes that are contiguous and read-only."""
    return int(google_crc32c.value(chunk))


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


def _shard_file(plan: Manifest, shard: int, name: str, rows: NDArray[Any]) -> ShardFile:
    array, per_chunk = plan.arrays[name], plan.shards.rows_per_chunk
    stride = chunk_stride(array, per_chunk)
    flat = np.ascontiguousarray(rows, dtype=array.dtype).reshape(-1).view(np.uint8)
    chunk_bytes = stride - 4
    used = chunks_in(len(rows), per_chunk)
    padding = used * chunk_bytes - flat.size
    if padding:
        fill = np.full(padding // np.dtype(array.dtype).itemsize, fill_value(np.dtype(array.dtype)), dtype=array.dtype)
        flat = np.concatenate([flat, fill.view(np.uint8)])
    flat.flags.writeable = False
    buffers: list[Buffer] = []
    for start in range(0, flat.size, chunk_bytes):
        chunk = flat[start : start + chunk_bytes]
        buffers += [chunk.data, crc32c(chunk).to_bytes(4, "little")]
    buffers.append(_shard_index(used, plan.shards.rows_per_shard // per_chunk, stride))
    path = f"{name}/c/{shard}" + "/0" * len(array.row_shape)
    return ShardFile(path=path, buffers=buffers, parts={name: Part(path=path, offset=0, stride=stride, rows=len(rows))})


def _shard_index(used: int, total: int, stride: int) -> bytes:
    index = np.full((total, 2), EMPTY_CHUNK, dtype="<u8")
    index[:used, 0] = np.arange(used, dtype=np.uint64) * np.uint64(stride)
    index[:used, 1] = stride
    raw = index.tobytes()
    return raw + crc32c(np.frombuffer(raw, dtype=np.uint8)).to_bytes(4, "little")
