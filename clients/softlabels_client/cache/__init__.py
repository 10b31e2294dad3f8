"""Disk cache of rows from served stores: fetched once, then read from the trainer's disk."""

from __future__ import annotations

from softlabels_client.cache.cache_folder import DEFAULT_BYTES, CachedStore, CacheFolder, default_folder
from softlabels_client.cache.cached_rows import CachedRows

__all__ = ["DEFAULT_BYTES", "CacheFolder", "CachedRows", "CachedStore", "default_folder"]
