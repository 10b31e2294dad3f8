"""Operations on bytes: flips, exchanges, zeros, cuts; and on the files of a store as a whole."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

Rng = np.random.Generator

WORD, BLOCK, PAGE = 8, 64, 4096
MOST_FLIPS = 64


def flip_one_bit(rng: Rng, raw: bytearray, row_bytes: int) -> None:
    """Flip a bit anywhere."""
    raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))


def flip_several_bits(rng: Rng, raw: bytearray, row_bytes: int) -> None:
    """Flip 2 to 64 bits: anywhere, in one burst, or the same bit of several words."""
    how, count = rng.integers(3), int(rng.integers(2, MOST_FLIPS + 1)) if rng.random() < 0.5 else 2
    if how == 0:
        places = rng.integers(len(raw) * 8, size=count)
    elif how == 1:
        places = (int(rng.integers(len(raw) * 8)) + rng.permutation(MOST_FLIPS)[:count]) % (len(raw) * 8)
    else:
        words = max(1, len(raw) // WORD)
        places = rng.integers(words, size=count) * WORD * 8 + int(rng.integers(WORD * 8))
        places = places[places < len(raw) * 8]
    for place in np.unique(places).tolist():
        raw[place // 8] ^= 1 << place % 8


def _exchange(rng: Rng, raw: bytearray, size: int, start: int = 0) -> None:
    count = (len(raw) - start) // size
    if count < 2:
        return
    one, two = (start + int(number) * size for number in rng.choice(count, size=2, replace=False))
    raw[one : one + size], raw[two : two + size] = raw[two : two + size], raw[one : one + size]


def exchange_words(rng: Rng, raw: bytearray, row_bytes: int) -> None:
    """Two words of 8 bytes change places, aligned as in memory or as in the rows."""
    _exchange(rng, raw, WORD, start=int(rng.integers(WORD)) if rng.random() < 0.3 else 0)


def exchange_blocks(rng: Rng, raw: bytearray, row_bytes: int) -> None:
    """Two blocks of a cache line, a sector or a chunk change places."""
    sizes = (BLOCK, 512, row_bytes * 8 + 4)
    _exchange(rng, raw, int(sizes[rng.integers(len(sizes))]))


def exchange_rows(rng: Rng, raw: bytearray, row_bytes: int) -> None:
    """Two rows change places; where rows begin is not known, so at any offset of a row."""
    _exchange(rng, raw, row_bytes, start=0 if rng.random() < 0.5 else int(rng.integers(row_bytes)))


def zero(rng: Rng, raw: bytearray, row_bytes: int) -> None:
    """Zeros, as a hole in a file has them: a word, a cache line, a sector, a page, all; or where all bits were set."""
    if rng.random() < 0.3 and (runs := [found.span() for found in re.finditer(rb"\xff{4,}", bytes(raw))]):
        begin, end = runs[int(rng.integers(len(runs)))]
        raw[begin:end] = bytes(end - begin)
        return
    size = min(len(raw), int((WORD, BLOCK, 512, PAGE, len(raw))[rng.integers(5)]))
    begin = int(rng.integers(max(1, len(raw) - size + 1)))
    begin -= begin % min(size, PAGE) if size < len(raw) else begin
    raw[begin : begin + size] = bytes(len(raw[begin : begin + size]))


def truncate(rng: Rng, raw: bytearray, row_bytes: int) -> None:
    """Anything from nothing to all but a byte is left."""
    del raw[(0, len(raw) // 2, len(raw) - 1, int(rng.integers(len(raw))))[rng.integers(4)] :]


def extend(rng: Rng, raw: bytearray, row_bytes: int) -> None:
    """Zeros, noise or a repetition of its own bytes follow the end."""
    size = int((1, WORD, row_bytes, PAGE)[rng.integers(4)])
    raw += (bytes(size), rng.bytes(size), bytes(raw[-size:]))[rng.integers(3)]


OF_BYTES: dict[str, Callable[[Rng, bytearray, int], None]] = {
    "flip one bit": flip_one_bit,
    "flip several bits": flip_several_bits,
    "exchange words": exchange_words,
    "exchange blocks": exchange_blocks,
    "exchange rows": exchange_rows,
    "zero": zero,
    "truncate": truncate,
    "extend": extend,
}


def changed(rng: Rng, operation: str, raw: bytes, row_bytes: int) -> bytes:
    """Return these bytes after an operation; the same ones where it changes nothing, as an exchange of equals."""
    found = bytearray(raw)
    if found:
        OF_BYTES[operation](rng, found, max(1, row_bytes))
    elif operation == "extend":
        found += bytes(WORD)
    return bytes(found)
