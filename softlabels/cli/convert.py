"""`softlabels convert`, `merge` and `convert-weights`: copies of stores and of checkpoints in other forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from softlabels.manifest import Compression, Container


def convert(
    source: Annotated[Path, Parameter(name="SRC")],
    target: Annotated[Path, Parameter(name="DST")],
    /,
    *,
    container: Container | None = None,
    compress: Compression | None = None,
) -> None:
    """Copy a finished store into another container.

    Every chunk is verified on the way and every array stays bit by bit the same; a store converted there and back has
    its old digest again. Run the same command again after an interruption: it continues where it stopped.

    Args:
        source: folder of the store to copy
        target: folder of the store to make
        container: format of the new store; that of SRC if not given
        compress: compress chunks, for an archive: smaller, but each row costs its whole chunk (zarr: zstd, blosc;
            hdf5: gzip)
    """
    from softlabels.progress import track
    from softlabels.store.convert import convert_store
    from softlabels.store.store_documents import load_manifest

    total = load_manifest(source).rows
    with track(total, f"convert {source}", "rows") as progress:
        manifest = convert_store(source, target, container=container, compression=compress, advance=progress.advance)
    compressed = f", {manifest.shards.compression}" if manifest.shards.compression else ""
    print(f"{target}: {manifest.rows:,} rows in {manifest.container}{compressed}, digest {manifest.digest}")


def merge_stores(source: Path, destination: Path, /, *more: Path) -> int:
    """Unite the committed shards of stores that were begun from the very same plan.

    Takes SOURCE … DESTINATION: the last folder is the destination, all before it are sources. Every file is verified
    while it is copied; the sources stay as they are. The destination is published when no shard is missing.

    Args:
        source: folder of a store, finished or not
        destination: new folder, or a store of that plan
        more: further folders; the last one is the destination
    """
    from softlabels.progress import track
    from softlabels.store.merge import merge

    folders = [source, destination, *more]
    sources, into = folders[:-1], folders[-1]
    done = merge(sources, into, show=track)
    for folder in sources:
        print(f"  {folder}: {done.copied.get(str(folder), 0)} shards copied")
    for shard, message in sorted(done.damaged.items()):
        print(f"  shard {shard} is damaged: {message}")
    if done.digest is None:
        print(f"{into}: {len(done.missing)} shards are missing; merge more, or: softlabels resume")
        return 1
    print(f"{into}: complete, digest {done.digest}")
    return 0


def convert_weights(source: Path, destination: Path, /) -> None:
    """Write the weights of a checkpoint, or of a module that was pickled whole, as a safetensors file.

    No code in the checkpoint is imported or run.

    Args:
        source: checkpoint (.pt, .pth, .bin, .ckpt)
        destination: new .safetensors file
    """
    from softlabels.precompute.teachers.checkpoints import convert_checkpoint

    state = convert_checkpoint(source, destination)
    numbers = sum(tensor.numel() for tensor in state.values())
    print(f"{destination}: {len(state)} tensors, {numbers:,} numbers")
