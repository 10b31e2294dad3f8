"""Loaders: what happens when a worker process of a torch DataLoader ends on its own."""

from __future__ import annotations

import os
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from softlabels.errors import WorkerDiedError
from softlabels_client.data.loader import _fetched


class EndsItsWorker(Dataset[int]):
    """A data set whose first item ends the process that asks for it, as the kernel does when memory runs out."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, position: int) -> int:
        os._exit(9)


class Fails(EndsItsWorker):
    def __getitem__(self, position: int) -> int:
        raise RuntimeError("no such picture")


class TestWorkers:
    def test_a_worker_that_ends_has_an_error_of_its_own(self) -> None:
        """Its class says so, not only torch's message."""
        loader: DataLoader[Any] = DataLoader(EndsItsWorker(), num_workers=1, multiprocessing_context="spawn")
        with pytest.raises(WorkerDiedError, match="exited unexpectedly"):
            list(_fetched(loader))

    def test_other_errors_stay_what_they_are(self) -> None:
        """A RuntimeError of the data set is not a dead worker."""
        with pytest.raises(RuntimeError, match="no such picture") as caught:
            list(_fetched(DataLoader(Fails())))
        assert not isinstance(caught.value, WorkerDiedError)
