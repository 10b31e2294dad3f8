"""`merge` and `convert`: shards of one run become one store, verified on the way, one owner a shard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softlabels.cli import main
from softlabels.errors import ConflictError, ShardConflictError, StoreExistsError, UnknownStoreError
from softlabels.manifest import Container
from softlabels.store.copies import convert_store, merge
from softlabels.store.verify import verify
from tests.softlabels.store.conftest import tree_of

Tree = Callable[[Path], dict[str, str]]


@pytest.fixture
def halves(source: Any, tmp_path: Path) -> list[Path]:
    """The same store begun on two machines: shards 0 and 3 on one, 1 and 2 on the other."""
    source.write(tmp_path / "a", shards=[0, 3])
    source.write(tmp_path / "b", shards=[2, 1])
    return [tmp_path / "a", tmp_path / "b"]


class TestMerge:
    def test_two_halves_are_the_whole(self, halves: list[Path], store: Path, tmp_path: Path, tree: Tree) -> None:
        """Bit-identical with a store that one machine wrote."""
        done = merge(halves, tmp_path / "all")
        assert (done.missing, done.copied) == ([], {str(half): 2 for half in halves})
        assert tree(tmp_path / "all") == tree(store)
        assert verify(tmp_path / "all").sound

    def test_again_changes_nothing(self, halves: list[Path], tmp_path: Path, tree: Tree) -> None:
        """Idempotent, also after it was interrupted halfway."""
        merge(halves[:1], tmp_path / "all")
        done = merge(halves, tmp_path / "all")
        before = tree(tmp_path / "all")
        assert (done.kept, done.copied) == (2, {str(halves[1]): 2})
        assert merge(halves, tmp_path / "all").digest == done.digest
        assert tree(tmp_path / "all") == before

    def test_the_sources_stay(self, halves: list[Path], tmp_path: Path, tree: Tree) -> None:
        """Nothing is taken from them."""
        before = [tree(half) for half in halves]
        merge(halves, tmp_path / "all")
        assert [tree(half) for half in halves] == before

    def test_into_one_of_them(self, halves: list[Path], store: Path, tree: Tree) -> None:
        """The destination may be one of the halves."""
        merge(halves[1:], halves[0])
        assert tree(halves[0]) == tree(store)

    def test_what_is_missing_everywhere(self, halves: list[Path], tmp_path: Path) -> None:
        """An unfinished store, to be resumed."""
        done = merge(halves[:1], tmp_path / "all")
        assert (done.missing, done.digest) == ([1, 2], None)

    def test_a_damaged_shard_is_not_copied(self, halves: list[Path], store: Path, tmp_path: Path, tree: Tree) -> None:
        """It is named; another source that has it sound gives it."""
        places = [halves[0] / "targets" / "c" / "3" / "0", halves[0] / "shards" / "00000003.h5"]
        damaged = next(path for path in places if path.exists())
        raw = bytearray(damaged.read_bytes())
        raw[100] ^= 1
        damaged.write_bytes(raw)
        done = merge(halves, tmp_path / "all")
        assert (done.missing, set(done.damaged)) == ([3], {3})
        assert str(damaged) in done.damaged[3]
        done = merge([*halves, store], tmp_path / "all")
        assert (done.missing, done.damaged) == ([], {})
        assert tree(tmp_path / "all") == tree(store)


class TestRefused:
    def test_other_plans(self, halves: list[Path], source: Any, tmp_path: Path) -> None:
        """The message says in what the plans differ."""
        other = type(source)(ids=source.ids, container=source.container, teacher="hum")
        other.write(tmp_path / "other", shards=[1])
        with pytest.raises(ConflictError, match=r"teachers\.0\.name: 'noise' and 'hum'") as caught:
            merge([halves[0], tmp_path / "other"], tmp_path / "all")
        assert caught.value.context["differs"] == ["teachers.0.name"]
        assert not (tmp_path / "all").exists()

    def test_the_same_shard_with_other_contents(self, halves: list[Path], source: Any, tmp_path: Path) -> None:
        """Two teachers that disagree: neither is chosen silently."""
        other = type(source)(ids=source.ids, container=source.container, seed=1)
        other.write(tmp_path / "other", shards=[3])
        with pytest.raises(ShardConflictError, match="shard 3"):
            merge([halves[0], tmp_path / "other"], tmp_path / "all")

    def test_a_folder_of_something_else(self, halves: list[Path], tmp_path: Path) -> None:
        """Nothing is mixed in."""
        (tmp_path / "all").mkdir()
        (tmp_path / "all" / "thesis.txt").write_text("mine")
        with pytest.raises(StoreExistsError):
            merge(halves, tmp_path / "all")

    def test_no_store(self, tmp_path: Path) -> None:
        """A source that is none is named."""
        with pytest.raises(UnknownStoreError):
            merge([tmp_path], tmp_path / "all")


class TestConvert:
    @pytest.mark.parametrize("container", ["zarr", "hdf5"])
    @pytest.mark.parametrize("done", [2, 4])
    def test_the_copy_of_another_run_is_not_continued(
        self, source: Any, tmp_path: Path, container: Container, done: int
    ) -> None:
        """Neither united with it, where that copy is unfinished, nor taken for this one's, where it is finished."""
        source.write(tmp_path / "s")
        copied = 0

        def stop(rows: int) -> None:
            nonlocal copied
            copied += 1
            if copied == done:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            convert_store(tmp_path / "s", tmp_path / "copy", container=container, advance=stop)
        other = type(source)(ids=source.ids, container=source.container, seed=1)
        other.write(tmp_path / "other")
        before = tree_of(tmp_path / "copy")
        with pytest.raises(ShardConflictError, match="another run of the same job"):
            convert_store(tmp_path / "other", tmp_path / "copy", container=container)
        assert tree_of(tmp_path / "copy") == before
        converted = convert_store(tmp_path / "s", tmp_path / "copy", container=container)
        assert converted.digest == convert_store(tmp_path / "s", tmp_path / "again", container=container).digest


class TestCommand:
    def test_it_says_what_it_did(self, halves: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Exit code 1 while shards are missing, 0 when the store is whole."""
        assert main(["merge", str(halves[0]), str(tmp_path / "all")]) == 1
        assert "2 shards are missing" in capsys.readouterr().out
        assert main(["merge", *map(str, halves), str(tmp_path / "all")]) == 0
        assert "complete, digest" in capsys.readouterr().out
