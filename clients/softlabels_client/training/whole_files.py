"""How does a file come to be whole or not at all? Written beside its place, made durable, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Ending of a file that is still being written."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the block a place to write to; what it wrote is at `path` once it ends well, and nowhere otherwise.

    Raises:
        OSError: the folder does not exist, or the disk is full; what was at `path` before is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
