"""Verified table: a `.npy` file of a store, mapped, and compared with its SHA-256 before anything is read from it."""

from __future__ import annotations

import hashlib
import io
import os
import tokenize
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import ManifestError
from softlabels.mapping_guard import stable_read
from softlabels.row_sums import crc32c
from softlabels.store.address_space import ALIGNMENT_BYTES, AddressSpace
from softlabels.store.safe_open import OpenFolder, safe_open

_PAGE_BYTES = 4096
_MAX_HEADER_BYTES = 1 << 16
# What NumPy raises for a `.npy` file with flipped bits: it parses the header as Python.
_BAD_HEADER = (ValueError, EOFError, SyntaxError, OverflowError, MemoryError, tokenize.TokenError)


class VerifiedTable:
    """An array in a `.npy` file of a store. Opening it reads the header only. Safe under threads and after fork.

    Args:
        folder: the store's folder.
        path: of the file, relative to the folder.
        shape, dtype: what it must hold; strings (`|S`) may have any width.
        sha256: digest of the file, None where the manifest gives none: nothing is read then.
        verify_first: compare it before the first read, and compare the pages that `take` reads with sums of theirs that
            were kept then; otherwise only `verify` compares it.
    Raises:
        ManifestError: the file is missing or holds something else; from every method also: it is damaged.
    """

    def __init__(
        self,
        folder: OpenFolder,
        path: str,
        shape: tuple[int, ...],
        dtype: str,
        *,
        sha256: str | None,
        verify_first: bool = True,
    ) -> None:
        self._folder, self._path, self._shape, self._sha256 = folder, path, shape, sha256
        self._verify_first = self._checks_pages = verify_first
        try:
            descriptor = safe_open(folder, path)
            try:
                size, raw = os.fstat(descriptor).st_size, os.pread(descriptor, _MAX_HEADER_BYTES, 0)
            finally:
                os.close(descriptor)
            found, in_columns, self._dtype, self._offset = _npy_header(raw)
        except (FileNotFoundError, *_BAD_HEADER) as error:
            raise ManifestError(f"{folder / path} cannot be read ({error}): run `softlabels repair`") from error
        if found != shape or in_columns or not self._dtype.str.startswith(dtype):
            raise ManifestError(
                f"{folder / path} is {self._dtype}{found}, the manifest says {dtype}{shape}: run `softlabels repair`"
            )
        # The product cannot exceed 64 bits: the manifest's numbers are bounded, and the width is below 64 KiB.
        self._size = self._offset + self._dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if size != self._size:
            raise ManifestError(f"{folder / path} has {size} bytes, {self._size} were written: run `softlabels repair`")
        self._space = AddressSpace(slots=1, slot_bytes=self._size, blocks_per_slot=1)
        # The position of a slot never changes.
        self._array: NDArray[Any] = np.ndarray(shape, self._dtype, self._space.buffer, ALIGNMENT_BYTES + self._offset)
        self._page_sums: list[int] = []

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return rows of the array, copied."""
        return stable_read(lambda: self.take_once(rows))

    def take_once(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Do as `take`; to be called by `stable_read`."""
        found: NDArray[Any] = self.array()[rows]
        if self._checks_pages:
            self._check_pages(rows)
        return found

    def array(self) -> NDArray[Any]:
        """Return the mapped array, verified; to be called by `stable_read`, and copied from at once."""
        self._space.check_sizes()
        while not self._space.base[0]:
            self._open()
        return self._array

    def verify(self) -> None:
        """Compare the file with its SHA-256, now and whenever it was written to."""
        self._verify_first = True
        self._open()

    def _open(self) -> None:
        """Map the file and mark it as readable; it stays unmarked if it changes meanwhile."""
        if not self._space.begin[0]:
            self._space.map(0, self._folder, self._path, offset=0, length=self._size)
        generation = self._space.generation
        # After the generation: a file that is invalidated in between is not mapped.
        begin = int(self._space.begin[0])
        if not begin:
            return
        contents = self._space.buffer[begin : begin + self._size]
        if self._verify_first:
            # Of the bytes that are read later, and not of a second look at the file.
            sha256 = hashlib.sha256(contents).hexdigest()
            if self._space.generation != generation:
                return
            if sha256 != self._sha256:
                raise ManifestError(
                    f"{self._folder / self._path} is damaged, it could lead to wrong rows: run `softlabels repair`"
                )
            if self._checks_pages:
                pages = range(0, self._size, _PAGE_BYTES)
                self._page_sums = [crc32c(contents[page : page + _PAGE_BYTES]) for page in pages]
        self._space.mark(0, begin, generation)

    def _check_pages(self, rows: NDArray[np.int64]) -> None:
        row_bytes = (self._size - self._offset) // self._shape[0]
        first = self._offset + rows * row_bytes
        begin = int(self._space.begin[0])
        for page in np.unique(np.concatenate([first, first + row_bytes - 1]) // _PAGE_BYTES).tolist():
            at = begin + page * _PAGE_BYTES
            if crc32c(self._space.buffer[at : min(at + _PAGE_BYTES, begin + self._size)]) != self._page_sums[page]:
                self._space.invalidate(0)  # verified as a whole at the next attempt


def _npy_header(raw: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, whether columns come first, dtype, and where the data begin; raise _BAD_HEADER."""
    stream = io.BytesIO(raw)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(stream)
    return shape, in_columns, dtype, stream.tell()
