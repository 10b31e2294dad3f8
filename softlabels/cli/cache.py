"""`softlabels cache list | clear`: which rows of served stores are kept on this machine, and how they go."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softlabels_client.cache import CacheFolder, KeptStore


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its arguments."""
    parser = commands.add_parser(
        "cache",
        help="show or clear the rows that are kept on this machine",
        description="Rows of served stores that were opened with a cache are kept on this machine, by the version of "
        "the store. List what is kept, or remove it; what a running trainer has open stays.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, run, said in (("list", run_list, "show what is kept"), ("clear", run_clear, "remove what is kept")):
        action = actions.add_parser(name, help=said)
        action.add_argument(
            "--folder",
            type=Path,
            help="of the cache; $SOFTLABELS_CACHE or ~/.cache/softlabels when left out",
        )
        action.set_defaults(run=run)
        if name == "clear":
            action.add_argument("--digest", default="", help="only versions whose digest begins so")


def run_list(options: argparse.Namespace) -> int:
    """Print a line for each version that is kept."""
    where, folder = _folder(options)
    print(f"cache in {where}")
    _show(folder.kept())
    return 0


def run_clear(options: argparse.Namespace) -> int:
    """Remove what is not in use, and say what was."""
    where, folder = _folder(options)
    removed, stayed = folder.clear(options.digest)
    print(f"removed from {where}: {len(removed)}; stays, because a process has it open: {len(stayed)}")
    _show(stayed)
    return 0


def _folder(options: argparse.Namespace) -> tuple[Path, CacheFolder]:
    from softlabels_client.cache import CacheFolder, default_folder

    where = options.folder or default_folder()
    return where, CacheFolder(where)


def _show(stores: Sequence[KeptStore]) -> None:
    for kept in stores:
        opened = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.last_opened_s))
        print(
            f"{kept.name}  {kept.digest[:12]}  {kept.kept_rows} of {kept.rows} rows  {kept.disk_bytes / 1e6:.1f} MB on "
            f"disk, {kept.size_bytes / 1e6:.1f} at most  {'in use' if kept.in_use else f'last opened {opened}'}"
        )
