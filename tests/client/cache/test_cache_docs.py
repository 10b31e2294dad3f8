"""docs/cache.md, run as a reader would run it, and compared with what it describes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from softlabels.store import LocalRows
from softlabels_client.cache.row_records import record_type
from softlabels_client.cache.row_table import shape_within

PAGE = Path(__file__).resolve().parents[3] / "docs" / "cache.md"
BLOCK = re.compile(r"<!-- run -->\n```python\n(.*?)```", re.DOTALL)


def test_every_block_runs(served_store: str, tmp_path: Path) -> None:
    """As written but for the address, with a cache where the environment says."""
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 2
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block.replace("http://127.0.0.1:8000/photographs", served_store)],
            env={**os.environ, "SOFTLABELS_CACHE": str(tmp_path / "kept")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "kept").glob("rows-v2/*/table.json"))) == 1


@pytest.mark.parametrize("kind", ["dense", "strings"])
def test_the_files_are_those_of_the_page(kind: str, stores: dict[str, Path]) -> None:
    """Their names, and what a record, an entry of the index and an id take."""
    text = PAGE.read_text(encoding="utf-8")
    manifest = LocalRows(stores[kind]).manifest
    shape = shape_within(manifest, 1 << 30)
    assert shape is not None
    assert set(shape.sizes) == {"rows", "index"} | ({"ids"} if kind == "strings" else set())
    assert all(f"/{name} " in text for name in ("rows", "index", "ids", "in-use", "writing", "lock", "table.json"))
    words = (8 + 24 + 8) + (8 + 8) + (16 + 8)  # the key and six f32, a label, a fingerprint, each with its checksum
    assert record_type(shape.fields).itemsize == words
    assert shape.sizes["rows"] == 120 * words
    assert shape.sizes["index"] == (8 + 120 * 8 if kind == "dense" else 8 + 180 * 16)
    assert shape.sizes.get("ids", 0) == (0 if kind == "dense" else 120 * (8 + 32 + 8))
