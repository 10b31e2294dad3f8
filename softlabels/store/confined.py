"""How is a store's file opened so that nothing outside the store is ever read? Segment by segment, links refused."""

from __future__ import annotations

import errno
import os
import stat
import tokenize
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import ManifestError

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
# A named pipe would hold its opener until somebody writes; as no regular file it is refused once it is open.
_FILE = _FLAGS | os.O_NONBLOCK
_FOLDER = _FLAGS | os.O_DIRECTORY

_UNREADABLE = (
    *(FileNotFoundError, ValueError, EOFError, SyntaxError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, tokenize.TokenError),
)
"""What NumPy raises of a `.npy` file with flipped bits: it parses the header as Python."""


def open_confined(root: Path, path: str) -> int:
    """Open a regular file of the store at `root` for reading; the store's own folder may be a link, nothing in it.

    Args:
        path: relative to the store, with `/` between segments.
    Returns:
        A file descriptor, the caller's to close.
    Raises:
        FileNotFoundError: there is no such file.
        ManifestError: it is, or lies behind, a symbolic link, or it is no regular file.
        OSError: as the operating system reports it.
    """
    *folders, name = path.split("/")
    here = os.open(root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER, dir_fd=here)
            os.close(here)
            here = inner
        descriptor = os.open(name, _FILE, dir_fd=here)
    except OSError as error:
        # A link is ELOOP, where a folder must stand ENOTDIR; a socket is ENXIO.
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise _no_plain_file(root, path) from error
        raise
    finally:
        os.close(here)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_plain_file(root, path)
    return descriptor


def read_confined(root: Path, path: str, *, most_bytes: int) -> bytes:
    """The contents of a file of the store, at most so many bytes.

    Raises:
        ManifestError: larger, or as `open_confined` finds it. FileNotFoundError, OSError.
    """
    with os.fdopen(open_confined(root, path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise ManifestError(f"{root / path} has {size} bytes, more than the {most_bytes} that any real one needs")
        return file.read(size)


def map_confined(root: Path, path: str) -> NDArray[Any]:
    """An array in a `.npy` file of the store, mapped.

    Raises:
        ManifestError: missing, damaged, no plain array, or as `open_confined` finds it. OSError.
    """
    try:
        os.close(open_confined(root, path))
        loaded = np.load(root / path, mmap_mode="r", allow_pickle=False)
    except _UNREADABLE as error:
        raise ManifestError(f"{root / path} cannot be read ({error}): run `softlabels repair`") from error
    if not isinstance(loaded, np.ndarray):
        loaded.close()
        raise ManifestError(f"{root / path} is an archive, not an array: run `softlabels repair`")
    return loaded


def _no_plain_file(root: Path, path: str) -> ManifestError:
    return ManifestError(
        f"{root / path} is not a plain file inside the store: links could lead anywhere on this machine, so they are "
        "not followed; copy what they point to (`cp -rL`), and delete the store if you did not make it"
    )
