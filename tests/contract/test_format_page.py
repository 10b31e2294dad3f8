"""docs/format.md suffices to write a reader: the function on the page reads stores of both containers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.documents import as_json

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read_rows() -> Any:
    """The function on the page."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    return names["read_rows"]


class TestPage:
    @pytest.mark.parametrize("kind", ["zarr", "hdf5"], indirect=True)
    @pytest.mark.parametrize("ids", ["dense", "strings"])
    def test_its_reader_reads(self, make_store: Any, kind: Any, ids: str, read_rows: Any) -> None:
        """Every array of rows from all shards, bit by bit, without softlabels."""
        made = make_store(kind, ids=ids)
        made.write()
        rows = [0, 199, 64, 63, 17, 17]
        assert read_rows(made.root, "targets", rows).tobytes() == made.encoded["targets"][rows].tobytes()
        assert np.array_equal(read_rows(made.root, "labels", rows), made.labels[rows])
        assert np.array_equal(read_rows(made.root, "fingerprints", rows), made.fingerprints[rows])

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
