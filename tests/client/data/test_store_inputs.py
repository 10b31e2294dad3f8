"""`SoftTargetDataset(None, store)`: a store that keeps its inputs trains a student alone, near or far."""

from __future__ import annotations

import json
import pickle
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load

import softlabels
from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.errors import FingerprintMismatchError, UnknownFieldError, UnknownIdError
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import LocalRows, StoreWriter, plan_store
from softlabels.store.store_plan import kept_inputs
from softlabels.transfer_set import ArrayTransferSet, sample_fingerprints
from softlabels_client import SoftTargetDataset, SoftTargetStream, data_loader, stream_loader
from softlabels_client.data.dataset import StoreInputs

SAMPLES, CLASSES = 90, 5
PIXELS = np.random.default_rng(2).integers(0, 256, (SAMPLES, 3, 4), dtype=np.uint8)
LABELS = np.random.default_rng(3).integers(-1, CLASSES, SAMPLES)
NAMES = np.array([f"p/{number:03d}.png" for number in np.random.default_rng(4).permutation(SAMPLES)])


def write(folder: Path, inputs: np.ndarray) -> Path:
    """A finished store that keeps these inputs under names that must be looked up."""
    encoding = make_encoding("f16", classes=CLASSES)
    logits_BC = np.random.default_rng(5).normal(size=(SAMPLES, CLASSES)).astype(np.float32)
    logits_BC -= logits_BC.max(axis=1, keepdims=True)
    plan = plan_store(
        name=folder.name,
        samples=SAMPLES,
        ids=IdSpec(kind="str", width_bytes=16),
        encoding=encoding,
        temperature=TemperatureSpec(default=2.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="pictures", source="x:y", arguments={}, labelled=True),
        rows_per_shard=32,
        rows_per_chunk=8,
        inputs=kept_inputs(inputs),
    )
    writer = StoreWriter.create(folder, plan)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            rows = slice(claim.rows.start, claim.rows.stop)
            claim.commit(
                ids=NAMES[rows],
                encoded=encoding.encode(logits_BC[rows]),
                fingerprints=sample_fingerprints(inputs[rows]),
                labels=LABELS[rows],
                inputs=inputs[rows],
                audit=Audit().to_json(),
            )
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store `alone` that keeps small pictures."""
    return write(tmp_path_factory.mktemp("stores") / "alone", PIXELS)


@pytest.fixture(params=["near", "far"])
def store(request: pytest.FixtureRequest, root: Path) -> Iterator[softlabels.TargetStore]:
    """The store on disk, and behind a real server."""
    where = str(root) if request.param == "near" else f"{request.getfixturevalue('serve')(root.parent)}/alone"
    with softlabels.open(where) as opened:
        yield opened


class TestStoreInputs:
    def test_a_batch_is_inputs_and_targets_of_the_same_samples(self, store: softlabels.TargetStore) -> None:
        """As if the inputs had been brought: the same tensors, labels and ids."""
        alone = SoftTargetDataset(None, store, check="always")
        brought = SoftTargetDataset(ArrayTransferSet("x", PIXELS, ids=NAMES), store)
        assert len(alone) == SAMPLES
        for positions in ([5, 0, 88, 5], [3]):
            ours, theirs = alone.__getitems__(positions), brought.__getitems__(positions)
            assert ours.ids.tolist() == theirs.ids.tolist() == NAMES[positions].tolist()
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.targets.logits_BC, theirs.targets.logits_BC)
            assert ours.targets.labels_B is not None
            assert ours.targets.labels_B.tolist() == LABELS[positions].tolist()

    def test_a_loader_goes_through_all_of_it(self, store: softlabels.TargetStore) -> None:
        """Every sample once, in the order that the brought inputs would have."""
        loaders = [
            data_loader(dataset, batch_size=32, seed=3)
            for dataset in (
                SoftTargetDataset(None, store),
                SoftTargetDataset(ArrayTransferSet("x", PIXELS, ids=NAMES), store),
            )
        ]
        seen: list[Any] = []
        for ours, theirs in zip(*loaders, strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)
            seen += ours.ids.tolist()
        assert sorted(seen) == sorted(NAMES.tolist())

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_stream_brings_them_along(self, store: softlabels.TargetStore, workers: int) -> None:
        """Inputs, targets and labels of every sample once, each checked by its fingerprint, under names as ids."""
        stream = SoftTargetStream(store, batch_size=16, seed=3, check="always")
        seen: list[Any] = []
        for batch in stream_loader(stream, workers=workers, start_method="fork" if workers else None):
            where = [NAMES.tolist().index(name) for name in batch.ids]
            np.testing.assert_array_equal(batch.inputs.numpy(), PIXELS[where])
            assert batch.targets.labels_B is not None
            assert batch.targets.labels_B.tolist() == LABELS[where].tolist()
            np.testing.assert_array_equal(batch.targets.logits_BC.numpy(), store.batch(batch.ids).logits())
            seen += where
        assert sorted(seen) == list(range(SAMPLES))

    def test_some_samples_of_it(self, store: softlabels.TargetStore) -> None:
        """`ids` choose and order them; one that the store lacks is an error when it is taken."""
        dataset = SoftTargetDataset(None, store, ids=NAMES[[7, 3]])
        assert len(dataset) == 2
        np.testing.assert_array_equal(dataset.__getitems__([0, 1]).inputs.numpy(), PIXELS[[7, 3]])
        with pytest.raises(UnknownIdError):
            SoftTargetDataset(None, store, ids=["p/none.png"]).__getitems__([0])

    def test_its_inputs_are_a_transfer_set(self, store: softlabels.TargetStore) -> None:
        """With name, length and `take`, for those who evaluate on them."""
        inputs = StoreInputs(store)
        samples = inputs.take(np.array([4, 80]))
        assert (inputs.name, len(inputs)) == ("pictures", SAMPLES)
        np.testing.assert_array_equal(samples.inputs, PIXELS[[4, 80]])
        assert samples.ids.tolist() == NAMES[[4, 80]].tolist()
        assert samples.labels is not None
        assert samples.labels.tolist() == LABELS[[4, 80]].tolist()

    def test_it_pickles(self, store: softlabels.TargetStore) -> None:
        """For loaders whose workers are spawned."""
        again = pickle.loads(pickle.dumps(SoftTargetDataset(None, store)))
        np.testing.assert_array_equal(again.__getitems__([11]).inputs.numpy(), PIXELS[[11]])


class TestOverHttp:
    def test_inputs_are_a_field_like_the_others(self, root: Path, serve: Any) -> None:
        """Asked for by name they come in their own type and shape; left out they do not."""
        address = serve(root.parent, "--port", "0")

        def ask(**document: Any) -> dict[str, Any]:
            body = json.dumps({"ids": NAMES[[8, 2]].tolist(), **document}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/v1/stores/alone/batch", body, headers)
            with urllib.request.urlopen(request, timeout=30) as reply:
                return dict(load(reply.read()))

        np.testing.assert_array_equal(ask(fields=["inputs", "labels"])["inputs"], PIXELS[[8, 2]])
        assert set(ask()) == {"targets", "labels", "ids", "crc32c"}
        described = json.loads(urllib.request.urlopen(f"{address}/v1/stores/alone", timeout=30).read())
        assert described["manifest"]["arrays"]["inputs"] == {"dtype": "|u1", "row_shape": [3, 4]}

    def test_numbers_of_every_width_travel(self, tmp_path: Path, serve: Any) -> None:
        """Floats and whole numbers of one to eight bytes, scalars and many axes."""
        kinds = [np.dtype(kind) for kind in ("<f2", "<f8", "<i8", "<u4", "|i1")]
        shapes: list[tuple[int, ...]] = [(), (2,), (1, 2, 3, 1), (5, 1), (3, 3)]
        kept = {}
        for number, (kind, shape) in enumerate(zip(kinds, shapes, strict=True)):
            kept[f"s{number}"] = np.random.default_rng(number).integers(0, 100, (SAMPLES, *shape)).astype(kind)
            write(tmp_path / f"s{number}", kept[f"s{number}"])
        address = serve(tmp_path)
        for name, inputs in kept.items():
            with softlabels.open(f"{address}/{name}") as store:
                found = store.batch(NAMES[[60, 1]], inputs=True).inputs
                assert found is not None
                assert (found.dtype, found.tolist()) == (inputs.dtype, inputs[[60, 1]].tolist())
                assert SoftTargetDataset(None, store, check="always").__getitems__([60, 1]).ids.tolist()


class TestRefusals:
    def test_a_store_that_keeps_none(self, tiny_store: Path) -> None:
        """The message says how one comes by a store that does."""
        with softlabels.open(tiny_store) as store, pytest.raises(UnknownFieldError, match="inputs = true"):
            SoftTargetDataset(None, store)

    def test_a_server_that_lies_about_inputs_is_found_out(self, root: Path) -> None:
        """Fingerprints are of the inputs that the teacher saw: others under its ids are no use."""
        rows = LocalRows(root)
        with softlabels.TargetStore(Lying(rows), where="lies") as store:
            dataset = SoftTargetDataset(None, store)
            dataset.__getitems__([0, 1])
            with pytest.raises(FingerprintMismatchError, match=r"p/\d"):
                dataset.__getitems__([2, 40])


class Lying:
    """Rows of a store in which one sample's input is another's."""

    def __init__(self, rows: LocalRows) -> None:
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)

    def fetch(self, ids: Any, fields: tuple[str, ...], **keys: Any) -> dict[str, Any]:
        """As the store does, but for the inputs of its sample 40."""
        found = self._rows.fetch(ids, fields, **keys)
        if "inputs" in found:
            found["inputs"] = np.where((ids == NAMES[40])[:, None, None], PIXELS[:1], found["inputs"])
        return found
