"""softlabels_client: what a student's process needs. Light to import: torch comes with what needs it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from softlabels_client.http.address import StoreAddress, parse_address
from softlabels_client.http.http_rows import HttpRows
from softlabels_client.http.retry import RetryPolicy
from softlabels_client.http.transport import HttpTransport
from softlabels_client.training.settings import DistillSettings

if TYPE_CHECKING:
    from softlabels_client.data.dataset import SoftTargetDataset, ViewDataset, data_loader
    from softlabels_client.data.loader import DistillationBatch, StatefulLoader, collate_batches
    from softlabels_client.data.sampler import EpochDistributedSampler, EpochSampler
    from softlabels_client.data.stream_dataset import SoftTargetStream, stream_loader
    from softlabels_client.training.checkpoint import CheckpointFolder, save_student
    from softlabels_client.training.step import count_errors
    from softlabels_client.training.trainer import DistillResult, distill
    from softlabels_client.training.training_log import CsvLog, PairRecord, TensorBoardLog

__all__ = [
    "CheckpointFolder",
    "CsvLog",
    "DistillResult",
    "DistillSettings",
    "DistillationBatch",
    "EpochDistributedSampler",
    "EpochSampler",
    "HttpRows",
    "HttpTransport",
    "PairRecord",
    "RetryPolicy",
    "SoftTargetDataset",
    "SoftTargetStream",
    "StatefulLoader",
    "StoreAddress",
    "TensorBoardLog",
    "ViewDataset",
    "collate_batches",
    "count_errors",
    "data_loader",
    "distill",
    "parse_address",
    "save_student",
    "stream_loader",
]

_NEEDS_TORCH = {
    "CheckpointFolder": "training.checkpoint",
    "CsvLog": "training.training_log",
    "DistillResult": "training.trainer",
    "DistillationBatch": "data.loader",
    "EpochDistributedSampler": "data.sampler",
    "EpochSampler": "data.sampler",
    "PairRecord": "training.training_log",
    "SoftTargetDataset": "data.dataset",
    "SoftTargetStream": "data.stream_dataset",
    "StatefulLoader": "data.loader",
    "TensorBoardLog": "training.training_log",
    "ViewDataset": "data.dataset",
    "collate_batches": "data.loader",
    "count_errors": "training.step",
    "data_loader": "data.dataset",
    "distill": "training.trainer",
    "save_student": "training.checkpoint",
    "stream_loader": "data.stream_dataset",
}


def __getattr__(name: str) -> Any:
    module = _NEEDS_TORCH.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
