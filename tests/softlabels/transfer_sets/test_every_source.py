"""What every source of samples must do alike: real files, written by the libraries that people write them with."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels import softmath
from softlabels.errors import JobError, MissingExtraError
from softlabels.precompute import precompute
from softlabels.precompute.job import job_from_json
from softlabels.store.verify import verify
from softlabels.transfer_set import TransferSet, transfer_set_fingerprint
from softlabels.transfer_sets import KINDS, SupportsIdentity, SupportsIdSpec, load_transfer_set


def loaded(source: Any, **changes: Any) -> TransferSet:
    """The transfer set of a source, with some arguments changed."""
    return load_transfer_set(source.kind, {**source.arguments, **changes}, base=source.base)


class TestEverySource:
    def test_it_gives_what_was_kept(self, source: Any) -> None:
        """Ids, inputs and labels are those that were written; unlabelled samples are among labelled ones."""
        data = loaded(source)
        samples = data.take(np.arange(len(data)))
        assert samples.ids.tolist() == source.ids
        np.testing.assert_array_equal(samples.inputs, source.inputs)
        assert samples.inputs.dtype == source.inputs.dtype
        assert samples.labels is not None
        assert samples.labels.tolist() == source.labels
        assert data.name

    def test_any_order_and_repeats(self, source: Any) -> None:
        """Positions may come in any order, again and again, and a second pass gives the same bytes."""
        data = loaded(source)
        for _ in range(2):
            positions = np.array([13, 0, 7, 7, 2, 13, 8, 1])
            samples = data.take(positions)
            assert samples.ids.tolist() == [source.ids[position] for position in positions]
            np.testing.assert_array_equal(samples.inputs, source.inputs[positions])

    def test_threads_may_share_it(self, source: Any) -> None:
        """Several threads take at the same time, and each gets its own samples."""
        data = loaded(source)
        with ThreadPoolExecutor(4) as pool:
            batches = [np.array([n % 14, (5 * n) % 14]) for n in range(40)]
            for positions, samples in zip(batches, pool.map(data.take, batches), strict=True):
                np.testing.assert_array_equal(samples.inputs, source.inputs[positions])

    def test_it_pickles(self, source: Any) -> None:
        """A copy in another process gives the same samples; arrays on disk do not travel with it."""
        if source.kind == "torch":
            pytest.skip("a torch data set from a file reference pickles where that file is imported")
        data = loaded(source)
        again = pickle.loads(pickle.dumps(data))
        positions = np.array([3, 11])
        np.testing.assert_array_equal(again.take(positions).inputs, source.inputs[positions])
        assert len(again) == len(data)

    def test_it_knows_its_ids_beforehand(self, source: Any) -> None:
        """The plan of a store is made before any sample is read: kind and width of the ids are known."""
        data = loaded(source)
        assert isinstance(data, SupportsIdSpec)
        spec = data.id_spec()
        if isinstance(source.ids[0], str):
            assert (spec.kind, spec.width_bytes) == ("str", max(len(name.encode()) for name in source.ids))
        else:
            assert (spec.kind, spec.dense_start) == ("int", None)

    def test_it_notes_a_change(self, source: Any) -> None:
        """What a set is made of differs as soon as one of its files is written again."""
        data = loaded(source)
        assert isinstance(data, SupportsIdentity)
        before = list(data.identity())
        assert before == list(loaded(source).identity())  # type: ignore[attr-defined]
        os.utime(source.path, ns=(0, 0))
        after = list(data.identity())
        assert [name for name, _ in before] == [name for name, _ in after]
        changed = [name for (name, old), (_, new) in zip(before, after, strict=True) if old != new]
        assert [Path(name).name for name in changed] == [source.path.name]

    def test_an_unknown_argument_is_named(self, source: Any) -> None:
        """With the nearest that there is."""
        with pytest.raises(JobError, match="did you mean `name`"):
            loaded(source, nam="x")
        with pytest.raises(JobError, match="unknown field `base`"):
            loaded(source, base="x")


class TestKinds:
    def test_every_kind_is_tested_here(self, make_source: Callable[[str], Any]) -> None:
        """A new kind comes with its samples in conftest.py."""
        for kind in KINDS:
            assert make_source(kind).kind == kind


TEACHER = """
import torch


class Mean(torch.nn.Module):
    def forward(self, images):
        return images.float().flatten(1)[:, :4]
"""


class TestInAJob:
    def test_a_store_is_made_of_it_inputs_and_all(self, source: Any) -> None:
        """Ids, labels and inputs come back by id from the store that a job makes of the source, and it verifies."""
        (source.base / "teacher.py").write_text(TEACHER)
        document = {
            "store": {"path": "store", "inputs": True, "rows_per_shard": 8, "rows_per_chunk": 4},
            "transfer_set": {"source": source.kind, "arguments": source.arguments},
            "targets": {"temperature": 1.0, "encoding": "f32"},
            "teachers": [{"model": "teacher.py:Mean"}],
            "run": {"batch_size": 5, "device": "cpu"},
        }
        manifest = precompute(job_from_json(document, base=source.base))
        assert manifest.transfer_set.fingerprint == transfer_set_fingerprint(loaded(source))
        with softlabels.open(source.base / "store") as store:
            batch = store.batch(source.ids[::-1], inputs=True)
            np.testing.assert_array_equal(batch.inputs, source.inputs[::-1])
            assert batch.labels is not None
            assert batch.labels.tolist() == source.labels[::-1]
            logits_BC = source.inputs.reshape(14, -1)[:, :4].astype(np.float32)
            np.testing.assert_allclose(batch.p(), softmath.soften(logits_BC[::-1], temperature=1.0), atol=1e-5)
        assert verify(source.base / "store").sound


class TestMissingLibraries:
    @pytest.mark.parametrize(
        ("kind", "library", "extra"),
        [
            ("image_folder", "PIL", "images"),
            ("webdataset", "PIL", "images"),
            ("huggingface", "datasets", "huggingface"),
            ("parquet", "pyarrow", "parquet"),
            ("zarr", "zarr", "store"),
            ("hdf5", "h5py", "store"),
        ],
    )
    def test_the_extra_is_named(
        self, make_source: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, kind: str, library: str, extra: str
    ) -> None:
        """Where a library is not installed, the message is the command that installs it."""
        source = make_source(kind)
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.setitem(sys.modules, f"{library}.parquet", None)
        with pytest.raises(MissingExtraError, match=rf"pip install softlabels\[{extra}\]"):
            loaded(source)
