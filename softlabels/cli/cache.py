"""`softlabels cache list | clear`: the rows of served stores that are kept on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from softlabels_client.cache import CachedStore, CacheFolder

app = App(name="cache", help_format="markdown", default_parameter=Parameter(negative=()))


@app.command(name="list")
def list_stores(*, folder: Path | None = None) -> None:
    """Show the rows of served stores that are kept on this machine, by store version.

    Args:
        folder: folder of the cache; $SOFTLABELS_CACHE or ~/.cache/softlabels if not given
    """
    where, cache = _open(folder)
    print(f"cache in {where}")
    _show(cache.stores())


@app.command(name="clear")
def clear_stores(*, folder: Path | None = None, digest: str = "") -> None:
    """Remove the rows of served stores from this machine; versions that a process has open stay.

    Args:
        folder: folder of the cache; $SOFTLABELS_CACHE or ~/.cache/softlabels if not given
        digest: remove only versions whose digest begins so
    """
    where, cache = _open(folder)
    removed, stayed = cache.clear(digest)
    print(f"removed from {where}: {len(removed)}; stays, because a process has it open: {len(stayed)}")
    _show(stayed)


def _open(folder: Path | None) -> tuple[Path, CacheFolder]:
    from softlabels_client.cache import CacheFolder, default_folder

    where = folder or default_folder()
    return where, CacheFolder(where)


def _show(stores: Sequence[CachedStore]) -> None:
    for kept in stores:
        opened = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.last_opened_s))
        print(
            f"{kept.name}  {kept.digest[:12]}  {kept.cached_rows} of {kept.rows} rows  {kept.disk_bytes / 1e6:.1f} MB "
            f"on disk, {kept.size_bytes / 1e6:.1f} at most  {'in use' if kept.in_use else f'last opened {opened}'}"
        )
