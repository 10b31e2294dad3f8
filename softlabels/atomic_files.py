"""Atomic files: a file appears whole or not at all (temporary file, fsync, rename, fsync of the folder).

The order matters after a power failure: a rename may reach the disk before the contents that were not synced, which
leaves an empty file under the final name; and without an fsync of the folder the rename itself may be lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

TEMPORARY = ".part"
"""Ending of a file that is still being written: never read, and removed by the next writer."""

_WRITE_BYTES = 8 << 20
"""Most bytes of one write call: large enough for full speed, small enough that Ctrl-C is noticed soon."""

_MAX_BUFFERS = 512
"""Most buffers of one write call (IOV_MAX): POSIX promises 16, Linux and macOS take 1,024."""


def write_atomically(path: Path, buffers: Iterable[Buffer], *, staging: Path | None = None) -> tuple[int, str]:
    """Write a file so that, whatever fails, `path` is the old file, the new one, or absent, and never half of one.

    Args:
        path: final path; its folder is created if missing.
        buffers: contents, in order.
        staging: path of the temporary file, on the same file system; beside `path` when left out.
    Returns:
        Size in bytes and SHA-256 in hex.
    Raises:
        OSError: as the operating system reports it (disk full, no permission); the temporary file is removed.
    """
    make_folder(path.parent)
    temporary = path.with_name(path.name + TEMPORARY) if staging is None else staging
    try:
        size, digest = _write_and_sync(temporary, buffers)
        os.replace(temporary, path)
    # BaseException, since Ctrl-C must not leave a temporary file either.
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    # If this fails, the new file is visible already but may be lost in a power failure: the caller gets the OSError.
    sync_folder(path.parent)
    return size, digest


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there replaces `path` once the context ends well.

    For libraries that open the file themselves; its folder must exist.

    Raises:
        OSError: as the operating system reports it; an existing file at `path` is unchanged.
    """
    # With the process's number, since two processes may write the same file at once; the last one wins.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        # fsync is about the file, not the descriptor: a second descriptor syncs what the library wrote through its own.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, durably."""
    if path.is_dir():
        return
    # A new name is durable once its parent folder is synced, so each level is created and synced by itself.
    make_folder(path.parent)
    # Another process may create the folder at the same time; it is synced here too, since the other may not be yet.
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    try:
        sync_folder(path.parent)
    except OSError:
        # Otherwise the next attempt would find the folder and take it for durable.
        with contextlib.suppress(OSError):
            path.rmdir()
        raise


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: without it a rename may be lost in a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def purge(folder: Path) -> list[Path]:
    """Remove the temporary files directly inside a folder; return their paths."""
    found = sorted(folder.glob("*" + TEMPORARY))
    for path in found:
        path.unlink(missing_ok=True)
    return found


def _write_and_sync(path: Path, buffers: Iterable[Buffer]) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()

    def update(batch: list[memoryview]) -> None:
        for view in batch:
            digest.update(view)

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        # SHA-256 runs at about the disk's speed, so one after the other would take twice as long; both release the GIL.
        # One worker, so that batches are hashed in order.
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="softlabels-sha256") as beside:
            hashed = []
            for batch in _batches(buffers):
                size += sum(map(len, batch))
                # A copy of the list, since `_write_all` replaces entries that were written in part.
                hashed.append(beside.submit(update, list(batch)))
                _write_all(descriptor, batch)
            os.fsync(descriptor)
    finally:
        # close() may report a delayed write error (NFS, quotas): it must reach the caller, so it is not suppressed.
        os.close(descriptor)
    # Raises what the thread raised: the digest would otherwise be of a part of the contents.
    for future in hashed:
        future.result()
    return size, digest.hexdigest()


def _batches(buffers: Iterable[Buffer]) -> Iterator[list[memoryview]]:
    """Group buffers into batches of at most one write call."""
    batch: list[memoryview] = []
    room = _WRITE_BYTES
    for buffer in buffers:
        # As bytes: `len` of a view counts items, and a batch may end inside one.
        view = memoryview(buffer).cast("B")
        while len(view):
            piece, view = view[:room], view[room:]
            batch.append(piece)
            room -= len(piece)
            if not room or len(batch) == _MAX_BUFFERS:
                yield batch
                batch, room = [], _WRITE_BYTES
    if batch:
        yield batch


def _write_all(descriptor: int, batch: list[memoryview]) -> None:
    position = 0
    while position < len(batch):
        # writev may write less than asked, without an error; the rest is written by the next call.
        written = os.writev(descriptor, batch[position:])
        while position < len(batch) and written >= len(batch[position]):
            written -= len(batch[position])
            position += 1
        if written:
            batch[position] = batch[position][written:]
