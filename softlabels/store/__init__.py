"""Stores on disk: written shard by shard, read row by row."""

from __future__ import annotations

from softlabels.errors import MissingExtraError

try:
    import google_crc32c as _crc32c
except ImportError as error:
    raise MissingExtraError(
        "stores on disk need crc32c, zarr and h5py, which are not installed: `pip install softlabels[store]`; a store "
        "behind http(s) needs none of them",
        extra="store",
    ) from error

from softlabels.store.sample_index import SampleTable
from softlabels.store.store_plan import plan_store
from softlabels.store.store_reader import LocalRows
from softlabels.store.writer import ShardClaim, StoreWriter

__all__ = ["LocalRows", "SampleTable", "ShardClaim", "StoreWriter", "plan_store"]

del _crc32c
