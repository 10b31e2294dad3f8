"""Where a row lies: shards, chunks, and byte addresses inside a shard's file."""

from __future__ import annotations

from dataclasses import dataclass

from softlabels.manifest import ArraySpec, Manifest

CHECKSUM_BYTES = 4
"""Both crc32c (Zarr) and fletcher32 (HDF5) append four bytes to a chunk."""

TARGET_CHUNK_BYTES = 128 << 10
"""A chunk is verified whole the first time one of its rows is read: 128 KiB take about 30 µs at 4.5 GB/s of crc32c."""

MAX_ROWS_PER_CHUNK = 4096
TARGET_SHARD_BYTES = 64 << 20
"""A shard is computed again when its writer dies, and held in memory while it is made: 64 MiB keep both small."""

MAX_ROWS_PER_SHARD = 65_536


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where one array of one shard lies: chunks one after the other, in one file.

    Attributes:
        path: of the file, relative to the store.
        offset: of the first chunk, bytes.
        stride: from one chunk to the next, bytes: the chunk and its checksum; 0 where chunks are compressed.
        rows: how many rows of the shard are real; the last chunk may be padded.
        checksums: what each chunk ends with, eight hex digits each. They bind a chunk to its place: one that is sound
            but belongs elsewhere is found out, and so is a hole, which reads as zeros, whose Fletcher-32 is zero.
        sizes: bytes of each chunk with its checksum, where chunks are compressed; None elsewhere.
    """

    path: str
    offset: int
    stride: int
    rows: int
    checksums: str
    sizes: tuple[int, ...] | None = None

    def checksum(self, chunk: int) -> bytes:
        """The last four bytes of a chunk, as they were written."""
        return bytes.fromhex(self.checksums[2 * CHECKSUM_BYTES * chunk : 2 * CHECKSUM_BYTES * (chunk + 1)])


def part_bytes(part: Part, rows_per_chunk: int) -> int:
    """Bytes that an array of a shard takes in its file, from its first chunk to the end of its last."""
    return part.stride * chunks_in(part.rows, rows_per_chunk) if part.sizes is None else sum(part.sizes)


def choose_rows_per_chunk(row_bytes: int) -> int:
    """Rows a chunk: the power of two that comes nearest below 128 KiB."""
    rows = max(1, TARGET_CHUNK_BYTES // max(1, row_bytes))
    return int(min(MAX_ROWS_PER_CHUNK, 1 << (rows.bit_length() - 1)))


def choose_rows_per_shard(row_bytes: int, rows_per_chunk: int, rows: int) -> int:
    """Rows a shard: about 64 MiB, a whole number of chunks, no more than the store needs."""
    wanted = min(MAX_ROWS_PER_SHARD, max(1, TARGET_SHARD_BYTES // max(1, row_bytes)), rows)
    return max(1, -(-wanted // rows_per_chunk)) * rows_per_chunk


def shard_rows(manifest: Manifest, shard: int) -> range:
    """The rows of the store that shard number `shard` holds."""
    size = manifest.shards.rows_per_shard
    return range(shard * size, min((shard + 1) * size, manifest.rows))


def chunk_stride(array: ArraySpec, rows_per_chunk: int) -> int:
    """Bytes from one chunk to the next."""
    return array.row_bytes * rows_per_chunk + CHECKSUM_BYTES


def chunks_in(rows: int, rows_per_chunk: int) -> int:
    """How many chunks hold this many rows."""
    return -(-rows // rows_per_chunk)
