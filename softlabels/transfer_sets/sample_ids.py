"""Sample ids of a transfer set: compact storage of strings, and the search for duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError
from softlabels.ids import MAX_STRING_ID_BYTES, IdArray, utf8
from softlabels.manifest import IdSpec

MAX_CHECKED_IDS = 1 << 24
"""Largest number of ids that is searched for duplicates before a job begins (128 MiB of hashes). In larger sets the
store finds duplicates when it is finished."""


IDS_PER_BLOCK = 1 << 14
"""Ids that are read at a time where all of them are: 128 KiB of integers."""


class PackedStrings:
    """Strings by position: all UTF-8 bytes in one buffer beside their offsets, a third of the memory of a list.

    Raises:
        BadIdsError: a string that is empty, not UTF-8, or too long to be an id.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        text, ends = bytearray(), [0]
        for string in strings:
            text += _encoded(string)
            ends.append(len(text))
        self._text = bytes(text)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, position: int) -> str:
        return self._bytes_at(position).decode()

    def __iter__(self) -> Iterator[str]:
        return (self[position] for position in range(len(self)))

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.str_]:
        """Return the strings at these positions, [B]."""
        return np.array([self[position] for position in positions.tolist()], dtype=np.str_)

    def blocks(self) -> Iterator[NDArray[np.str_]]:
        """Yield all strings in order, in blocks of bounded memory."""
        for start in range(0, len(self), IDS_PER_BLOCK):
            yield self.take(np.arange(start, min(start + IDS_PER_BLOCK, len(self))))

    def id_spec(self) -> IdSpec:
        """Return how a store keeps these strings as ids."""
        return IdSpec(kind="str", width_bytes=max(1, int(np.diff(self._ends).max(initial=0))))

    def find_duplicate(self) -> str | None:
        """Return a string that occurs more than once, None if all differ."""
        digests = (hashlib.blake2b(self._bytes_at(position), digest_size=8).digest() for position in range(len(self)))
        numbers = (
            int.from_bytes(digest, "little") for digest in digests
        )  # one at a time: a list would fill the memory
        pair = _equal_pair(np.fromiter(numbers, dtype="<u8", count=len(self)))
        if pair is None:
            return None
        first, second = (self[position] for position in pair)
        if first == second:
            return first
        # Different strings may share a 64-bit hash (chance 1e-5 among 10^7): only then is every string compared.
        return next((string for string, count in Counter(self).items() if count > 1), None)

    def _bytes_at(self, position: int) -> bytes:
        return self._text[self._ends[position] : self._ends[position + 1]]


def examine_ids(blocks: Iterable[IdArray], count: int, name: str) -> IdSpec:
    """Return how a store keeps the `count` ids in these blocks, after a search for duplicates.

    Raises:
        BadIdsError: an id occurs twice (named), or some ids are integers and some strings.
    """
    pieces: list[IdArray] = []
    previous: int | None = None
    start, width, dense, kinds = 0, 0, True, set()
    for block in blocks:
        kinds.add(block.dtype.kind)
        if len(kinds) > 1:
            raise BadIdsError(f"sample ids of {name!r} are integers and strings mixed: choose one kind")
        if block.dtype.kind == "U":
            width, dense = max(width, utf8(block).dtype.itemsize), False
        else:
            start = int(block[0]) if previous is None else start
            joins = previous is None or int(block[0]) == previous + 1
            dense, previous = dense and joins and bool((np.diff(block) == 1).all()), int(block[-1])
        if count <= MAX_CHECKED_IDS:
            pieces.append(block)
    if not dense and pieces:
        _refuse_duplicates(pieces, name)
    if "U" in kinds:
        return IdSpec(kind="str", width_bytes=width)
    return IdSpec(kind="int", dense_start=start if dense else None)


def ids_sha256(blocks: Iterable[IdArray]) -> str:
    """Return the SHA-256 over all ids in order, however they are cut into blocks."""
    contents, lengths = hashlib.sha256(), hashlib.sha256()
    for block in blocks:
        if block.dtype.kind == "U":
            encoded = [text.encode() for text in block.tolist()]
            contents.update(b"".join(encoded))
            lengths.update(np.array([len(text) for text in encoded], dtype="<i8").tobytes())
        else:
            contents.update(block.astype("<i8").tobytes())
    return hashlib.sha256(contents.digest() + lengths.digest()).hexdigest()


def _refuse_duplicates(pieces: list[IdArray], name: str) -> None:
    duplicate: object
    if pieces[0].dtype.kind == "U":
        duplicate = PackedStrings(text for piece in pieces for text in piece.tolist()).find_duplicate()
    else:
        ids = np.concatenate(pieces).astype(np.int64, copy=False)
        pair = _equal_pair(ids)
        duplicate = None if pair is None else int(ids[pair[0]])
    if duplicate is not None:
        raise BadIdsError(
            f"sample id {duplicate!r} occurs twice in transfer set {name!r}: each sample needs an id of its own, or a "
            "student would get the targets of another sample",
            id=duplicate,
        )


def _encoded(string: str) -> bytes:
    try:
        text = string.encode()
    except UnicodeEncodeError as error:
        raise BadIdsError(f"{string!r} is not UTF-8, so it cannot be a sample id: rename it") from error
    if not 0 < len(text) <= MAX_STRING_ID_BYTES or b"\0" in text:
        raise BadIdsError(
            f"{string[:80]!r} cannot be a sample id: ids have 1 to {MAX_STRING_ID_BYTES} bytes of UTF-8 without NUL"
        )
    return text


def _equal_pair(values: NDArray[np.int64] | NDArray[np.uint64]) -> tuple[int, int] | None:
    """Return the positions of two equal values."""
    order = np.argsort(values, kind="stable")
    inside = np.flatnonzero(values[order[1:]] == values[order[:-1]])
    return None if len(inside) == 0 else (int(order[inside[0]]), int(order[inside[0] + 1]))
