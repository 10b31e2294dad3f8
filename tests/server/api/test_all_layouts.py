"""Views, spans of sequences, members and learned constants: over HTTP the same as from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.errors import RequestError

CLASSES, SAMPLES, VIEWS = 7, 40, 3


def both(url: str, folder: Path, name: str) -> tuple[softlabels.TargetStore, softlabels.TargetStore]:
    """The store behind the server, and its folder."""
    return softlabels.open(f"{url}/{name}"), softlabels.open(folder / name)


def assert_same(remote: Any, local: Any) -> None:
    """Two batches of the same rows."""
    assert remote.ids.tolist() == local.ids.tolist()
    assert set(remote.encoded) == set(local.encoded)
    for name in remote.encoded:
        np.testing.assert_array_equal(remote.encoded[name], local.encoded[name])
    np.testing.assert_array_equal(remote.logits(), local.logits())
    for field in ("row_offsets", "view_parameters", "fingerprints", "labels"):
        one, other = getattr(remote, field), getattr(local, field)
        assert (one is None) == (other is None), field
        if one is not None:
            np.testing.assert_array_equal(one, other)


class TestBatches:
    def test_views(self, url: str, folder: Path) -> None:
        """A view of each sample, or one for all, with its parameters; none named is an error on either side."""
        remote, local = both(url, folder, "views")
        for views in ([0, 2, 1], 2):
            keys: dict[str, Any] = {"views": views, "view_parameters": True, "fingerprints": True}
            for _ in range(3):
                assert_same(remote.batch([5, 39, 5], **keys), local.batch([5, 39, 5], **keys))
        for store in (remote, local):
            with pytest.raises(RequestError):
                store.batch([5])
            with pytest.raises(RequestError):
                store.batch([5], views=[3])
            with pytest.raises(RequestError):
                store.batch([5], spans=[(0, 1)])

    @pytest.mark.parametrize("name", ["sequences", "texts"])
    def test_sequences(self, url: str, folder: Path, name: str) -> None:
        """Whole ones and ranges, empty ones among them."""
        remote, local = both(url, folder, name)
        ids = [3, 0, 4, 3] if name == "sequences" else ["t03", "t00", "t38", "t03"]
        assert_same(remote.batch(ids, fingerprints=True), local.batch(ids, fingerprints=True))
        picked = ids[:1] * 2
        assert_same(remote.batch(picked, spans=[(0, 1), (1, 1)]), local.batch(picked, spans=[(0, 1), (1, 1)]))
        with pytest.raises(RequestError):
            remote.batch(picked, spans=[(0, 99), (0, 1)])

    def test_members(self, url: str, folder: Path) -> None:
        """Either mean at any temperature, chosen by the reader."""
        remote, local = both(url, folder, "members")
        for mean in ("geometric", "arithmetic"):
            keys: dict[str, Any] = {"mean": mean, "temperature": 3.0}
            np.testing.assert_array_equal(remote.batch([1, 2], **keys).p(), local.batch([1, 2], **keys).p())

    def test_learnt_constants(self, url: str, folder: Path) -> None:
        """What a basis learnt comes over HTTP, once, and decodes to the same bits."""
        remote, local = both(url, folder, "learnt")
        assert_same(remote.batch([1, 20, 1]), local.batch([1, 20, 1]))


class TestEpochs:
    @pytest.mark.parametrize("name", ["views", "members", "sequences", "texts", "learnt"])
    @pytest.mark.parametrize("keys", [{}, {"rank": 1, "world_size": 3}, {"cursor": 11}, {"remainder": "pad"}])
    def test_epochs_over_http_and_from_the_folder_are_equal(
        self, url: str, folder: Path, name: str, keys: dict[str, Any]
    ) -> None:
        """Batch by batch, with the same place to go on from after each."""
        remote, local = both(url, folder, name)
        asked: dict[str, Any] = {"seed": 3, "epoch": 5, "batch_size": 7, "fingerprints": True, **keys}
        one, other = remote.epoch(**asked), local.epoch(**asked)
        assert len(one) == len(other)
        count = 0
        for here, there in zip(one, other, strict=True):
            assert_same(here, there)
            assert (one.cursor, one.repeated) == (other.cursor, other.repeated)
            count += 1
        assert count == len(one)

    def test_each_epoch_shows_another_view(self, folder: Path) -> None:
        """In turn, unless one is named."""
        store = softlabels.open(folder / "views")
        rows = np.random.default_rng(5).normal(size=(SAMPLES * VIEWS, CLASSES)).astype(np.float32) * 4
        rows -= rows.max(axis=-1, keepdims=True)
        for epoch, keys, view in ((0, {}, 0), (4, {}, 1), (4, {"view": 2}, 2)):
            batch = next(store.epoch(seed=0, epoch=epoch, batch_size=SAMPLES, **keys))  # type: ignore[arg-type]
            np.testing.assert_array_equal(batch.logits(), rows[batch.ids * VIEWS + view])
