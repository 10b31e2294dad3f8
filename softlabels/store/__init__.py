"""Stores on disk: written shard by shard, read row by row, verified, repaired, merged and converted."""

from __future__ import annotations

from softlabels.store.sample_index import SampleTable
from softlabels.store.store_plan import plan_store
from softlabels.store.store_reader import LocalRows
from softlabels.store.writer import ShardClaim, StoreWriter

__all__ = ["LocalRows", "SampleTable", "ShardClaim", "StoreWriter", "plan_store"]
