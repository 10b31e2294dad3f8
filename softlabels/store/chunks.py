"""Chunks of a shard: sizes, padding, compression, and byte positions in a file.

A shard is the unit of commit, a chunk the unit of checksum. Uncompressed chunks have one size, so a row has a byte
address. Compressed chunks have not: they are for archives, where bytes count and rows are read in order. Measured on
ImageNet logits as f16: zstd 0.76 of the size; blosc and gzip, which shuffle bytes first, 0.66.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from softlabels.atomic_files import Buffer
from softlabels.documents import Document
from softlabels.extras import needs_extra
from softlabels.manifest import ArraySpec, Manifest, StorePath
from softlabels.row_sums import crc32c, masks, sums_of_rows

CHECKSUM_BYTES = 4
"""Both crc32c (Zarr) and fletcher32 (HDF5) append four bytes to a chunk."""

TARGET_CHUNK_BYTES = 128 << 10
"""A chunk is verified whole the first time one of its rows is read: 128 KiB take about 30 µs at 4.5 GB/s of crc32c."""

MAX_ROWS_PER_CHUNK = 4096
TARGET_SHARD_BYTES = 64 << 20
"""A shard is held in memory while it is made, and computed again when its writer dies: 64 MiB keep both small."""

MAX_ROWS_PER_SHARD = 65_536

ZSTD_LEVEL = 3
BLOSC_LEVEL = 5
"""Blosc 1 with shuffled bytes: Zarr v3 has no codec for Blosc 2, and readers of Blosc 2 decode this too."""

GZIP_LEVEL = 4
"""After HDF5's own shuffle filter; higher levels gain 1% at a third of the speed."""

# Room for sums of two such numbers in 64 bits: an offset and a size from a receipt are added before they are compared.
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


Checksums: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]*\Z")]
"""Four bytes of each chunk, as eight hex digits each, joined."""


class Part(Document, frozen=True):
    """Location of one array of one shard: its chunks, one after the other, in one file.

    Attributes:
        path, offset: file, relative to the store, and byte offset of the first chunk in it.
        stride: bytes from one chunk to the next, checksum included; 0 where chunks are compressed.
        rows: rows of the shard that hold data; the last chunk may be padded.
        checksums: the four bytes at the end of each chunk, as eight hex digits each. They tie a chunk to its position:
            an intact chunk of another position is noticed, and so is a hole in the file: its zeros have Fletcher-32 0.
        sizes: bytes of each chunk, checksum included, where chunks are compressed; None elsewhere.
        crc32c: CRC-32C of each chunk without those four bytes, in the same form, where the container's own checksum is
            another; None elsewhere, and in format version 1.
    """

    path: StorePath
    offset: Count
    stride: Count
    rows: Count
    checksums: Checksums
    sizes: tuple[Count, ...] | None = None
    crc32c: Checksums | None = None

    def ends_as_written(self, number: int, chunk: NDArray[np.uint8]) -> bool:
        """Return whether the last four bytes of a chunk are those that were written: it is no copy of another one."""
        return chunk[-CHECKSUM_BYTES:].tobytes() == _entry(self.checksums, number)

    def has_crc32c(self, number: int, chunk: NDArray[np.uint8]) -> bool:
        """Return whether a chunk without its last four bytes has the recorded CRC-32C."""
        recorded = _entry(self.crc32c or self.checksums, number)
        return crc32c(chunk[:-CHECKSUM_BYTES].data).to_bytes(CHECKSUM_BYTES, "little") == recorded

    def span(self, chunk: int) -> tuple[int, int]:
        """Return byte offset and length of a chunk in its file, checksum included."""
        if self.sizes is None:
            return self.offset + chunk * self.stride, self.stride
        return self.offset + sum(self.sizes[:chunk]), self.sizes[chunk]

    def size_bytes(self, rows_per_chunk: int) -> int:
        """Return the bytes from the first chunk to the end of the last."""
        return self.stride * chunks_in(self.rows, rows_per_chunk) if self.sizes is None else sum(self.sizes)


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One file of a shard, ready to be written: path in the store, contents in order, and location of each array."""

    path: str
    buffers: list[Buffer]
    parts: Mapping[str, Part]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        return sum(map(len, self.buffers))


def choose_rows_per_chunk(row_bytes: int) -> int:
    """Return the largest power of two rows that fit in 128 KiB, at least 1."""
    rows = max(1, TARGET_CHUNK_BYTES // max(1, row_bytes))
    return min(MAX_ROWS_PER_CHUNK, 1 << (rows.bit_length() - 1))


def choose_rows_per_shard(row_bytes: int, rows_per_chunk: int, rows: int) -> int:
    """Return the rows of a shard: about 64 MiB, whole chunks, no more than the store's `rows` need."""
    wanted = min(MAX_ROWS_PER_SHARD, max(1, TARGET_SHARD_BYTES // max(1, row_bytes)), rows)
    return max(1, -(-wanted // rows_per_chunk)) * rows_per_chunk


def shard_rows(manifest: Manifest, shard: int) -> range:
    """Return the store's row numbers that shard number `shard` holds."""
    size = manifest.shards.rows_per_shard
    return range(shard * size, min((shard + 1) * size, manifest.rows))


def chunk_stride(array: ArraySpec, rows_per_chunk: int) -> int:
    """Return the bytes of an uncompressed chunk with its checksum."""
    return array.row_bytes * rows_per_chunk + CHECKSUM_BYTES


def chunks_in(rows: int, rows_per_chunk: int) -> int:
    """Return how many chunks hold this many rows."""
    return -(-rows // rows_per_chunk)


def chunk_bodies(plan: Manifest, name: str, rows: NDArray[Any]) -> Sequence[NDArray[np.uint8]]:
    """Cut an array of a shard, [rows, *row_shape], into chunks without checksums, compressed where the plan says so.

    Returns:
        One read-only uint8 array per chunk, all of one size where chunks are not compressed. Spare rows of the last
        chunk hold the fill value.
    """
    array, per_chunk = plan.arrays[name], plan.shards.rows_per_chunk
    dtype = np.dtype(array.dtype)
    flat = np.ascontiguousarray(rows, dtype=dtype).reshape(-1).view(np.uint8)
    chunk_bytes = array.row_bytes * per_chunk
    padding = chunks_in(len(rows), per_chunk) * chunk_bytes - flat.size
    if padding:
        fill = np.full(padding // dtype.itemsize, fill_value(dtype), dtype=dtype)
        flat = np.concatenate([flat, fill.view(np.uint8)])
    # `flat` shares the caller's memory where no copy was needed. The flag is this view's own: the caller's array stays
    # writable.
    flat.flags.writeable = False
    chunks = flat.reshape(-1, chunk_bytes)
    if plan.shards.compression is None:
        return list(chunks)
    return [compress(chunk.view(dtype), plan.shards.compression) for chunk in chunks]


def with_checksums(
    bodies: Sequence[NDArray[np.uint8]],
    checksum: Callable[[NDArray[np.uint8]], int],
    *,
    compressed: bool,
    path: str,
    offset: int,
    rows: int,
    crc32c_too: bool = False,
) -> tuple[list[Buffer], Part]:
    """Return chunks, each followed by its checksum, as contents of a file; and their location from `offset` on.

    Args:
        crc32c_too: whether the location has a CRC-32C of each chunk beside its checksum.
    """
    # Little-endian in both formats: in Zarr's crc32c codec and in HDF5's Fletcher-32 filter.
    checksums = [checksum(body).to_bytes(CHECKSUM_BYTES, "little") for body in bodies]
    sizes = tuple(body.size + CHECKSUM_BYTES for body in bodies)
    part = Part(
        path=path,
        offset=offset,
        stride=0 if compressed else sizes[0],
        rows=rows,
        checksums=b"".join(checksums).hex(),
        sizes=sizes if compressed else None,
        crc32c=b"".join(crc32c(body.data).to_bytes(CHECKSUM_BYTES, "little") for body in bodies).hex()
        if crc32c_too
        else None,
    )
    return [buffer for body, end in zip(bodies, checksums, strict=True) for buffer in (body.data, end)], part


def sums_path(shard: int) -> str:
    """Return the path of a shard's row sums in the store."""
    return f"sums/{shard:08d}.u4"


def sums_of_shard(plan: Manifest, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint32]:
    """Return the CRC-32C of each row of each array, [rows, arrays], in the order of `Manifest.row_sum_names`."""
    return np.stack([sums_of_rows(arrays[name]) for name in plan.row_sum_names], axis=1)


def salt_of(sums_RA: NDArray[np.uint32]) -> int:
    """Return the salt of a shard, from its row sums: the same for the same contents, in every run and container."""
    return int.from_bytes(hashlib.sha256(sums_RA.astype("<u4").tobytes()).digest()[:4], "little")


def masked(sums_RA: NDArray[np.uint32], rows: NDArray[np.int64], salt: int) -> NDArray[np.uint32]:
    """Return row sums as they are stored, or stored ones as they were computed.

    Args:
        sums_RA: [rows, arrays].
        rows: [rows] row numbers of the store.
        salt: of their shard, see `salt_of`.
    """
    return sums_RA ^ masks(np.uint32(salt), rows)[:, None]


def fill_value(dtype: np.dtype[Any]) -> float | int:
    """Return what other readers see where nothing was written: NaN, or the integer that is least like data."""
    # Never zero: zarr and HDF5 return the fill value of a missing chunk without an error, and zeros look like logits.
    if dtype.kind == "f":
        return float("nan")
    return int(np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max)


def dimension_names(name: str, array: ArraySpec) -> tuple[str, ...]:
    """Return the names of an array's dimensions that other tools show, rows first."""
    if name == "targets":
        return ("row", "class") if len(array.row_shape) == 1 else ("row", "member", "class")
    return ("row", *(f"{name}_{axis}" for axis in range(len(array.row_shape))))


def compress(chunk: NDArray[Any], compression: str) -> NDArray[np.uint8]:
    """Return the compressed bytes of a chunk, [items] of the array's dtype."""
    if compression == "gzip":
        # As HDF5's shuffle filter does it: all first bytes of the items, then all second bytes, and so on.
        shuffled = np.ascontiguousarray(chunk.view(np.uint8).reshape(-1, chunk.itemsize).T)
        return np.frombuffer(zlib.compress(shuffled.data, GZIP_LEVEL), dtype=np.uint8)
    return np.frombuffer(_codec(compression).encode(chunk), dtype=np.uint8)


def decompress(body: bytes, compression: str, *, dtype: np.dtype[Any], size_bytes: int) -> NDArray[np.uint8]:
    """Return the bytes of a chunk, uint8 [size_bytes]; ValueError unless it decodes to exactly this many."""
    try:
        if compression == "gzip":
            inflater = zlib.decompressobj()
            # One byte more than expected: a longer stream, a bomb, is noticed without inflating all of it.
            shuffled = inflater.decompress(body, size_bytes + 1)
            if len(shuffled) == size_bytes and inflater.eof:
                return np.ascontiguousarray(np.frombuffer(shuffled, np.uint8).reshape(dtype.itemsize, -1).T).reshape(-1)
        # The codecs trust the size in the frame's header and allocate it, so a hostile header is refused first.
        elif _declared_bytes(body, compression) == size_bytes:
            out = np.empty(size_bytes, dtype=np.uint8)
            _codec(compression).decode(body, out=out)
            return out
    except (RuntimeError, zlib.error) as error:
        raise ValueError(f"a compressed chunk cannot be decoded: {error}") from error
    raise ValueError(f"a compressed chunk does not hold {size_bytes} bytes")


def _entry(joined: str, number: int) -> bytes:
    return bytes.fromhex(joined[2 * CHECKSUM_BYTES * number : 2 * CHECKSUM_BYTES * (number + 1)])


def _codec(compression: str) -> Any:
    with needs_extra("store", "reading and writing compressed stores"):
        import numcodecs

    if compression == "zstd":
        return numcodecs.Zstd(level=ZSTD_LEVEL)
    return numcodecs.Blosc(cname="zstd", clevel=BLOSC_LEVEL, shuffle=numcodecs.Blosc.SHUFFLE)


def _declared_bytes(body: bytes, compression: str) -> int:
    """Return the decoded size that a Blosc or Zstandard header declares; −1 where it declares none."""
    if compression == "blosc":
        return int.from_bytes(body[4:8], "little") if len(body) >= 16 else -1
    # RFC 8878, § 3.1.1.1: magic, descriptor, window byte unless single-segment, dictionary id, content size.
    if len(body) < 6 or body[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    descriptor = body[4]
    single = descriptor >> 5 & 1
    width = (single, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    declared = int.from_bytes(body[start : start + width], "little") if width else -1
    # A content size of two bytes is stored less 256.
    return declared + 256 if width == 2 else declared
