"""`softlabels convert`: copy a finished store into another container, bit-exact, or compress it for an archive."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="copy a store into another container (Zarr, HDF5), bit-exact",
        description="Copy a finished store into another container. Every chunk is verified on the way, every array "
        "stays bit by bit the same, and a store converted there and back has its old digest again. Run the same "
        "command again after an interruption: it goes on where it stopped.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of the store to copy")
    parser.add_argument("target", type=Path, metavar="DST", help="folder of the store to make")
    parser.add_argument("--container", choices=("zarr", "hdf5"), help="format of the new store (default: that of SRC)")
    parser.add_argument(
        "--compress",
        choices=("zstd", "blosc", "gzip"),
        help="compress chunks, for an archive: smaller, but each row costs its whole chunk (zarr: zstd, blosc; "
        "hdf5: gzip)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert, with a progress bar; prints what came of it."""
    from softlabels.progress import track
    from softlabels.store.convert import convert_store
    from softlabels.store.store_documents import load_manifest

    total = load_manifest(options.source).rows
    with track(total, f"convert {options.source}", "rows") as progress:
        manifest = convert_store(
            options.source,
            options.target,
            container=options.container,
            compression=options.compress,
            advance=progress.advance,
        )
    compressed = f", {manifest.shards.compression}" if manifest.shards.compression else ""
    print(f"{options.target}: {manifest.rows:,} rows in {manifest.container}{compressed}, digest {manifest.digest}")
    return 0
