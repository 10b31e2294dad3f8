"""How a file comes to be whole or not at all: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

TEMPORARY = ".part"
"""Ending of a file that is still being written; such a file is never read, and purged by the next writer."""

_WRITE_BYTES = 8 << 20
"""One write call at most: large enough to stream, small enough that Ctrl-C is heard."""


def write_atomically(path: Path, buffers: Iterable[Buffer], *, staging: Path | None = None) -> tuple[int, str]:
    """Write a file so that, whatever fails, `path` is the old file, the new one, or absent, and never half of one.

    Args:
        path: the final place; its folder is made where it is missing.
        buffers: contents, in order.
        staging: the temporary file, on the same file system; beside `path` when left out.
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
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
    return size, digest


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each of them durable."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    try:
        sync_folder(path.parent)
    except OSError:
        # Or the next attempt would find the folder there and take it for durable.
        with contextlib.suppress(OSError):
            path.rmdir()
        raise


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: after a power loss a renamed file is where it was renamed to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def purge(folder: Path) -> list[Path]:
    """Remove the temporary files directly in a folder; returns what was removed."""
    removed = []
    for path in sorted(folder.glob("*" + TEMPORARY)) if folder.is_dir() else []:
        path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def _write_and_sync(path: Path, buffers: Iterable[Buffer]) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            digest.update(view)
            size += len(view)
            while len(view):
                view = view[os.write(descriptor, view[:_WRITE_BYTES]) :]
        os.fsync(descriptor)
    finally:
        _close(descriptor)
    return size, digest.hexdigest()


def _close(descriptor: int) -> Any:
    # close() may report a delayed write error (NFS, quotas): it must reach the caller, so it is not suppressed.
    os.close(descriptor)
