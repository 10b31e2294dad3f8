"""How are many names kept in little memory, and a name that stands twice found?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError
from softlabels.ids import MAX_STRING_ID_BYTES, IdArray, utf8
from softlabels.manifest import IdSpec

MOST_CHECKED_IDS = 1 << 24
"""Ids among which repeats are looked for before a job begins, in 128 MiB; of more, when the store is finished."""


@runtime_checkable
class SupportsIdSpec(Protocol):
    """A transfer set that can tell, before any sample is read, how a store is to keep its ids."""

    def id_spec(self) -> IdSpec:
        """How a store keeps the ids."""
        ...


class PackedNames:
    """Names by position: their UTF-8 end to end, and where each begins, which takes a third of a list of strings.

    Args:
        names: in their order.
    Raises:
        BadIdsError: a name that is empty, no UTF-8, or too long to be an id.
    """

    def __init__(self, names: Iterable[str]) -> None:
        text, ends = bytearray(), [0]
        for name in names:
            text += _encoded(name)
            ends.append(len(text))
        self._text = bytes(text)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, position: int) -> str:
        return self._text[self._ends[position] : self._ends[position + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[position] for position in range(len(self)))

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.str_]:
        """The names at these positions, [B]."""
        return np.array([self[position] for position in positions.tolist()], dtype=np.str_)

    def id_spec(self) -> IdSpec:
        """How a store keeps these names as ids."""
        return IdSpec(kind="str", width_bytes=max(1, int(np.diff(self._ends).max(initial=0))))

    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of a hash of each, [N]."""
        found = np.empty(len(self), dtype="<u8")
        for position in range(len(self)):
            name = self._text[self._ends[position] : self._ends[position + 1]]
            found[position] = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        return found

    def repeated(self) -> str | None:
        """A name that stands twice, None where there is none."""
        pair = _equal_pair(self.hashes())
        if pair is None:
            return None
        first, second = (self[position] for position in pair)
        # Of 10^7 names, two different ones share 64 bits with a chance of 10^-5: then every one is looked at.
        return first if first == second else _first_repeat(self)


def examine_ids(blocks: Iterable[IdArray], count: int, name: str) -> IdSpec:
    """How a store keeps these ids, of which none stands twice.

    Args:
        blocks: all of them, in order, a block at a time.
        count: how many there are.
        name: of the transfer set, for messages.
    Raises:
        BadIdsError: an id stands twice (named), or some are integers and some strings.
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
        if count <= MOST_CHECKED_IDS:
            pieces.append(block)
    if not dense and pieces:
        _refuse_repeats(pieces, name)
    if "U" in kinds:
        return IdSpec(kind="str", width_bytes=width)
    return IdSpec(kind="int", dense_start=start if dense else None)


def _refuse_repeats(pieces: list[IdArray], name: str) -> None:
    twice: object = None
    if pieces[0].dtype.kind == "U":
        twice = PackedNames(text for piece in pieces for text in piece.tolist()).repeated()
    else:
        ids = np.concatenate(pieces).astype(np.int64, copy=False)
        pair = _equal_pair(ids)
        twice = None if pair is None else int(ids[pair[0]])
    if twice is not None:
        raise BadIdsError(
            f"sample id {twice!r} stands twice in transfer set {name!r}: each sample needs an id of its own, or a "
            "student would get the targets of another one",
            id=twice,
        )


def _encoded(name: str) -> bytes:
    try:
        text = name.encode()
    except UnicodeEncodeError as error:
        raise BadIdsError(f"{name!r} is no UTF-8, so it cannot be a sample id: rename it") from error
    if not 0 < len(text) <= MAX_STRING_ID_BYTES or b"\0" in text:
        raise BadIdsError(
            f"{name[:80]!r} cannot be a sample id: it takes 1 to {MAX_STRING_ID_BYTES} bytes of UTF-8 without NUL"
        )
    return text


def _equal_pair(values: NDArray[np.int64] | NDArray[np.uint64]) -> tuple[int, int] | None:
    """The positions of two values that are equal."""
    order = np.argsort(values, kind="stable")
    inside = np.flatnonzero(values[order[1:]] == values[order[:-1]])
    return None if len(inside) == 0 else (int(order[inside[0]]), int(order[inside[0] + 1]))


def _first_repeat(names: PackedNames) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
