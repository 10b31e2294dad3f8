"""Tests of the CRC-32C of rows and of rows joined together."""

from __future__ import annotations

import numpy as np
import pytest

from softlabels.row_sums import (
    append_arrays,
    append_sum,
    crc32c,
    join_arrays,
    join_sums,
    masks,
    sum_of_array,
    sums_of_rows,
)

CHECK_VALUE = 0xE3069283
"""CRC-32C of b"123456789" in the catalogue of parametrised CRC algorithms."""


def test_crc32c_is_castagnolis() -> None:
    """The published check value, RFC 3720."""
    assert crc32c(b"123456789") == CHECK_VALUE
    assert sum_of_array(np.frombuffer(b"123456789", dtype=np.uint8)) == CHECK_VALUE
    assert append_sum(crc32c(b"1234"), crc32c(b"56789"), 5) == CHECK_VALUE
    assert append_sum(CHECK_VALUE, crc32c(b""), 0) == CHECK_VALUE


@pytest.mark.parametrize("row_bytes", [1, 8, 80, 128, 129, 2000])
@pytest.mark.parametrize("rows", [0, 1, 2, 255, 256, 257, 600])
def test_sums_of_rows_join_to_the_sum_of_all_bytes(row_bytes: int, rows: int) -> None:
    """Of any number of rows of any size, as if their bytes were summed in one go."""
    array = np.random.default_rng(rows + row_bytes).integers(0, 256, (rows, row_bytes), dtype=np.uint8)
    sums = sums_of_rows(array)
    assert sums.tolist() == [crc32c(row.tobytes()) for row in array]
    assert join_sums(sums, row_bytes) == crc32c(array.tobytes())


@pytest.mark.parametrize("rows", [0, 1, 5, 256, 3000])
def test_sums_of_several_arrays_join_in_the_order_of_their_bytes(rows: int) -> None:
    """Some of the arrays, in any order; those that no sum was kept for are read."""
    rng = np.random.default_rng(rows)
    kept = {
        name: rng.integers(0, 256, (rows, size), dtype=np.uint8) for name, size in zip("abc", (40, 8, 3), strict=True)
    }
    sums = np.stack([sums_of_rows(array) for array in kept.values()], axis=1)
    assert join_arrays(sums, ((2, 3), (0, 40))) == crc32c(kept["c"].tobytes() + kept["a"].tobytes())
    read = np.arange(7, dtype=">i4")
    for names in ("cab", "crb", "r", "b"):
        arrays = {name: read if name == "r" else kept[name] for name in names}
        joined = b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays.values())
        for known in (sums, None):
            assert append_arrays(crc32c(b"before"), arrays, known, "abc") == crc32c(b"before" + joined)


def test_more_rows_than_two_levels_of_blocks_hold() -> None:
    """Blocks of blocks of 256 rows."""
    array = np.random.default_rng(0).integers(0, 256, (70_000, 3), dtype=np.uint8)
    assert join_sums(sums_of_rows(array), 3) == crc32c(array.tobytes())


def test_big_endian_and_strided_arrays_are_summed_as_little_endian_rows() -> None:
    """As they are stored, however they lie in memory."""
    array = np.arange(600, dtype="<f4").reshape(20, 30)
    expected = [crc32c(row.tobytes()) for row in array]
    assert sums_of_rows(array.astype(">f4")).tolist() == expected
    assert sums_of_rows(np.asfortranarray(array)).tolist() == expected
    assert sum_of_array(np.asfortranarray(array)) == crc32c(array.tobytes())


def test_an_exchange_of_rows_changes_the_joined_sum() -> None:
    """The order counts, which a sum of words does not see."""
    array = np.random.default_rng(1).integers(0, 256, (256, 40), dtype=np.uint8)
    exchanged = array.copy()
    exchanged[[3, 200]] = array[[200, 3]]
    assert join_sums(sums_of_rows(array), 40) != join_sums(sums_of_rows(exchanged), 40)


def test_masks_differ_between_rows_and_between_salts() -> None:
    """So a sum that was moved to another row or version does not fit."""
    rows = np.arange(100_000, dtype=np.int64)
    assert len(np.unique(masks(np.uint32(7), rows))) == len(rows)
    assert (masks(np.uint32(7), rows) != masks(np.uint32(8), rows)).all()
    assert masks(np.uint32(7), np.array([1 << 40], dtype=np.int64)).dtype == np.uint32
