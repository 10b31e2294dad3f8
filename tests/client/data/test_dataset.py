"""Soft targets through a torch DataLoader: paired by id, checked by fingerprint, one request a batch."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import softlabels
from softlabels.errors import (
    BadIdsError,
    EmptyBatchError,
    FingerprintMismatchError,
    RequestError,
    ShapeMismatchError,
    TemperatureError,
    TemperatureLockedError,
    UnknownFieldError,
    UnknownIdError,
)
from softlabels.losses import SoftTargetBatch
from softlabels.manifest import TemperatureSpec
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client import DistillationBatch, HttpRows, RetryPolicy, SoftTargetDataset, collate_batches, data_loader


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two cores are shared with servers and other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tiny_store: Path) -> Iterator[softlabels.TargetStore]:
    """The tiny store on this disk."""
    with softlabels.open(tiny_store) as opened:
        yield opened


@pytest.fixture
def far(served_store: str) -> Iterator[softlabels.TargetStore]:
    """The tiny store behind its server."""
    with softlabels.open(served_store) as opened:
        yield opened


def is_right(batch: DistillationBatch, store: softlabels.TargetStore, inputs: ArrayTransferSet) -> bool:
    """Whether every row of a batch is its sample's: input, target and label."""
    expected = store.batch(batch.ids)
    assert expected.labels is not None
    assert batch.targets.labels_B is not None
    return (
        np.array_equal(batch.inputs.numpy(), inputs.inputs[batch.ids.astype(np.int64)])
        and np.array_equal(batch.targets.logits_BC.numpy(), expected.logits())
        and np.array_equal(batch.targets.labels_B.numpy(), expected.labels)
    )


class TestItems:
    def test_a_batch_is_rows_that_belong_together(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """Input, target, label and id, in the order asked, with the temperature that the loss takes."""
        dataset = SoftTargetDataset(tiny_inputs, store, temperature=2.5)
        batch = dataset.__getitems__([9, 3, 150, 3])
        assert batch.ids.tolist() == [9, 3, 150, 3]
        assert is_right(batch, store, tiny_inputs)
        assert batch.targets.temperature == 2.5
        assert (len(dataset), len(batch)) == (200, 4)

    def test_one_sample_is_a_batch_of_one(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """For whoever indexes the data set by hand."""
        sample = SoftTargetDataset(tiny_inputs, store)[7]
        assert sample.ids.tolist() == [7]
        assert is_right(sample, store, tiny_inputs)
        assert sample.targets.temperature == 4.0

    def test_a_batch_is_one_request(self, peer: Any, impostor: Any, quick: RetryPolicy, tiny_inputs: Any) -> None:
        """And fingerprints are asked for only until each sample was seen once."""
        peer.acts = [impostor.describe(), impostor.batch()]
        store = softlabels.TargetStore(HttpRows(f"{peer.url}/tiny", retry=quick), where=peer.url)
        dataset = SoftTargetDataset(tiny_inputs, store)
        for _ in range(2):
            dataset.__getitems__(list(range(50)))
        dataset.__getitems__(list(range(49, 60)))
        fields = [asked.target.partition("fields=")[2].partition("&")[0] for asked in peer.asked[1:]]
        assert fields == [
            "targets,labels,fingerprints,ids",
            "targets,labels,ids",
            "targets,labels,fingerprints,ids",
        ]
        store.close()

    def test_moving_a_batch_leaves_its_ids(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """`to` takes inputs and targets along."""
        batch = SoftTargetDataset(tiny_inputs, store)[0].to("meta")
        assert (batch.inputs.device.type, batch.targets.logits_BC.device.type) == ("meta", "meta")
        assert batch.ids.tolist() == [0]


class TestInputs:
    def test_a_sequence_pairs_by_the_ids_given(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """A shuffled, shortened list of tensors is right as long as its ids are."""
        ids = np.random.default_rng(1).permutation(200)[:90]
        items = [torch.from_numpy(tiny_inputs.inputs[i].copy()) for i in ids]
        batch = SoftTargetDataset(items, store, ids=ids).__getitems__(range(90))
        np.testing.assert_array_equal(batch.ids, ids)
        assert is_right(batch, store, tiny_inputs)

    @pytest.mark.parametrize(
        "make", [np.array, torch.from_numpy, lambda a: TensorDataset(torch.from_numpy(a), torch.zeros(len(a)))]
    )
    def test_arrays_tensors_and_torch_data_sets_are_inputs(
        self, store: softlabels.TargetStore, tiny_inputs: Any, make: Any
    ) -> None:
        """Whatever has a length and items, with ids beside it."""
        dataset = SoftTargetDataset(make(tiny_inputs.inputs[5:9].copy()), store, ids=[5, 6, 7, 8])
        assert dataset.__getitems__([1, 3]).ids.tolist() == [6, 8]

    def test_own_labels_win_over_the_stores(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """A student may know fewer labels than the teacher's job had, or others."""
        labelled = ArrayTransferSet("mine", tiny_inputs.inputs, labels=np.where(np.arange(200) < 6, 9, -1))
        labels = SoftTargetDataset(labelled, store).__getitems__([5, 6]).targets.labels_B
        assert labels is not None
        assert labels.tolist() == [9, -1]
        pairs = [(row, None if i else 4) for i, row in enumerate(tiny_inputs.inputs[:2])]
        labels = SoftTargetDataset(pairs, store, ids=[0, 1]).__getitems__([0, 1]).targets.labels_B
        assert labels is not None
        assert labels.tolist() == [4, -1]

    def test_positions_are_no_ids(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """A sequence without ids is refused: pairing by position is the mistake this is there to prevent."""
        with pytest.raises(RequestError, match="position"):
            SoftTargetDataset(list(tiny_inputs.inputs), store)

    def test_ids_beside_a_transfer_set_are_refused(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """It brings its own, and only one of the two can be right."""
        with pytest.raises(RequestError, match="its own ids"):
            SoftTargetDataset(tiny_inputs, store, ids=range(200))

    @pytest.mark.parametrize(
        ("ids", "error"), [([1, 2], ShapeMismatchError), ([1, 1, 2], BadIdsError), ([1.5, 2, 3], BadIdsError)]
    )
    def test_ids_that_cannot_be(self, store: softlabels.TargetStore, ids: list[Any], error: type[Exception]) -> None:
        """Too few, repeated, or no ids at all."""
        with pytest.raises(error):
            SoftTargetDataset([np.zeros(4)] * 3, store, ids=ids)

    def test_inputs_of_different_shapes_share_no_batch(self, store: softlabels.TargetStore) -> None:
        """The error tells the shapes."""
        dataset = SoftTargetDataset([np.zeros(4), np.zeros(5)], store, ids=[0, 1])
        with pytest.raises(ShapeMismatchError, match=r"\(4,\), \(5,\)"):
            dataset.__getitems__([0, 1])


class TestChecks:
    @pytest.mark.parametrize("check", ["first", "always"])
    def test_shuffled_inputs_are_found_out(self, store: softlabels.TargetStore, tiny_inputs: Any, check: Any) -> None:
        """The commonest mistake of all: the same data in another order. The samples are named."""
        dataset = SoftTargetDataset(ArrayTransferSet("shuffled", tiny_inputs.inputs[::-1]), store, check=check)
        with pytest.raises(FingerprintMismatchError, match="ids 3, 4") as caught:
            dataset.__getitems__([3, 4])
        assert caught.value.context == {"ids": [3, 4], "mismatched": 2}

    @pytest.mark.parametrize(
        "change", [lambda a: a.astype(np.float64), lambda a: a / 2, lambda a: a.reshape(200, 2, 2), lambda a: a + 0.0]
    )
    def test_other_preprocessing_is_found_out(
        self, store: softlabels.TargetStore, tiny_inputs: Any, change: Any
    ) -> None:
        """Another type, scale or shape is another input; the very same bytes are the same."""
        changed = change(tiny_inputs.inputs)
        dataset = SoftTargetDataset(ArrayTransferSet("changed", changed), store)
        if changed.dtype == np.float32 and np.array_equal(changed, tiny_inputs.inputs):
            assert len(dataset.__getitems__([3])) == 1
        else:
            with pytest.raises(FingerprintMismatchError, match="preprocessing"):
                dataset.__getitems__([3])

    def test_the_first_sight_decides_and_always_looks_again(
        self, store: softlabels.TargetStore, tiny_inputs: Any
    ) -> None:
        """Inputs that change while training are found by 'always' alone."""
        for check, is_found in (("first", False), ("always", True)):
            inputs = tiny_inputs.inputs.copy()
            dataset = SoftTargetDataset(ArrayTransferSet("moving", inputs), store, check=check)  # type: ignore[arg-type]
            dataset.__getitems__([3])
            inputs[3] += 1
            if is_found:
                with pytest.raises(FingerprintMismatchError):
                    dataset.__getitems__([3])
            else:
                dataset.__getitems__([3])
            inputs[4] += 1
            with pytest.raises(FingerprintMismatchError):
                dataset.__getitems__([3, 4])

    def test_never_is_a_choice(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """Whoever augments inputs on purpose says so."""
        augmented = ArrayTransferSet("jittered", tiny_inputs.inputs + 1)
        assert len(SoftTargetDataset(augmented, store, check="never").__getitems__([0, 1])) == 2

    def test_other_words_are_refused(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """A misspelt choice must not switch the check off."""
        with pytest.raises(RequestError, match="'first', 'always' or 'never'"):
            SoftTargetDataset(tiny_inputs, store, check="frist")  # type: ignore[arg-type]

    def test_a_store_without_fingerprints_needs_a_word(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """Nothing can be checked, which is not passed over."""

        class WithoutFingerprints:
            def __init__(self) -> None:

                arrays = {name: spec for name, spec in store.manifest.arrays.items() if name != "fingerprints"}
                self.manifest = structs.replace(store.manifest, arrays=arrays)

        with pytest.raises(UnknownFieldError, match="check='never'"):
            SoftTargetDataset(tiny_inputs, WithoutFingerprints())  # type: ignore[arg-type]

    def test_samples_that_the_store_lacks_are_named(self, far: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """On first use, before anything is learnt."""
        more = ArrayTransferSet("more", np.zeros((201, 4), np.float32))
        with pytest.raises(UnknownIdError, match="200"):
            SoftTargetDataset(more, far).__getitems__([5, 200])

    @pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), "4"])
    def test_a_temperature_that_cannot_be(
        self, store: softlabels.TargetStore, tiny_inputs: Any, temperature: Any
    ) -> None:
        """Refused when the data set is made, not in the middle of an epoch."""
        with pytest.raises(TemperatureError):
            SoftTargetDataset(tiny_inputs, store, temperature=temperature)

    def test_a_locked_temperature(self, tmp_path: Path, make_store: Any) -> None:
        """Also when the data set is made."""
        data = ArrayTransferSet("data", np.zeros((4, 2), np.float32))
        locked = TemperatureSpec(default=3.0, captured=3.0, locked=True)
        root = make_store(tmp_path / "mean", data, np.eye(4, 3, dtype=np.float32), temperature=locked)
        with softlabels.open(root) as store:
            assert SoftTargetDataset(data, store).temperature == 3.0
            with pytest.raises(TemperatureLockedError):
                SoftTargetDataset(data, store, temperature=4.0)


class TestCollateBatches:
    def _targets(self, rows: int, **changes: Any) -> SoftTargetBatch:
        known: dict[str, Any] = {"temperature": 2.0, "captured_temperature": 1.0, "locked": False}
        return SoftTargetBatch(logits_BC=torch.zeros(rows, 3), **{**known, **changes})

    def _batch(self, ids: list[Any], **changes: Any) -> DistillationBatch:
        targets = self._targets(len(ids), **changes)
        return DistillationBatch(inputs=torch.zeros(len(ids), 2), targets=targets, ids=np.array(ids))

    def test_a_batch_passes_as_it_is(self) -> None:
        """What `__getitems__` gave is one already."""
        batch = self._batch([1, 2])
        assert collate_batches(batch) is batch
        assert collate_batches([batch]) is batch

    def test_samples_are_joined_in_order(self) -> None:
        """For wrappers that fetch one sample after the other."""
        joined = collate_batches(
            [self._batch([4], labels_B=torch.tensor([1])), self._batch([2, 9], labels_B=torch.tensor([0, -1]))]
        )
        assert joined.ids.tolist() == [4, 2, 9]
        assert joined.targets.labels_B is not None
        assert joined.targets.labels_B.tolist() == [1, 0, -1]
        assert joined.inputs.shape == (3, 2)

    def test_temperatures_are_not_mixed(self) -> None:
        """The loss has one T for all rows."""
        with pytest.raises(ShapeMismatchError, match="one T"):
            collate_batches([self._batch([1]), self._batch([2], temperature=3.0)])

    def test_labelled_and_unlabelled_parts_are_not_mixed(self) -> None:
        """Rows without a label are marked, not left out."""
        with pytest.raises(ShapeMismatchError, match="-1"):
            collate_batches([self._batch([1]), self._batch([2], labels_B=torch.tensor([0]))])

    def test_nothing_is_no_batch(self) -> None:
        """An empty list is an error."""
        with pytest.raises(EmptyBatchError):
            collate_batches([])

    def test_rows_that_do_not_match_are_no_batch(self) -> None:
        """Counted when it is made."""
        with pytest.raises(ShapeMismatchError, match="2 inputs, 3 targets and 1 ids"):
            DistillationBatch(inputs=torch.zeros(2, 2), targets=self._targets(3), ids=np.array([1]))


class TestLoader:
    @pytest.mark.parametrize("where", ["store", "far"])
    @pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (1, "spawn"), (1, "forkserver")], ids=str)
    def test_every_sample_once_with_its_own_target(
        self, request: pytest.FixtureRequest, tiny_inputs: Any, where: str, workers: int, method: Any
    ) -> None:
        """Two epochs, near and far, whatever fetches: the same order by the seed, each sample exactly once."""
        store = request.getfixturevalue(where)
        dataset = SoftTargetDataset(tiny_inputs, store)
        loader = data_loader(dataset, batch_size=32, seed=5, workers=workers, start_method=method)
        for _ in range(2):
            batches = list(loader)
            assert [len(batch) for batch in batches] == [32] * 6 + [8]
            assert all(is_right(batch, store, tiny_inputs) for batch in batches)
            assert sorted(np.concatenate([batch.ids for batch in batches]).tolist()) == list(range(200))

    def test_the_order_depends_on_the_seed_alone(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """Not on the workers, nor on what was drawn elsewhere."""

        def orders(seed: int, workers: int) -> list[list[int]]:
            loader = data_loader(SoftTargetDataset(tiny_inputs, store), batch_size=64, seed=seed, workers=workers)
            return [np.concatenate([batch.ids for batch in loader]).tolist() for _ in range(3)]

        expected = orders(1, 0)
        torch.rand(3)
        assert orders(1, 0) == expected
        assert orders(1, 2) == expected
        assert orders(2, 0) != expected
        assert expected[0] != expected[1] != expected[2]

    def test_in_order_and_without_the_rest(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """As a DataLoader has it."""
        loader = data_loader(SoftTargetDataset(tiny_inputs, store), batch_size=64, shuffle=False, remainder="drop")
        assert np.concatenate([batch.ids for batch in loader]).tolist() == list(range(192))

    def test_an_error_in_a_worker_keeps_its_class(self, far: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """A mismatch found in another process is raised here as what it is."""
        shuffled = ArrayTransferSet("shuffled", tiny_inputs.inputs[::-1])
        loader = data_loader(SoftTargetDataset(shuffled, far), batch_size=50, workers=1, start_method="fork")
        with pytest.raises(FingerprintMismatchError, match="not those that the targets"):
            list(loader)

    def test_torchs_own_wrappers_work(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """Subset asks for batches, ConcatDataset for one sample after the other."""
        dataset = SoftTargetDataset(tiny_inputs, store)
        for wrapped in (Subset(dataset, list(range(100, 120))), ConcatDataset([dataset, dataset])):
            loader = DataLoader(wrapped, batch_size=10, collate_fn=collate_batches)
            assert is_right(next(iter(loader)), store, tiny_inputs)

    def test_torchs_own_collation_is_refused_loudly(self, store: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """Forgetting `collate_batches` is an error and no nonsense."""
        with pytest.raises(TypeError, match="DistillationBatch"):
            next(iter(DataLoader(SoftTargetDataset(tiny_inputs, store), batch_size=4)))

    def test_it_pickles_with_its_store(self, far: softlabels.TargetStore, tiny_inputs: Any) -> None:
        """What spawned workers need."""
        copy = pickle.loads(pickle.dumps(SoftTargetDataset(tiny_inputs, far, temperature=3.0)))
        assert is_right(copy.__getitems__([1, 2]), far, tiny_inputs)
        assert copy.temperature == 3.0
        copy.store.close()
