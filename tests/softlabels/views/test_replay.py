"""Views: a trainer replays the bytes that the teacher saw, or gets an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs

import softlabels
from softlabels.errors import FingerprintMismatchError, JobError, RequestError, ViewReplayError
from softlabels.manifest import Manifest, ViewSpec
from softlabels.precompute import load_job, precompute
from softlabels.softmath import soften
from softlabels.store import LocalRows
from softlabels.transfer_set import ArrayTransferSet
from softlabels.views import ViewReplay, load_view_transform
from softlabels_client.data.dataset import ViewDataset, data_loader

PARTS = '''
import numpy as np
import torch
from softlabels.transfer_set import ArrayTransferSet


def pictures(samples=40, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.integers(0, 256, size=(samples, 3, 12, 12)).astype(np.uint8)
    return ArrayTransferSet("pictures", inputs, labels=rng.integers(0, 5, samples))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3 * 8 * 8, 5)

    def forward(self, x):
        return self.layer(x.float().flatten(1))


def crop(size=8, strength=0.1):
    """Draws from torch's global generator, as torchvision's transforms do."""
    def one(sample):
        top, left = torch.randint(0, sample.shape[1] - size + 1, (2,)).tolist()
        cut = sample[:, top : top + size, left : left + size].float() / 255
        return cut + strength * torch.randn(cut.shape)
    return one


def crop_by_generator(size=8):
    def one(sample, generator):
        top, left = torch.randint(0, sample.shape[1] - size + 1, (2,), generator=generator).tolist()
        return sample[:, top : top + size, left : left + size].float() / 255
    return one


def kornia_views():
    import kornia.augmentation as K
    return K.AugmentationSequential(
        K.RandomCrop((8, 8)), K.RandomHorizontalFlip(p=0.5), K.ColorJitter(0.2, 0.2, 0.2, 0.1, p=0.5),
        K.RandomRotation(10.0, p=0.5), data_keys=["input"],
    )
'''

JOB = """
[store]
path = "store"
rows_per_shard = 64
rows_per_chunk = 16
[transfer_set]
source = "parts.py:pictures"
[targets]
temperature = 2
encoding = "f32"
[views]
count = 4
transform = "parts.py:{transform}"
[[teachers]]
model = "parts.py:Net"
[run]
batch_size = 30
"""

KINDS = ("crop", "crop_by_generator", "kornia_views")
Made = Callable[[str], Path]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of transform."""
    return str(request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Folders with a finished store of views, one for each kind of transform."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            if kind == "kornia_views":
                pytest.importorskip("kornia", reason="records kornia's parameters")
            folder = folders[kind] = tmp_path_factory.mktemp(kind)
            torch.set_num_threads(1)
            (folder / "parts.py").write_text(PARTS)
            (folder / "job.toml").write_text(JOB.format(transform=kind))
            precompute(load_job(folder / "job.toml"))
        return folders[kind]

    return make


def pictures(folder: Path) -> ArrayTransferSet:
    """The samples of the job."""
    found: ArrayTransferSet = softlabels.references.load_reference("parts.py:pictures", base=folder)()
    return found


def dataset(folder: Path, **options: Any) -> ViewDataset:
    """The student's side, with the transform that the manifest names."""
    return ViewDataset(pictures(folder), softlabels.open(folder / "store"), base=folder, **options)


class TestStoresOfViews:
    """What a job with a [views] table keeps."""

    def test_each_view_has_the_teachers_answer_to_that_view(self, made: Made, kind: str) -> None:
        """Made again from seed or parameters and shown to the teacher, a view gives the target that is kept."""
        folder = made(kind)
        store = softlabels.open(folder / "store")
        teacher = softlabels.references.load_reference("parts.py:Net", base=folder)()
        data = dataset(folder, check="always")
        assert (store.manifest.rows, store.manifest.layout.views) == (160, 4)
        for epoch in range(4):
            data.show_epoch(epoch)
            batch = data[5]
            with torch.inference_mode():
                exact = soften(teacher(batch.inputs).double().numpy(), temperature=2.0)
            kept = store.batch([5], views=epoch).p()
            np.testing.assert_allclose(kept, exact, atol=2e-6)
        seen = [store.batch([5], views=view).p().tolist() for view in range(4)]
        assert len({str(p) for p in seen}) >= 3  # two of the crops may fall on the same place

    def test_every_view_of_every_sample_is_made_again_bit_for_bit(self, made: Made, kind: str) -> None:
        """Over all epochs of a loader, in any order: the fingerprints that the teacher's inputs had."""
        data = dataset(made(kind), check="always")
        loader = data_loader(data, batch_size=16, seed=1)
        for epoch in range(4):
            loader.set_epoch(epoch)
            ids = np.concatenate([batch.ids for batch in loader])
            assert data.view == epoch
            assert sorted(ids.tolist()) == list(range(40))

    def test_views_in_worker_processes(self, made: Made) -> None:
        """Workers that live from epoch to epoch show the epoch's view, too."""
        data = dataset(made("crop"), check="always")
        loader = data_loader(data, batch_size=20, workers=1, start_method="fork")
        for epoch in range(2):
            loader.set_epoch(epoch)
            shown = {int(i): row.numpy().tobytes() for b in loader for i, row in zip(b.ids, b.inputs, strict=True)}
            data.show_epoch(epoch)
            assert shown[7] == data[7].inputs[0].numpy().tobytes()

    def test_all_views_of_a_sample_lie_side_by_side(self, made: Made) -> None:
        """Row = position × views + view."""
        rows = LocalRows(made("crop") / "store")
        by_view = [rows.fetch(np.array([9]), ("targets",), views=np.array([view]))["targets"] for view in range(4)]
        np.testing.assert_array_equal(
            np.concatenate(by_view), rows.fetch_rows(np.arange(36, 40), ("targets",))["targets"]
        )

    def test_the_same_job_again_gives_the_same_store(self, made: Made, tmp_path: Path) -> None:
        """Seeds follow from store, sample and view, so a run from the start keeps the same bytes."""
        first = made("kornia_views")
        for name in ("parts.py", "job.toml"):
            (tmp_path / name).write_text((first / name).read_text())
        again = precompute(load_job(tmp_path / "job.toml"))
        assert again.digest == softlabels.open(first / "store").digest


class TestReplay:
    """Replay, and what is refused."""

    def test_another_transform_is_refused(self, made: Made) -> None:
        """Other code, or other arguments of the same code."""
        folder = made("crop")
        other = load_view_transform("parts.py:crop_by_generator", base=folder)
        with pytest.raises(ViewReplayError, match="differs in code or settings"):
            ViewReplay(softlabels.open(folder / "store").manifest, other)
        stronger = load_view_transform("parts.py:crop", arguments={"strength": 0.2}, base=folder)
        with pytest.raises(ViewReplayError, match="use the same file"):
            ViewReplay(softlabels.open(folder / "store").manifest, stronger)

    def test_other_library_versions_are_refused_by_name(self, made: Made) -> None:
        """Unless every view is compared with its fingerprint anyway."""
        folder = made("crop")
        manifest = with_views(softlabels.open(folder / "store").manifest, libraries={"torch": "1.13.1"})
        transform = load_view_transform("parts.py:crop", base=folder)
        with pytest.raises(ViewReplayError, match=r"torch 1\.13\.1 there"):
            ViewReplay(manifest, transform)
        ViewReplay(manifest, transform, other_versions=True)

    def test_a_view_that_differs_by_a_bit_is_refused(self, made: Made) -> None:
        """Here the sample differs in one pixel: the ids are named."""
        folder = made("crop_by_generator")
        inputs = pictures(folder).inputs.copy()
        inputs[3, :, 5, 5] ^= 1
        data = ViewDataset(inputs, softlabels.open(folder / "store"), ids=np.arange(40), base=folder)
        with pytest.raises(FingerprintMismatchError, match="ids 3"):
            data.__getitems__([2, 3, 4])

    def test_samples_of_another_size_draw_other_parameters(self, made: Made) -> None:
        """What was recorded for one size does not fit another."""
        folder = made("kornia_views")
        store = softlabels.open(folder / "store")
        larger = np.zeros((40, 3, 16, 16), dtype=np.uint8)
        data = ViewDataset(larger, store, ids=np.arange(40), base=folder)
        with pytest.raises((FingerprintMismatchError, ViewReplayError)):
            data.__getitems__([0])

    def test_a_store_without_views_is_refused(self, made: Made) -> None:
        """The message says that the store has no views."""
        folder = made("crop")
        manifest = structs.replace(softlabels.open(folder / "store").manifest, views=None)
        with pytest.raises(RequestError, match="has no views"):
            ViewReplay(manifest, load_view_transform("parts.py:crop", base=folder))

    def test_global_generators_are_not_shared_with_a_training_thread(self, made: Made) -> None:
        """A prefetching thread is told to use workers; a transform that takes a generator needs none."""
        failures: list[Exception] = []

        def fetch(kind: str) -> None:
            try:
                dataset(made(kind)).__getitems__([1])
            except ViewReplayError as error:
                failures.append(error)

        for kind in ("crop", "crop_by_generator"):
            thread = threading.Thread(target=fetch, args=(kind,))
            thread.start()
            thread.join()
        assert len(failures) == 1
        assert "workers=1" in str(failures[0])

    def test_the_process_keeps_its_own_random_numbers(self, made: Made) -> None:
        """Making a view again leaves the generators as they were."""
        data = dataset(made("crop"))
        torch.manual_seed(3)
        np.random.seed(3)
        expected = torch.rand(2), np.random.rand(2)
        torch.manual_seed(3)
        np.random.seed(3)
        data.__getitems__([1, 2])
        assert torch.equal(torch.rand(2), expected[0])
        np.testing.assert_array_equal(np.random.rand(2), expected[1])

    def test_views_of_several_sizes_are_refused(self, made: Made, tmp_path: Path) -> None:
        """A store's rows have one shape of input each."""
        folder = made("crop")
        ragged = "\n\ndef ragged():\n    return lambda sample: sample[:, : 5 + int(torch.randint(0, 5, ()))]\n"
        (tmp_path / "parts.py").write_text((folder / "parts.py").read_text() + ragged)
        (tmp_path / "job.toml").write_text(JOB.format(transform="ragged"))
        with pytest.raises(JobError, match="must return one size"):
            precompute(load_job(tmp_path / "job.toml"))


def with_views(manifest: Manifest, **changes: Any) -> Manifest:
    """The manifest with another description of its views."""
    assert isinstance(manifest.views, ViewSpec)
    return structs.replace(manifest, views=structs.replace(manifest.views, **changes))
