"""Transfer sets read from where users keep them: one module for each source, and a registry of their short names."""

from __future__ import annotations

from softlabels.transfer_sets.sample_ids import examine_ids, ids_sha256
from softlabels.transfer_sets.sources import (
    KINDS,
    SupportsAllIds,
    SupportsIdentity,
    SupportsIdSpec,
    SupportsLengths,
    check_source,
    load_transfer_set,
)

__all__ = [
    "KINDS",
    "SupportsAllIds",
    "SupportsIdSpec",
    "SupportsIdentity",
    "SupportsLengths",
    "check_source",
    "examine_ids",
    "ids_sha256",
    "load_transfer_set",
]
