"""The sums of rows that a reply's checksum is made of: kept since the rows were verified, not taken of what is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels import wire
from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.manifest import IdSpec, RowLayout, TemperatureSpec, TransferSetSpec
from softlabels.store import LocalRows, StoreWriter, plan_store


def made(root: Path, *, classes: int, samples: int = 200, views: int = 1) -> LocalRows:
    """A store of random f16 rows, in several shards of which the last is short."""
    encoding = make_encoding("f16", classes=classes)
    layout = RowLayout(kind="views", samples=samples, rows=samples * views, views=views) if views > 1 else None
    plan = plan_store(
        name="sums",
        samples=samples,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=1.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="noise", source="tests:noise", arguments={}),
        rows_per_shard=96,
        rows_per_chunk=32,
        layout=layout,
    )
    writer = StoreWriter.create(root, plan)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            logits = np.random.default_rng(shard).normal(size=(len(claim.rows), classes)).astype(np.float32)
            claim.commit(
                ids=np.arange(claim.rows.start, claim.rows.stop) // views,
                encoded=encoding.encode(logits - logits.max(axis=1, keepdims=True)),
                fingerprints=np.zeros((len(claim.rows), 16), dtype=np.uint8),
                audit=Audit().to_json(),
            )
    writer.finish()
    return LocalRows(root)


class TestWordSums:
    """Kept for rows of whole words that are long enough to be worth it."""

    @pytest.mark.parametrize("view", [None, 2])
    def test_they_are_the_sums_of_the_rows_that_were_gathered(self, tmp_path: Path, view: int | None) -> None:
        """In any order, rows repeated, the short last shard included."""
        rows = made(tmp_path / "store", classes=128, views=1 if view is None else 3)
        chosen = np.random.default_rng(0).integers(0, 200, 64)
        for positions in (chosen, np.array([199, 199, 0]), np.arange(200)):
            found: Any = rows.at_positions(positions, ("targets",), view=view)["targets"]
            assert rows.word_sum_at(positions, "targets", view=view) == wire.word_sum(found)

    def test_none_are_kept_of_short_or_odd_rows(self, tmp_path: Path) -> None:
        """Whoever asks adds up what was gathered."""
        for classes in (10, 129):
            rows = made(tmp_path / str(classes), classes=classes)
            rows.at_positions(np.arange(10), ("targets",))
            assert rows.word_sum_at(np.arange(10), "targets") is None

    def test_a_byte_that_changes_after_it_was_verified_no_longer_adds_up(self, tmp_path: Path) -> None:
        """So a reader of the reply sees it, although the chunk is not looked at again."""
        rows = made(tmp_path / "store", classes=128)
        positions = np.arange(64)
        before = rows.at_positions(positions, ("targets",))["targets"]
        path = sorted(p for p in (tmp_path / "store" / "targets" / "c").rglob("*") if p.is_file())[0]
        with path.open("r+b") as file:
            file.seek(100)
            byte = file.read(1)
            file.seek(100)
            file.write(bytes([byte[0] ^ 4]))
        after = rows.at_positions(positions, ("targets",))["targets"]
        assert not np.array_equal(before.view(np.uint16), after.view(np.uint16))
        assert rows.word_sum_at(positions, "targets") == wire.word_sum(before) != wire.word_sum(after)
