"""Device streams: on a CPU they do nothing; on CUDA the rows are those of one stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softlabels.precompute import Job, precompute, teacher_from_module
from softlabels.precompute.job import RunTable, StoreTable, TargetsTable, TeacherTable, TransferSetTable
from softlabels.precompute.pipeline.device import DeviceStreams
from softlabels.precompute.pipeline.inference import TeacherEnsemble
from softlabels.precompute.row_batches import SingleRows
from softlabels.store import LocalRows
from softlabels.transfer_set import ArrayTransferSet

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


class TestOnTheCpu:
    def test_everything_runs_in_order(self) -> None:
        """No copy, no marks, nothing to wait for."""
        streams, inputs = DeviceStreams(torch.device("cpu")), torch.ones(3)
        assert streams.upload(inputs) is inputs
        with streams.forward(), streams.encoding(streams.mark(), [inputs]):
            assert streams.mark() is None
        assert streams.copies_done() is None
        assert not streams.pinned
        streams.synchronize()

    def test_time_without_a_batch_is_idle(self) -> None:
        """As a share of all time, never more than all of it."""
        streams = DeviceStreams(torch.device("cpu"))
        assert streams.idle_share() == 0.0
        streams.add_starved(3600.0)
        assert streams.idle_share() == 1.0


class Deep(nn.Module):
    """Long enough on a device that the next batch is there before it is done."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(16)))
        self.head = nn.Linear(512, 1000)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, 1000]."""
        return self.head(self.layers(inputs))


@needs_cuda
class TestOnCuda:
    @pytest.mark.parametrize("batch_size", [96, "auto"])
    def test_rows_are_those_of_one_stream(self, tmp_path: Path, batch_size: int | str) -> None:
        """Copies, forward passes and encodings that run beside each other take nothing from each other's memory."""
        inputs = np.random.default_rng(0).normal(size=(5_000, 512)).astype(np.float32)
        data, teacher = ArrayTransferSet("rows", inputs), teacher_from_module(Deep(), name="deep", device="cuda")
        job = Job(
            store=StoreTable(path="store", rows_per_shard=1024, rows_per_chunk=64),
            transfer_set=TransferSetTable(source="here:rows"),
            targets=TargetsTable(temperature=4.0, encoding="f32"),
            teachers=(TeacherTable(model="here:Deep"),),
            run=RunTable(batch_size=batch_size, device="cuda", loaders=2),
            base=tmp_path,
        )
        metrics = tmp_path / "metrics.jsonl"
        precompute(job, transfer_set=data, teachers=[teacher], metrics=metrics)
        loader = SingleRows(data, store="store")
        ensemble = TeacherEnsemble(teachers=[teacher], rows=loader, device=torch.device("cuda"))
        rows = LocalRows(job.store_path)
        for batch in loader.samples(np.arange(5_000), 500):
            (exact,) = ensemble.run(batch)
            expected = (exact - exact.amax(dim=1, keepdim=True)).cpu().numpy()
            np.testing.assert_allclose(rows.fetch(batch.ids, ("targets",))["targets"], expected, atol=1e-4)
        assert len(metrics.read_text().splitlines()) == 5
