"""Where does a store lie? From a folder or an address to one object, with a cache on this machine if one is wanted."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from softlabels.errors import RequestError, UnknownStoreError
from softlabels.opening import RowSource, TargetStore


def open_store(
    where: str | Path,
    *,
    token: str | None = None,
    timeout_s: float = 30.0,
    cache: bool | str | Path | None = None,
    cache_bytes: int | None = None,
    cache_read_only: bool = False,
) -> TargetStore:
    """Open a store of soft targets, wherever it lies. Exported as `softlabels.open`.

    Args:
        where: a folder, or `http(s)://host/name` of a store behind `softlabels serve`.
        token: bearer token for a server that asks for one.
        timeout_s: how long one request to a server may take, seconds.
        cache: keep what a server sends on this machine, so that every row is sent once: in this folder, or, with True,
            in the one that SOFTLABELS_CACHE names, else ~/.cache/softlabels. A store in a folder is near already.
        cache_bytes: most that the cache's folder may take, of all stores together; 16 GiB when left out.
        cache_read_only: use what the cache holds and add nothing.
    Raises:
        UnknownStoreError: nothing there; MissingExtraError: a local store, and `softlabels[store]` is not installed;
        RequestError, FormatVersionError, ManifestError, ServerUnreachableError.
    """
    wanted = cache is not None and cache is not False
    if not wanted and (cache_bytes is not None or cache_read_only):
        raise RequestError("cache_bytes and cache_read_only are of a cache, and none was asked for: pass cache=True")
    text = str(where)
    # By name, not by import statement: the floor must not depend on the rooms above it.
    if text.startswith(("http://", "https://")):
        far = importlib.import_module("softlabels_client.http.http_rows").HttpRows(
            text, token=token, timeout_s=timeout_s
        )
        rows = _cached(far, cache, cache_bytes, read_only=cache_read_only) if wanted else far
        return TargetStore(rows, where=text)
    if "://" in text:
        raise UnknownStoreError(f"{text!r}: this softlabels opens folders and http(s) addresses")
    store = importlib.import_module("softlabels.store")
    return TargetStore(store.LocalRows(Path(text)), where=text)


def _cached(far: RowSource, cache: bool | str | Path | None, most_bytes: int | None, *, read_only: bool) -> RowSource:
    if os.name != "posix":
        raise RequestError("a cache needs the file locks of a POSIX system: leave `cache` out here")
    bound: dict[str, Any] = {} if most_bytes is None else {"most_bytes": most_bytes}
    kept = importlib.import_module("softlabels_client.cache")
    rows: RowSource = kept.CachedRows(far, folder=None if cache is True else cache, read_only=read_only, **bound)
    return rows
