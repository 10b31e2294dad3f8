"""An epoch through a cache: the same batches in the same order, by one stream at first and from the disk afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import WireError
from softlabels.order import EpochConfig
from softlabels.store import LocalRows
from softlabels.target_store import TargetStore
from softlabels_client.cache import CachedRows

Same = Callable[[Any, Any], None]
KINDS = ("dense", "integers", "strings", "views", "named-views")
PLAN: dict[str, Any] = {"seed": 3, "batch_size": 7}


def refuse_other_epoch(one: Any, other: Any, same: Same) -> int:
    """Go through two epochs side by side; how many batches they have."""
    assert len(one) == len(other)
    count = 0
    for ours, theirs in zip(one, other, strict=True):
        same(ours, theirs)
        assert (one.cursor, one.repeated) == (other.cursor, other.repeated)
        count += 1
    return count


@pytest.mark.parametrize("kind", KINDS)
class TestEpochs:
    def test_the_first_is_one_stream_and_the_second_needs_nothing(
        self, kind: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """The same rows, order and cursors as without a cache."""
        setting = make_setting(stores[kind])
        view = {"view": 1} if "views" in kind else {}
        for epoch in range(3):
            ours = setting.cached.epoch(epoch=epoch, **PLAN, **view)
            refuse_other_epoch(ours, setting.near.epoch(epoch=epoch, **PLAN, **view), refuse_difference)
        assert (setting.far.epochs, setting.far.fetched) == (1, [])

    @pytest.mark.parametrize("remainder", ["split", "drop", "pad"])
    @pytest.mark.parametrize("shuffle", [True, False])
    def test_every_rank_and_cursor(
        self,
        kind: str,
        remainder: str,
        shuffle: bool,
        stores: dict[str, Path],
        make_setting: Any,
        refuse_difference: Same,
    ) -> None:
        """Begun anywhere, by any rank, with anything left over."""
        setting = make_setting(stores[kind])
        for rank, cursor in ((0, 0), (2, 42), (1, 119)):
            config = {**PLAN, "epoch": 1, "remainder": remainder, "shuffle": shuffle, "rank": rank, "world_size": 3}
            for _ in range(2):
                ours, theirs = (store.epoch(**config, cursor=cursor) for store in (setting.cached, setting.near))
                refuse_other_epoch(ours, theirs, refuse_difference)

    def test_a_batch_finds_what_an_epoch_brought(
        self, kind: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """And the other way round: both keep rows under the sample's id."""
        setting = make_setting(stores[kind])
        keys = {"views": 2} if "views" in kind else {}
        view = {"view": 2} if "views" in kind else {}
        list(setting.cached.epoch(epoch=0, **PLAN, **view))
        ids = setting.near.ids()[::-1]
        refuse_difference(setting.cached.batch(ids, **keys), setting.near.batch(ids, **keys))
        assert setting.far.fetched == []

    def test_a_store_larger_than_its_cache(
        self, kind: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """The same rows all the same; from the second epoch on only what has no room is asked for."""
        row_bytes = 120 if kind == "dense" else 200
        setting = make_setting(stores[kind], most_bytes=60 * row_bytes)
        view = {"view": 1} if "views" in kind else {}
        for epoch in range(3):
            ours = setting.cached.epoch(epoch=epoch, **PLAN, **view)
            refuse_other_epoch(ours, setting.near.epoch(epoch=epoch, **PLAN, **view), refuse_difference)
        assert setting.far.epochs == 1
        assert 0 < sum(setting.far.fetched) < 2 * 120
        taken = sum(path.stat().st_size for path in setting.folder.rglob("*") if path.name in ("rows", "index", "ids"))
        assert taken <= 60 * row_bytes


class TestStreams:
    def test_an_epoch_broken_off_goes_on_from_the_disk_as_far_as_it_came(
        self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """The rows that came are not sent again; those that are missing are."""
        setting = make_setting(stores["strings"])
        with setting.cached.epoch(epoch=0, **PLAN) as broken:
            for _ in range(9):
                next(broken)
        sent = setting.far.steps
        assert 9 <= sent <= 18
        setting.far.forget()
        ours = setting.cached.epoch(epoch=0, **PLAN)
        refuse_other_epoch(ours, setting.near.epoch(epoch=0, **PLAN), refuse_difference)

    def test_half_of_a_store_is_asked_for_by_id(
        self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """A stream would send again what is here."""
        setting = make_setting(stores["dense"])
        setting.cached.batch(np.arange(5, 65))
        ours = setting.cached.epoch(epoch=0, **PLAN)
        refuse_other_epoch(ours, setting.near.epoch(epoch=0, **PLAN), refuse_difference)
        assert setting.far.epochs == 0
        assert sum(setting.far.fetched) == 60 + 60

    def test_a_stream_is_left_for_questions_where_more_is_here(
        self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And begun again where everything is missing: window by window, no batch twice or out of order."""
        monkeypatch.setattr("softlabels_client.cache.cached_rows._WINDOW_SAMPLES", 14)
        setting = make_setting(stores["dense"])
        in_order = {**PLAN, "shuffle": False, "epoch": 0}
        setting.cached.batch(np.arange(5 + 28, 5 + 56))
        setting.cached.batch(np.arange(5 + 70, 5 + 77))
        ours = setting.cached.epoch(**in_order)
        refuse_other_epoch(ours, setting.near.epoch(**in_order), refuse_difference)
        assert setting.far.epochs > 1
        assert sum(setting.far.fetched) < 120

    def test_ids_alone(self, stores: dict[str, Path], make_setting: Any) -> None:
        """An epoch of nothing but ids keeps those, and takes no room for rows."""
        setting = make_setting(stores["strings"])
        for _ in range(2):
            np.testing.assert_array_equal(setting.cached.ids(), setting.near.ids())
        assert (setting.far.epochs, setting.far.fetched) == (1, [])

    def test_an_error_comes_where_it_happened(self, stores: dict[str, Path], tmp_path: Path) -> None:
        """After the batches before it, and what came stays."""
        rows = LocalRows(stores["dense"])

        class Breaking:
            manifest, digest, encoding, fetch, close = rows.manifest, rows.digest, rows.encoding, rows.fetch, rows.close

            def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Any:
                for number, step in enumerate(rows.epoch(config, fields)):
                    if number == 5:
                        raise WireError("spoilt")
                    yield step

        store = TargetStore(CachedRows(Breaking(), folder=tmp_path), where="breaking")
        epoch = store.epoch(epoch=0, **PLAN)
        for _ in range(5):
            next(epoch)
        with pytest.raises(WireError, match="spoilt"):
            next(epoch)
        assert epoch.cursor == 35

    def test_a_stream_that_is_too_short(self, stores: dict[str, Path], tmp_path: Path) -> None:
        """Is an error, and not a short epoch."""
        rows = LocalRows(stores["dense"])

        class Short:
            manifest, digest, encoding, fetch, close = rows.manifest, rows.digest, rows.encoding, rows.fetch, rows.close

            def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Any:
                yield from list(rows.epoch(config, fields))[:-1]

        store = TargetStore(CachedRows(Short(), folder=tmp_path), where="short")
        with pytest.raises(WireError, match="before its last batch"):
            list(store.epoch(epoch=0, **PLAN))

    def test_prefetch_keeps_the_cursor_the_consumers(self, tiny_store: Path) -> None:
        """What was fetched ahead is not yet taken."""
        near = TargetStore(LocalRows(tiny_store), where="near")
        with near.epoch(epoch=0, prefetch=5, **PLAN) as ours:
            for theirs in near.epoch(epoch=0, **PLAN):
                np.testing.assert_array_equal(next(ours).ids, theirs.ids)
                if ours.cursor == 42:
                    break
        rest = np.concatenate([batch.ids for batch in near.epoch(epoch=0, cursor=ours.cursor, **PLAN)])
        assert len(np.unique(rest)) == 200 - 42
