"""Containers: the file formats that hold a store's arrays, Zarr and HDF5, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from softlabels.manifest import Manifest
from softlabels.store.chunks import ShardFile
from softlabels.store.hdf5_container import Hdf5Container
from softlabels.store.zarr_container import ZarrContainer


class StoreContainer(Protocol):
    """A standard file format that holds the store's arrays."""

    def metadata(self, plan: Manifest) -> dict[str, bytes]:
        """Return the format's own metadata files by path, with which any reader of the format opens the whole store."""
        ...

    def shard_files(self, plan: Manifest, shard: int, arrays: Mapping[str, NDArray[Any]]) -> list[ShardFile]:
        """Return the files of one shard, from its arrays [rows of the shard, ...]."""
        ...

    def is_chunk_intact(self, chunk: NDArray[np.uint8]) -> bool:
        """Return whether a chunk's bytes, [stride] and read-only, agree with the checksum at their end."""
        ...


def container_of(manifest: Manifest) -> StoreContainer:
    """Return the container that this manifest names."""
    return Hdf5Container() if manifest.container == "hdf5" else ZarrContainer()
