"""Containers: Zarr v3, and the choice between it and HDF5 (`softlabels.store.hdf5_container`).

A Zarr store has one sharded array per field, inner chunks with crc32c, uncompressed unless asked. zarr-python writes
the metadata; shards are written here, as the specification says (sharding_indexed: chunks in order, then an index of
(offset, size) pairs as little-endian uint64, followed by its own crc32c), because zarr-python writes a shard at a tenth
of the disk's speed, without fsync, and in place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from softlabels.extras import needs_extra
from softlabels.manifest import FORMAT, Manifest
from softlabels.row_sums import crc32c
from softlabels.store.chunks import (
    BLOSC_LEVEL,
    CHECKSUM_BYTES,
    ZSTD_LEVEL,
    Part,
    ShardFile,
    chunk_bodies,
    dimension_names,
    fill_value,
    with_checksums,
)
from softlabels.store.hdf5_container import Hdf5Container

EMPTY_CHUNK = np.iinfo(np.uint64).max
"""Offset and size of a missing chunk in the shard index."""


class ZarrContainer:
    """A store as a Zarr v3 group."""

    def metadata(self, plan: Manifest) -> dict[str, bytes]:
        """Return the `zarr.json` of the group and of every array, as zarr-python writes them."""
        # Imported where it is used: readers of a store do not need zarr-python (docs/adr/0005).
        with needs_extra("store", "writing and checking stores in Zarr"):
            import zarr
        from zarr.storage import MemoryStore

        facts = {"format": FORMAT, "format_version": plan.format_version, "manifest": "manifest.json"}
        # In memory first: on disk, zarr-python would not sync the files, and would touch others in the folder.
        store = MemoryStore()
        group = zarr.create_group(store=store, zarr_format=3, attributes={"softlabels": {**facts, "name": plan.name}})
        for name, array in plan.arrays.items():
            dtype = np.dtype(array.dtype)
            group.create_array(
                name,
                shape=(plan.rows, *array.row_shape),
                shards=(plan.shards.rows_per_shard, *array.row_shape),
                chunks=(plan.shards.rows_per_chunk, *array.row_shape),
                dtype=array.dtype,
                compressors=_codecs(plan.shards.compression, dtype),
                filters=None,
                fill_value=fill_value(dtype),
                dimension_names=dimension_names(name, array),
            )
        return _consolidated({path: value.to_bytes() for path, value in store._store_dict.items()})

    def shard_files(self, plan: Manifest, shard: int, arrays: Mapping[str, NDArray[Any]]) -> list[ShardFile]:
        """Return one file per array, at the path of Zarr's default chunk key."""
        return [_shard_file(plan, shard, name, arrays[name]) for name in plan.arrays]

    def is_as_written(self, chunk: NDArray[np.uint8], part: Part, number: int) -> bool:
        """Return whether bytes read are chunk `number` of a part, its checksum included."""
        return part.ends_as_written(number, chunk) and part.has_crc32c(number, chunk)


StoreContainer: TypeAlias = ZarrContainer | Hdf5Container
"""A standard file format that holds the store's arrays."""


def container_of(manifest: Manifest) -> StoreContainer:
    """Return the container that this manifest names."""
    return Hdf5Container() if manifest.container == "hdf5" else ZarrContainer()


def _consolidated(documents: dict[str, bytes]) -> dict[str, bytes]:
    # With the arrays' metadata in the group's own, zarr-python does not search the folder, where it would warn of every
    # entry that is not an array: ledger, index, manifest.
    root = json.loads(documents["zarr.json"])
    arrays = {path.removesuffix("/zarr.json"): json.loads(raw) for path, raw in documents.items() if "/" in path}
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}
    return {**documents, "zarr.json": json.dumps(root, sort_keys=True).encode()}


def _codecs(compression: str | None, dtype: np.dtype[Any]) -> list[Any]:
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    # These describe what `chunks.compress` writes, so both change together; its zstd frames have no checksum.
    if compression == "zstd":
        return [ZstdCodec(level=ZSTD_LEVEL, checksum=False), Crc32cCodec()]
    if compression == "blosc":
        return [BloscCodec(cname="zstd", clevel=BLOSC_LEVEL, shuffle="shuffle", typesize=dtype.itemsize), Crc32cCodec()]
    return [Crc32cCodec()]


def _shard_file(plan: Manifest, shard: int, name: str, rows: NDArray[Any]) -> ShardFile:
    bodies = chunk_bodies(plan, name, rows)
    path = f"{name}/c/{shard}" + "/0" * len(plan.arrays[name].row_shape)
    compressed = plan.shards.compression is not None
    chunks, part = with_checksums(
        bodies, lambda body: crc32c(body.data), compressed=compressed, path=path, offset=0, rows=len(rows)
    )
    sizes = [body.size + CHECKSUM_BYTES for body in bodies]
    index = np.full((plan.shards.rows_per_shard // plan.shards.rows_per_chunk, 2), EMPTY_CHUNK, dtype="<u8")
    index[: len(sizes), 0] = np.cumsum([0, *sizes[:-1]])
    index[: len(sizes), 1] = sizes
    raw = index.tobytes()
    checksum = crc32c(raw).to_bytes(CHECKSUM_BYTES, "little")
    return ShardFile(path=path, buffers=[*chunks, raw, checksum], parts={name: part})
