"""Safe opening of a store's files: symbolic links are refused, so that nothing outside the store is ever read."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from pathlib import Path
from typing import TypeAlias

from softlabels.errors import ManifestError, TruncatedError

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW


class OpenFolder:
    """A folder held open: what is opened through it is inside it, also after it was renamed or another took its path.

    Attributes:
        path: absolute path that it was opened by.
        descriptor: closed when the object is gone.
    Raises:
        OSError: as the operating system reports it; FileNotFoundError or NotADirectoryError where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        weakref.finalize(self, os.close, self.descriptor)

    def __truediv__(self, inside: str) -> Path:
        """Return the path that a file in it had, for messages."""
        return self.path / inside

    def is_at_its_path(self) -> bool:
        """Return whether its path still leads to it."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except OSError:
            return False


StoreRoot: TypeAlias = Path | OpenFolder
"""The folder of a store: by path, or as it was when it was opened."""


def safe_open(root: StoreRoot, path: str) -> int:
    """Open a regular file of the store at `root` for reading. The store's own folder may be a link, nothing inside it.

    Args:
        path: relative to the store, with `/` between segments.
    Returns:
        A file descriptor that the caller closes.
    Raises:
        FileNotFoundError: there is no such file.
        ManifestError: it is, or lies behind, a symbolic link, or it is not a regular file.
        OSError: as the operating system reports it.
    """
    *folders, name = path.split("/")
    if isinstance(root, OpenFolder):
        here = os.dup(root.descriptor)
    else:
        here = os.open(root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        # O_NOFOLLOW looks at the last segment only, so each folder is opened by itself, relative to the one before.
        for folder in folders:
            inner = os.open(folder, _FLAGS | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = inner
        # Opening a named pipe would block until somebody writes to it; it is refused below, not being a regular file.
        descriptor = os.open(name, _FLAGS | os.O_NONBLOCK, dir_fd=here)
    except OSError as error:
        # ELOOP: a link. ENOTDIR: a link, or a file, where a folder must be. ENXIO: a socket.
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise _not_plain(root, path) from error
        raise
    finally:
        os.close(here)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_plain(root, path)
    return descriptor


def open_committed(root: StoreRoot, path: str, *, min_bytes: int = 0) -> int:
    """Open a file of a committed shard, as `safe_open` does.

    Raises:
        TruncatedError: it is missing, or has fewer than `min_bytes`. ManifestError, OSError.
    """
    try:
        descriptor = safe_open(root, path)
    except FileNotFoundError as error:
        raise TruncatedError(f"{root / path} is missing, its shard is committed: run `softlabels repair`") from error
    size = os.fstat(descriptor).st_size
    if size < min_bytes:
        os.close(descriptor)
        raise TruncatedError(f"{root / path} has {size} bytes where {min_bytes} are needed: run `softlabels repair`")
    return descriptor


def safe_read(root: StoreRoot, path: str, *, max_bytes: int) -> bytes:
    """Return the contents of a file of the store.

    Raises:
        ManifestError: it has more than `max_bytes`, or as `safe_open` raises. FileNotFoundError, OSError.
    """
    with os.fdopen(safe_open(root, path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ManifestError(f"{root / path} has {size} bytes, more than the {max_bytes} that any real one needs")
        return file.read(size)


def _not_plain(root: StoreRoot, path: str) -> ManifestError:
    return ManifestError(
        f"{root / path} is not a plain file inside the store: links could lead anywhere on this machine, so they are "
        "not followed; copy what they point to (`cp -rL`), and delete the store if you did not make it"
    )
