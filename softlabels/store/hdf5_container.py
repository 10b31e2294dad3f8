"""HDF5 container: one file per shard, and `store.h5`, whose virtual datasets show all shards as one.

h5py lays out a shard's file once, in memory, with room for its chunks (a template); rows and their Fletcher-32
checksums are then put in that room here. So the file is written as every other one is (h5py does not report a full
disk, and crashes on closing), its bytes are the same each time, and a shard needs no call of the library.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softlabels.atomic_files import Buffer
from softlabels.errors import JobError
from softlabels.extras import needs_extra
from softlabels.manifest import FORMAT, ArraySpec, Manifest, ShardSpec
from softlabels.store.chunks import (
    CHECKSUM_BYTES,
    GZIP_LEVEL,
    Part,
    ShardFile,
    chunk_bodies,
    dimension_names,
    fill_value,
    shard_rows,
    with_checksums,
)

VIRTUAL = "store.h5"


class Hdf5Container:
    """A store as a folder of HDF5 files."""

    def metadata(self, plan: Manifest) -> dict[str, bytes]:
        """Return the file of virtual datasets, which names the shards' files relative to itself."""
        return {VIRTUAL: _virtual_file(plan)}

    def shard_files(self, plan: Manifest, shard: int, arrays: Mapping[str, NDArray[Any]]) -> list[ShardFile]:
        """Return one file, with a dataset for each array."""
        rows, path, compressed = len(shard_rows(plan, shard)), shard_path(shard), plan.shards.compression is not None
        bodies = {name: chunk_bodies(plan, name, arrays[name]) for name in sorted(plan.arrays)}
        sizes = tuple(tuple(body.size + CHECKSUM_BYTES for body in each) for each in bodies.values())
        between, offsets, after = _lay_out(
            # Sorted: a plan read back from disk lists its arrays in another order than the one that was written.
            _Geometry(plan.name, arrays=tuple(sorted(plan.arrays.items())), rows=rows, shards=plan.shards, sizes=sizes)
        )
        buffers: list[Buffer] = []
        parts = {}
        for name, before, offset in zip(bodies, between, offsets, strict=True):
            chunks, parts[name] = with_checksums(
                bodies[name],
                fletcher32,
                compressed=compressed,
                path=path,
                offset=offset,
                rows=rows,
                crc32c_too=plan.format_version >= 2,
            )
            buffers += [before, *chunks]
        return [ShardFile(path=path, buffers=[*buffers, after], parts=parts)]

    def is_as_written(self, chunk: NDArray[np.uint8], part: Part, number: int) -> bool:
        """Return whether bytes read are chunk `number` of a part, its checksum included.

        By CRC-32C, since Fletcher-32 takes 0x0000 for 0xFFFF; by Fletcher-32 alone in stores of format version 1.
        """
        if not part.ends_as_written(number, chunk):
            return False
        if part.crc32c is not None:
            return part.has_crc32c(number, chunk)
        return int.from_bytes(chunk[-CHECKSUM_BYTES:].tobytes(), "little") == fletcher32(chunk[:-CHECKSUM_BYTES])


def shard_path(shard: int) -> str:
    """Return the path of a shard's file in the store."""
    return f"shards/{shard:08d}.h5"


class _Geometry(NamedTuple):
    """Everything that the layout of a shard's file depends on; `sizes` are of each array's chunks with checksums."""

    store: str
    arrays: tuple[tuple[str, ArraySpec], ...]
    rows: int
    shards: ShardSpec
    sizes: tuple[tuple[int, ...], ...]


# An uncompressed store has two geometries, of the last shard and of all others; a template takes some kilobytes.
@lru_cache(maxsize=8)
def _lay_out(geometry: _Geometry) -> tuple[list[bytes], list[int], bytes]:
    """Return a shard's file without its chunks: bytes before each array, offset of each, and bytes after the last."""
    image = io.BytesIO()
    offsets = []
    with _new_file(image, geometry.store) as file:
        datasets = [_new_dataset(file, geometry, name, array) for name, array in geometry.arrays]
        for (name, array), dataset, sizes in zip(geometry.arrays, datasets, geometry.sizes, strict=True):
            for number, size in enumerate(sizes):
                dataset.write_direct_chunk(_corner(number, geometry, array), bytes(size))
            offsets.append(_checked_offset(dataset, geometry, name, array, sizes))
    contents = image.getvalue()
    between, cursor = [], 0
    for (name, _), offset, sizes in zip(geometry.arrays, offsets, geometry.sizes, strict=True):
        if offset < cursor:
            raise _unexpected_layout(name)
        between.append(contents[cursor:offset])
        cursor = offset + sum(sizes)
    return between, offsets, contents[cursor:]


@contextmanager
def _new_file(image: io.BytesIO, store: str) -> Iterator[Any]:
    """A new HDF5 file in memory.

    h5py's driver for Python files allocates space in the order asked, without blocks reserved for small pieces, so that
    chunks follow each other without a gap. The oldest format with virtual datasets (1.10) is pinned: the most readers
    open it, and two versions of the library write the same bytes. For the same reason no object stores a time.
    """
    # Imported where it is used: readers of a store do not need h5py (docs/adr/0005).
    with needs_extra("store", "writing and checking stores in HDF5"):
        import h5py

    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, image)
    with h5py.File(h5py.h5f.create(b"in memory", h5py.h5f.ACC_TRUNC, creation, access)) as file:
        file.attrs["format"] = FORMAT
        file.attrs["store"] = store
        yield file


def _new_dataset(file: Any, geometry: _Geometry, name: str, array: ArraySpec) -> Any:
    """Create a chunked dataset without rows, with its chunk index in place."""
    with needs_extra("store", "writing and checking stores in HDF5"):
        import h5py

    properties = _dataset_properties(array)
    properties.set_chunk((geometry.shards.rows_per_chunk, *array.row_shape))
    if geometry.shards.compression is not None:
        properties.set_shuffle()
        properties.set_deflate(GZIP_LEVEL)
    properties.set_fletcher32()
    # HDF5 refuses chunks larger than the maximum shape, so the maximum is a whole shard, also for the short last one.
    space = h5py.h5s.create_simple(
        (geometry.rows, *array.row_shape), (geometry.shards.rows_per_shard, *array.row_shape)
    )
    dataset = _create(file, name, array, space, properties)
    # HDF5 creates the chunk index when the first chunk is written, which would put it between the first and the second.
    # So one byte is written first; the real chunk 0 then moves behind the index, and the others follow it.
    dataset.write_direct_chunk(_corner(0, geometry, array), b"\0")
    return dataset


def _dataset_properties(array: ArraySpec) -> Any:
    with needs_extra("store", "writing and checking stores in HDF5"):
        import h5py

    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    dtype = np.dtype(array.dtype)
    properties.set_fill_value(np.asarray(fill_value(dtype), dtype=dtype))
    return properties


def _create(file: Any, name: str, array: ArraySpec, space: Any, properties: Any) -> Any:
    with needs_extra("store", "writing and checking stores in HDF5"):
        import h5py

    kind = h5py.h5t.py_create(np.dtype(array.dtype), logical=True)
    dataset = h5py.h5d.create(file.id, name.encode(), kind, space, properties)
    for axis, label in enumerate(dimension_names(name, array)):
        h5py.h5ds.set_label(dataset, axis, label.encode())
    return dataset


def _corner(number: int, geometry: _Geometry, array: ArraySpec) -> tuple[int, ...]:
    return (number * geometry.shards.rows_per_chunk, *(0 for _ in array.row_shape))


def _checked_offset(dataset: Any, geometry: _Geometry, name: str, array: ArraySpec, sizes: Sequence[int]) -> int:
    """Return the offset of the first chunk; raise unless all others follow it without a gap."""
    chunks = [dataset.get_chunk_info_by_coord(_corner(number, geometry, array)) for number in range(len(sizes))]
    expected = chunks[0].byte_offset
    for found, size in zip(chunks, sizes, strict=True):
        # A filter mask other than 0 says that a filter, the checksum for example, was skipped for this chunk.
        if found.byte_offset != expected or found.size != size or found.filter_mask:
            raise _unexpected_layout(name)
        expected += size
    return int(chunks[0].byte_offset)


def _unexpected_layout(name: str) -> JobError:
    with needs_extra("store", "writing and checking stores in HDF5"):
        import h5py

    return JobError(
        f"HDF5 {h5py.version.hdf5_version} with h5py {h5py.__version__} does not lay the chunks of {name!r} out one "
        "after the other, so rows would have no fixed address: use container 'zarr', or another version of h5py"
    )


def _virtual_file(plan: Manifest) -> bytes:
    with needs_extra("store", "writing and checking stores in HDF5"):
        import h5py

    image = io.BytesIO()
    with _new_file(image, plan.name) as file:
        for name, array in sorted(plan.arrays.items()):
            shape = (plan.rows, *array.row_shape)
            properties = _dataset_properties(array)
            properties.set_layout(h5py.h5d.VIRTUAL)
            whole = h5py.h5s.create_simple(shape)
            for shard in range(plan.shards.count):
                rows = shard_rows(plan, shard)
                source = h5py.h5s.create_simple((len(rows), *array.row_shape))
                start = (rows.start, *(0 for _ in array.row_shape))
                whole.select_hyperslab(start, (len(rows), *array.row_shape))
                properties.set_virtual(whole, shard_path(shard).encode(), name.encode(), source)
            _create(file, name, array, h5py.h5s.create_simple(shape), properties)
    return image.getvalue()


_MODULUS = 65_535
_COLUMNS = 256
_ROWS = 256
"""A sum of at most 256 words stays below 2^24, so that float32, which NumPy adds fastest, is exact."""

_BLOCK_BYTES = 2 * _ROWS * _COLUMNS
_NUMBERS = np.arange(256, dtype=np.int64)


def fletcher32(data: NDArray[np.uint8]) -> int:
    """Return the Fletcher-32 checksum of bytes, as HDF5's filter computes it, at 5 GB/s for chunks of 128 KiB.

    HDF5 reads bytes as big-endian 16-bit words w₀ … wₙ₋₁, an odd last byte as the high half of a word, and keeps two
    sums modulo 65,535: of the words, and of the running sums, which is Σ (n − i) wᵢ. Words are arranged in rows of 256
    here: from the sums of rows and of columns, both sums follow with a few hundred multiplications. Swapping the bytes
    of a word multiplies it by 256 modulo 65,535, so little-endian words do as well.

    Args:
        data: [bytes], contiguous; any length.
    Source: `H5_checksum_fletcher32`, H5checksum.c.
    """
    words = -(-data.size // 2)
    total = running = 0
    for start in range(0, data.size, _BLOCK_BYTES):
        block = data[start : start + _BLOCK_BYTES]
        if block.size < _BLOCK_BYTES:
            # Zeros after the end change neither sum: their weight does not matter.
            block = np.concatenate([block, np.zeros(-block.size % (2 * _COLUMNS), dtype=np.uint8)])
        words_RC = block.view("<u2").reshape(-1, _COLUMNS).astype(np.float32)
        # Not `words_RC @ ones`: BLAS may start threads, which is more than a checksum should do.
        of_rows = np.einsum("rc->r", words_RC).astype(np.int64)
        of_columns = np.einsum("rc->c", words_RC).astype(np.int64)
        sum_of_words = int(of_rows.sum())
        sum_of_products = int(np.dot(_NUMBERS[: len(of_rows)], of_rows)) * _COLUMNS + int(np.dot(_NUMBERS, of_columns))
        total += sum_of_words
        running += (words - start // 2) * sum_of_words - sum_of_products
    return _fold(running) << 16 | _fold(total)


def _fold(total: int) -> int:
    # HDF5 folds carries back in, which gives 65,535 where a remainder would be 0, unless every word is 0.
    return (total * 256 - 1) % _MODULUS + 1 if total else 0
