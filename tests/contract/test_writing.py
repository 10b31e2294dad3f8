"""Writing, in every container: shards in any order, each by one writer; writing the same again changes nothing."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.errors import (
    BadIdsError,
    ShapeMismatchError,
    ShardClaimedError,
    ShardConflictError,
    StoreExistsError,
    TruncatedError,
)
from softlabels.store import StoreWriter


class TestCommit:
    def test_shards_in_any_order(self, make_store: Any, kind: Any) -> None:
        """A writer commits what is missing, another one the rest, and the result is the same."""
        made = make_store(kind)
        made.write(shards=range(2, 4), finish=False)
        writer = StoreWriter.resume(made.root)
        assert writer.missing_shards() == [0, 1]
        made.write(shards=range(0, 2))
        assert softlabels.open(made.root).batch(made.ids).encoded["targets"].tobytes() == (
            made.encoded["targets"].tobytes()
        )

    def test_the_same_again(self, made: Any) -> None:
        """Committing the same contents again, finished or not, changes nothing and returns the receipt there is."""
        writer = StoreWriter.resume(made.root)
        before = _times(made.root)
        receipt = writer.ledger.read(1)
        with writer.claim(1) as claim:
            assert claim.commit(**made.shard(1)) == receipt
        assert writer.finish() == softlabels.open(made.root).manifest
        assert _times(made.root) == before

    @pytest.mark.parametrize("field", ["targets", "labels", "fingerprints"])
    def test_other_contents(self, make_store: Any, kind: Any, field: str) -> None:
        """A shard that is committed takes no other contents, not even one bit."""
        made = make_store(kind)
        writer = made.write(shards=range(1), finish=False)
        shard = made.shard(0)
        array = shard["encoded"]["targets"] if field == "targets" else shard[field]
        changed = array.copy()
        changed[5] = -changed[5] if field != "fingerprints" else changed[5] ^ 1
        shard = (
            {**shard, "encoded": {"targets": changed}}
            if field == "targets"
            else {**shard, field: np.where(array == 0, 1, 0) if field == "labels" else changed}
        )
        with writer.claim(0) as claim, pytest.raises(ShardConflictError):
            claim.commit(**shard)
        assert softlabels.open(made.root).batch(made.ids[:64]).encoded["targets"].tobytes() == (
            made.encoded["targets"][:64].tobytes()
        )

    def test_a_shard_of_another_shape(self, make_store: Any, kind: Any) -> None:
        """Too few rows, another type, other ids and a missing array are refused before anything is written."""
        made = make_store(kind)
        writer = made.write(shards=range(0), finish=False)
        whole = made.shard(0)
        wrong = (
            {**whole, "encoded": {"targets": whole["encoded"]["targets"][:-1]}},
            {**whole, "encoded": {"targets": whole["encoded"]["targets"].astype(np.float32)}},
            {**whole, "encoded": {}},
            {**whole, "ids": whole["ids"] + 1},
        )
        for shard in wrong:
            with writer.claim(0) as claim, pytest.raises(ShapeMismatchError):
                claim.commit(**shard)
        assert writer.missing_shards() == [0, 1, 2, 3]
        assert not [path for path in made.root.rglob("*") if path.is_file() and "c" in path.parts]

    def test_finishing_too_early(self, make_store: Any, kind: Any) -> None:
        """A store with a missing shard gets no manifest."""
        made = make_store(kind)
        writer = made.write(shards=range(3), finish=False)
        with pytest.raises(TruncatedError, match="1 of 4 shards"):
            writer.finish()
        assert not (made.root / "manifest.json").exists()

    def test_an_id_that_stands_twice(self, make_store: Any, kind: Any) -> None:
        """Two samples with one id are ambiguous."""
        made = make_store(kind, ids="strings")
        made.ids[150] = made.ids[3]
        writer = made.write(finish=False)
        with pytest.raises(BadIdsError, match="repeated"):
            writer.finish()

    def test_an_id_that_is_too_long(self, make_store: Any, kind: Any) -> None:
        """An id that does not fit its column is refused, never cut."""
        made = make_store(kind, ids="strings")
        shard = made.shard(0)
        shard["ids"] = shard["ids"].astype("<U40")
        shard["ids"][0] = "x" * 13
        writer = made.write(shards=range(0), finish=False)
        with writer.claim(0) as claim, pytest.raises(BadIdsError, match="12"):
            claim.commit(**shard)


class TestOwners:
    def test_a_second_claim(self, make_store: Any, kind: Any) -> None:
        """A shard that one writer holds is refused to all others, here and in other processes; other shards are not."""
        made = make_store(kind)
        writer = made.write(shards=range(0), finish=False)
        with writer.claim(0):
            with pytest.raises(ShardClaimedError), StoreWriter.resume(made.root).claim(0):
                pass
            with StoreWriter.resume(made.root).claim(1):
                pass
            assert _in_another_process(_try_to_claim, made.root) == 3
        assert _in_another_process(_try_to_claim, made.root) == 0

    def test_two_processes_race_for_all_shards(self, make_store: Any, kind: Any) -> None:
        """Two writers that start together end with one whole store."""
        made = make_store(kind)
        context = multiprocessing.get_context("fork")
        racers = [context.Process(target=_write_what_is_free, args=(made,)) for _ in range(2)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(timeout=60)
        assert [racer.exitcode for racer in racers] == [0, 0]
        StoreWriter.resume(made.root).finish()
        assert np.array_equal(softlabels.open(made.root).batch(made.ids).labels, made.labels)


class TestLeftovers:
    def test_temporary_files_of_the_dead_are_purged(self, make_store: Any, kind: Any) -> None:
        """What a killed writer left is removed by the next one, unless its shard is held by a living writer."""
        made = make_store(kind)
        writer = made.write(shards=range(1), finish=False)
        dead, alive = (made.root / "staging" / f"{shard:08d}.targets.part" for shard in (2, 3))
        dead.write_bytes(b"half a shard")
        alive.write_bytes(b"half a shard, growing")
        with writer.claim(3):
            assert _in_another_process(_resume, made.root) == 0
            assert not dead.exists()
            assert alive.exists()
        StoreWriter.resume(made.root)
        assert not alive.exists()

    def test_files_without_a_receipt_are_written_over(self, make_store: Any, kind: Any, place: Any) -> None:
        """A shard whose writer died before the receipt does not exist; the next writer makes it anew."""
        made = make_store(kind)
        made.write(finish=False)
        path, _, _ = place(made.root, "targets", 1, 0)
        (made.root / "ledger" / "00000001.json").unlink()
        path.write_bytes(b"half")
        made.write()
        assert np.array_equal(softlabels.open(made.root).batch(made.ids).labels, made.labels)

    def test_nothing_temporary_is_left(self, made: Any) -> None:
        """A finished store holds no temporary file."""
        assert not list(made.root.rglob("*.part"))


class TestPlans:
    def test_another_job_on_the_same_place(self, make_store: Any, kind: Any) -> None:
        """A store never changes its plan; the error says where the two differ."""
        made = make_store(kind)
        made.write(shards=range(1), finish=False)
        other = make_store(kind, encoding="f32")
        with pytest.raises(StoreExistsError) as caught:
            StoreWriter.create(made.root, other.plan)
        assert "encoding" in caught.value.context["differs"]

    def test_a_folder_of_something_else(self, make_store: Any, kind: Any) -> None:
        """A folder that holds other files is left alone."""
        made = make_store(kind)
        made.root.mkdir()
        (made.root / "thesis.tex").write_text("precious")
        with pytest.raises(StoreExistsError):
            made.write()
        assert [path.name for path in made.root.iterdir() if path.name != "locks"] == ["thesis.tex"]


def _times(root: Path) -> dict[str, int]:
    """When each file of the store last changed; locks are touched by every writer."""
    files = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "locks"]
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in files}


def _in_another_process(target: Any, *arguments: Any) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(timeout=60)
    return process.exitcode


def _try_to_claim(root: Path) -> None:
    try:
        with StoreWriter.resume(root).claim(0):
            pass
    except ShardClaimedError:
        raise SystemExit(3) from None


def _resume(root: Path) -> None:
    StoreWriter.resume(root)


def _write_what_is_free(made: Any) -> None:
    writer = StoreWriter.create(made.root, made.plan)
    while missing := writer.missing_shards():
        for number in missing:
            try:
                with writer.claim(number) as claim:
                    claim.commit(**made.shard(number))
            except ShardClaimedError:
                continue
