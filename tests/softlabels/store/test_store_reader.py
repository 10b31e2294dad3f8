"""Members, views and sequences: the second keys of a store, and what is refused when one is left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.errors import BadIdsError, ManifestError, RequestError, ShapeMismatchError, TemperatureLockedError
from softlabels.manifest import IdSpec, RowLayout, TemperatureSpec, TransferSetSpec, ViewSpec
from softlabels.softmath import mean_arithmetic, mean_geometric, soften
from softlabels.store import SampleTable, StoreWriter, plan_store
from softlabels.transfer_set import sample_fingerprints
from softlabels.views import view_seeds

CLASSES = 7
CONTAINERS = ("zarr", "hdf5")


def logits(rows: int, *, seed: int = 0, members: int | None = None) -> np.ndarray:
    """Random logits whose row maxima are 0: [rows, classes], or [rows, members, classes]."""
    shape = (rows, CLASSES) if members is None else (rows, members, CLASSES)
    found = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 4
    return found - found.max(axis=-1, keepdims=True)


def write(root: Path, container: str, rows: np.ndarray, *, samples: int, ids: IdSpec, **plan: Any) -> StoreWriter:
    """A finished store of these rows; `keys(range)` among the arguments gives a shard's ids and so on."""
    keys = plan.pop("keys", lambda span: {})
    encoding = make_encoding("f32", classes=CLASSES)
    manifest = plan_store(
        name="t",
        samples=samples,
        ids=ids,
        encoding=encoding,
        temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
        mean=plan.pop("mean", "none"),
        teachers=(),
        transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}, labelled=plan.pop("labelled", False)),
        container=container,  # type: ignore[arg-type]
        rows_per_shard=32,
        rows_per_chunk=8,
        **plan,
    )
    writer = StoreWriter.create(root, manifest, table=plan.get("table"))
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            piece = rows[claim.rows.start : claim.rows.stop]
            flat = piece.reshape(-1, CLASSES)
            audit = Audit((1.0,))
            audit.add(flat, flat, captured=1.0)
            extra: Mapping[str, Any] = keys(claim.rows)
            claim.commit(encoded={"targets": piece}, audit=audit.to_json(), **extra)
    writer.finish()
    return writer


@pytest.mark.parametrize("container", CONTAINERS)
class TestMembers:
    @pytest.fixture
    def rows(self) -> np.ndarray:
        """Rows of three members for 100 samples."""
        return logits(100, members=3)

    @pytest.fixture
    def store(self, tmp_path: Path, container: str, rows: np.ndarray) -> softlabels.TargetStore:
        """A store that keeps all three."""

        def keys(span: range) -> dict[str, Any]:
            positions = np.arange(span.start, span.stop)
            return {"ids": positions, "fingerprints": sample_fingerprints(positions[:, None])}

        write(
            tmp_path / "s", container, rows, samples=100, ids=IdSpec(kind="int", dense_start=0), members=3,
            mean="geometric", keys=keys,
        )  # fmt: skip
        return softlabels.open(tmp_path / "s")

    def test_either_mean_at_any_temperature(self, store: softlabels.TargetStore, rows: np.ndarray) -> None:
        """What is served is what the reference computes from the members."""
        ids = [5, 99, 5, 31, 32]
        members = np.moveaxis(rows[ids], 1, 0)
        for temperature in (1.0, 4.0, 20.0):
            expected = soften(mean_geometric(members), temperature=temperature)
            np.testing.assert_allclose(store.batch(ids, temperature=temperature).p(), expected, atol=1e-6)
            expected = np.exp(mean_arithmetic(members, temperature=temperature))
            found = store.batch(ids, temperature=temperature, mean="arithmetic").p()
            np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_one_member_alone_is_there(self, store: softlabels.TargetStore, rows: np.ndarray) -> None:
        """The rows of every member come back as they were written."""
        np.testing.assert_array_equal(store.batch([7, 64]).member_logits(), rows[[7, 64]])

    def test_an_arithmetic_batch_is_locked(self, store: softlabels.TargetStore) -> None:
        """Taken at one T it has no other; the store can be asked again."""
        with pytest.raises(TemperatureLockedError):
            store.batch([0], temperature=2.0, mean="arithmetic").p(3.0)

    def test_weights_must_fit(self, store: softlabels.TargetStore) -> None:
        """Two weights for three members are refused."""
        with pytest.raises((RequestError, ShapeMismatchError)):
            store.batch([0], weights=(1.0, 2.0))


@pytest.mark.parametrize("container", CONTAINERS)
class TestViews:
    @pytest.fixture
    def rows(self) -> np.ndarray:
        """Rows of 40 samples × 5 views."""
        return logits(200)

    @pytest.fixture
    def store(self, tmp_path: Path, container: str, rows: np.ndarray) -> softlabels.TargetStore:
        """A store with recorded parameters and string ids."""
        names = np.array([f"img-{n:03d}" for n in range(40)])[::-1]

        def keys(span: range) -> dict[str, Any]:
            rows_R = np.arange(span.start, span.stop)
            return {
                "ids": names[rows_R // 5],
                "fingerprints": sample_fingerprints(rows_R[:, None]),
                "view_parameters": np.stack([rows_R * 0.5, rows_R * 2.0], axis=1),
            }

        views = ViewSpec(transform="my:crop", parameters=("left", "top"), libraries={"kornia": "0.8"})
        layout = RowLayout(kind="views", samples=40, rows=200, views=5)
        ids = IdSpec(kind="str", width_bytes=7)
        write(tmp_path / "s", container, rows, samples=40, ids=ids, layout=layout, views=views, keys=keys)
        return softlabels.open(tmp_path / "s")

    def test_a_view_of_a_sample_has_its_own_row(self, store: softlabels.TargetStore, rows: np.ndarray) -> None:
        """(sample, view) is the key, parameters come along."""
        batch = store.batch(["img-039", "img-000", "img-039"], views=[4, 0, 1], view_parameters=True)
        expected = [4, 39 * 5, 1]
        np.testing.assert_array_equal(batch.logits(), rows[expected])
        np.testing.assert_array_equal(batch.view_parameters, np.array([[2.0, 8.0], [97.5, 390.0], [0.5, 2.0]]))
        np.testing.assert_array_equal(store.batch(["img-039", "img-038"], views=2).logits(), rows[[2, 7]])

    def test_a_store_of_views_never_guesses_one(self, store: softlabels.TargetStore) -> None:
        """No view named, or one that is not kept, is an error and not view 0."""
        with pytest.raises(RequestError, match="say which one"):
            store.batch(["img-000"])
        with pytest.raises(RequestError, match="views 0 to 4"):
            store.batch(["img-000"], views=5)
        with pytest.raises(RequestError):
            store.batch(["img-000"], views=-1)
        with pytest.raises(RequestError, match="whole numbers"):
            store.batch(["img-000"], views=[0.5])  # type: ignore[list-item]

    def test_the_manifest_says_how_to_replay(self, store: softlabels.TargetStore) -> None:
        """Transform, parameter names and library versions are there after a round trip through JSON."""
        views = store.manifest.views
        assert views is not None
        assert (views.transform, views.parameters, views.libraries) == ("my:crop", ("left", "top"), {"kornia": "0.8"})


class TestViewSeeds:
    def test_they_depend_on_key_sample_and_view_alone(self) -> None:
        """Any order and any subset draws the same numbers; each of the three changes them."""
        ids, views = np.array([1, 2, 3]), np.array([0, 1, 0])
        seeds = view_seeds("k", ids, views)
        np.testing.assert_array_equal(view_seeds("k", ids[::-1], views[::-1]), seeds[::-1])
        assert (
            len({*seeds.tolist(), *view_seeds("l", ids, views).tolist(), *view_seeds("k", ids, views + 1).tolist()})
            == 9
        )
        assert int(seeds.max()) < 2**63

    def test_they_never_change(self) -> None:
        """A view captured by an older softlabels is replayed by a newer one."""
        assert view_seeds("store", np.array([7]), np.array([3])).tolist() == [198921695951014260]
        assert view_seeds("store", np.array(["7"]), np.array([3])).tolist() != [198921695951014260]


@pytest.mark.parametrize("container", CONTAINERS)
class TestSequences:
    lengths = np.array([10, 0, 50, 1, 39])

    @pytest.fixture
    def rows(self) -> np.ndarray:
        """A hundred rows of five samples, one of them empty, one across three shards."""
        return logits(100)

    @pytest.fixture
    def table(self) -> SampleTable:
        """Ids that are not dense."""
        ids = np.array([30, 10, 50, 20, 40])
        return SampleTable(ids=ids, lengths=self.lengths, fingerprints=sample_fingerprints(ids[:, None]), dense=False)

    @pytest.fixture
    def root(self, tmp_path: Path, container: str, rows: np.ndarray, table: SampleTable) -> Path:
        """A finished sequence store with a label a row."""
        write(
            tmp_path / "s", container, rows, samples=5, ids=IdSpec(kind="int"), table=table, labelled=True,
            keys=lambda span: {"labels": np.arange(span.start, span.stop) % CLASSES},
        )  # fmt: skip
        return tmp_path / "s"

    def test_whole_samples_and_ranges(self, root: Path, rows: np.ndarray) -> None:
        """(sample id, range) is the key; rows come joined, with where each sample's begin."""
        store = softlabels.open(root)
        batch = store.batch([50, 10, 30], fingerprints=True)
        np.testing.assert_array_equal(batch.logits(), rows[[*range(10, 60), *range(10)]])
        assert batch.row_offsets is not None
        assert batch.row_offsets.tolist() == [0, 50, 50, 60]
        assert batch.labels is not None
        assert batch.labels.tolist() == [r % CLASSES for r in [*range(10, 60), *range(10)]]
        np.testing.assert_array_equal(batch.fingerprints, sample_fingerprints(np.array([[50], [10], [30]])))
        batch = store.batch([40, 40, 20], spans=[(0, 2), (37, 39), (0, 1)])
        np.testing.assert_array_equal(batch.logits(), rows[[61, 62, 98, 99, 60]])

    def test_a_range_may_not_leave_its_sample(self, root: Path) -> None:
        """Row 10 of a sample of ten is the next sample's, so it is refused."""
        store = softlabels.open(root)
        for span in ((0, 11), (-1, 2), (5, 4)):
            with pytest.raises(RequestError, match="outside its sample"):
                store.batch([30], spans=[span])

    def test_a_changed_offset_is_found_before_it_is_used(self, root: Path) -> None:
        """One changed byte in the offsets would be a wrong row."""
        path = root / "index" / "offsets.npy"
        raw = bytearray(path.read_bytes())
        raw[-8] ^= 1
        path.write_bytes(raw)
        with pytest.raises(ManifestError, match="offset"):
            softlabels.open(root).batch([30])

    def test_the_fingerprint_is_that_of_the_samples(self, root: Path, table: SampleTable) -> None:
        """The manifest binds the transfer set."""
        assert softlabels.open(root).manifest.transfer_set.fingerprint == table.fingerprint()

    def test_ids_must_be_unique(self, container: str) -> None:
        """Two samples of one id are refused before anything is computed."""
        ids = np.array([1, 1])
        table = SampleTable(ids=ids, lengths=ids, fingerprints=sample_fingerprints(ids[:, None]), dense=False)
        with pytest.raises(BadIdsError, match="repeated"):
            table.files()


class TestSingle:
    def test_second_keys_are_refused_where_there_are_none(self, tmp_path: Path) -> None:
        """Views or spans asked of a store of single rows are a mistake."""

        def keys(span: range) -> dict[str, Any]:
            positions = np.arange(span.start, span.stop)
            return {"ids": positions, "fingerprints": sample_fingerprints(positions[:, None])}

        write(tmp_path / "s", "zarr", logits(10), samples=10, ids=IdSpec(kind="int", dense_start=0), keys=keys)
        store = softlabels.open(tmp_path / "s")
        with pytest.raises(RequestError, match="no views"):
            store.batch([0], views=0)
        with pytest.raises(RequestError, match="no spans"):
            store.batch([0], spans=[(0, 1)])
        with pytest.raises(RequestError, match="one teacher's rows, not its members"):
            store.batch([0], mean="arithmetic")
