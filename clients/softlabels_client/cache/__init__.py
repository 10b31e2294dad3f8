"""Rows of served stores, kept on the machine that trains: fetched once, then read from the disk."""

from __future__ import annotations

from softlabels_client.cache.cache_folder import DEFAULT_BYTES, CacheFolder, KeptStore, default_folder
from softlabels_client.cache.cached_rows import CachedRows

__all__ = ["DEFAULT_BYTES", "CacheFolder", "CachedRows", "KeptStore", "default_folder"]
