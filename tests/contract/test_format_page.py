"""docs/format.md suffices to write a reader: the functions on the page read and check stores of both containers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.documents import as_json

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The functions on the page, by name."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    return names


class TestPage:
    @pytest.mark.parametrize("kind", ["zarr", "hdf5"], indirect=True)
    @pytest.mark.parametrize("ids", ["dense", "strings"])
    def test_its_reader_reads(self, make_store: Any, kind: Any, ids: str, page: dict[str, Any]) -> None:
        """Every array of rows from all shards, bit by bit, without softlabels."""
        made = make_store(kind, ids=ids)
        made.write()
        read_rows = page["read_rows"]
        rows = [0, 199, 64, 63, 17, 17]
        assert read_rows(made.root, "targets", rows).tobytes() == made.encoded["targets"][rows].tobytes()
        assert np.array_equal(read_rows(made.root, "labels", rows), made.labels[rows])
        assert np.array_equal(read_rows(made.root, "fingerprints", rows), made.fingerprints[rows])

    @pytest.mark.parametrize("kind", ["zarr", "hdf5"], indirect=True)
    def test_its_checker_checks(self, make_store: Any, kind: Any, place: Any, page: dict[str, Any]) -> None:
        """The sums of every shard are right, and a bit that is flipped in a row is found, without softlabels."""
        made = make_store(kind, ids="strings")
        made.write()
        for shard in range(4):
            page["check_sums"](made.root, shard)
        path, offset, _ = place(made.root, "labels", 2, 1)
        contents = bytearray(path.read_bytes())
        contents[offset + 4 * 5] ^= 1
        path.write_bytes(contents)
        with pytest.raises(AssertionError, match="row 149 of labels"):
            page["check_sums"](made.root, 2)

    def test_it_names_every_file(self, make_store: Any, kind: Any) -> None:
        """No file or folder of a finished store goes unmentioned."""
        made = make_store(kind, ids="strings")
        made.write()
        named = [*made.root.iterdir(), *(made.root / "index").iterdir()]
        assert [path.name for path in named if path.name not in PAGE and path.name not in made.plan.arrays] == []

    def test_it_explains_every_key_of_a_manifest(self, make_store: Any, kind: Any) -> None:
        """A key that is added to the manifest or to a receipt is added to the page."""
        made = make_store(kind)
        writer = made.write()
        receipt = as_json(writer.ledger.read(0))
        keys = {*made.plan.to_json(), *receipt, *receipt["parts"]["targets"]} - {"format"}
        assert [key for key in sorted(keys) if f"`{key}`" not in PAGE] == []
