"""The names of `softlabels.transfer_set` at their 0.1.0 import path, for job modules written for that version."""

from __future__ import annotations

from softlabels.transfer_set import (
    FINGERPRINT_BYTES,
    UNLABELLED,
    ArrayTransferSet,
    FingerprintSum,
    Samples,
    SequenceTransferSet,
    TransferSet,
    sample_fingerprints,
    sequence_fingerprints,
    transfer_set_fingerprint,
)
from softlabels.transfer_set import MapStyleDataset as MapStyle

__all__ = [
    "FINGERPRINT_BYTES",
    "UNLABELLED",
    "ArrayTransferSet",
    "FingerprintSum",
    "MapStyle",
    "Samples",
    "SequenceTransferSet",
    "TransferSet",
    "sample_fingerprints",
    "sequence_fingerprints",
    "transfer_set_fingerprint",
]
