"""What a file format must do for a store: Zarr and HDF5 each do it in a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from softlabels.manifest import Manifest
from softlabels.store.files import Buffer
from softlabels.store.geometry import Part


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One file of a shard, ready to be written: its place in the store, its bytes, and where each array lies in it."""

    path: str
    buffers: list[Buffer]
    parts: Mapping[str, Part]


class StoreContainer(Protocol):
    """A standard file format that holds the store's arrays."""

    def metadata(self, plan: Manifest) -> dict[str, bytes]:
        """The format's own metadata files, by path: what lets any reader of the format open the whole store."""
        ...

    def shard_files(self, plan: Manifest, shard: int, arrays: Mapping[str, NDArray[Any]]) -> list[ShardFile]:
        """The files of one shard, from its arrays [rows of the shard, …]."""
        ...

    def chunk_is_sound(self, chunk: NDArray[Any]) -> bool:
        """Whether a chunk's bytes, uint8 [stride] and read-only, agree with the checksum at their end."""
        ...


def container_of(manifest: Manifest) -> StoreContainer:
    """The container that this manifest names."""
    if manifest.container == "hdf5":
        from softlabels.store.hdf5_container import Hdf5Container

        return Hdf5Container()
    from softlabels.store.zarr_container import ZarrContainer

    return ZarrContainer()
