"""softlabels_client: what a student's process needs. Light to import: torch comes with what needs it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from softlabels_client.address import StoreAddress, parse_address
from softlabels_client.retrying import RetryPolicy
from softlabels_client.rows import HttpRows
from softlabels_client.settings import DistillSettings
from softlabels_client.transport import HttpTransport

if TYPE_CHECKING:
    from softlabels_client.batches import DistillationBatch, collate_batches
    from softlabels_client.checkpoints import CheckpointFolder
    from softlabels_client.datasets import SoftTargetDataset, data_loader
    from softlabels_client.evaluation import count_errors
    from softlabels_client.loaders import StatefulLoader
    from softlabels_client.ordering import EpochDistributedSampler, EpochSampler
    from softlabels_client.streaming import SoftTargetStream, stream_loader
    from softlabels_client.trainer import DistillResult, distill
    from softlabels_client.training_log import CsvLog, PairRecord, TensorBoardLog
    from softlabels_client.view_datasets import ViewDataset
    from softlabels_client.weights import save_student

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
    "CheckpointFolder": "checkpoints",
    "CsvLog": "training_log",
    "DistillResult": "trainer",
    "DistillationBatch": "batches",
    "EpochDistributedSampler": "ordering",
    "EpochSampler": "ordering",
    "PairRecord": "training_log",
    "SoftTargetDataset": "datasets",
    "SoftTargetStream": "streaming",
    "StatefulLoader": "loaders",
    "TensorBoardLog": "training_log",
    "ViewDataset": "view_datasets",
    "collate_batches": "batches",
    "count_errors": "evaluation",
    "data_loader": "datasets",
    "distill": "trainer",
    "save_student": "weights",
    "stream_loader": "streaming",
}


def __getattr__(name: str) -> Any:
    module = _NEEDS_TORCH.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
