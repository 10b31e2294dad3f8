"""Safetensors header of a batch reply, built once for each (version, fields, batch size), and the HTTP header lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from softlabels import wire
from softlabels_server.catalog import ServedStore

REPLY_FORMAT = "softlabels-batch/1"
"""`format` in the metadata of a batch reply; docs/http.md describes it."""

DIGEST_HEADER = "softlabels-digest"
"""Response header: version of the store that the rows come from."""

MAX_LAYOUTS = 256
"""Headers kept per store; a trainer needs two, one for its batch size and one for the last batch of an epoch."""

Shapes: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and shape of each array."""


@dataclass(frozen=True, kw_only=True)
class ReplyLayout:
    """Header and array order of a reply. Arrays of wider items come first, so that all are aligned.

    Attributes:
        header: length field and header of the safetensors file.
        names: arrays in the order of their bytes; the checksum follows them.
        size_bytes: size of the whole file.
    """

    header: bytes
    names: tuple[str, ...]
    size_bytes: int

    def buffers(self, arrays: Mapping[str, NDArray[Any]]) -> list[bytes | memoryview]:
        """Return the file as buffers to send one after the other, without copying the arrays."""
        checksum = wire.checksum_of(arrays[name] for name in self.names)
        return [self.header, *(as_buffer(arrays[name]) for name in self.names), as_buffer(checksum)]


def layout_for(
    store: ServedStore,
    arrays: Mapping[str, NDArray[Any]],
    *,
    temperature: float,
    samples: int,
    decode: str | None = None,
) -> ReplyLayout:
    """Return the layout of a reply with these arrays, from the store's cache where possible."""
    shapes: Shapes = tuple((name, array.dtype.str, array.shape) for name, array in arrays.items())
    key = (shapes, temperature, decode)
    layout = store.layouts.get(key)
    if layout is None:
        if len(store.layouts) >= MAX_LAYOUTS:
            store.layouts.clear()
        layout = _make_layout(shapes, metadata_of(store, temperature, samples=samples, decode=decode))
        store.layouts[key] = layout
    return layout


def metadata_of(store: ServedStore, temperature: float, *, samples: int, decode: str | None = None) -> dict[str, str]:
    """Return the metadata of a reply, all strings."""
    manifest = store.manifest
    metadata = {
        "format": REPLY_FORMAT,
        "store": store.name,
        "digest": store.digest,
        "encoding": json.dumps({"name": manifest.encoding.name, "params": dict(manifest.encoding.params)}),
        "classes": str(manifest.classes),
        "temperature": repr(temperature),
        "captured_temperature": repr(float(manifest.temperature.captured)),
        "locked": "true" if manifest.temperature.locked else "false",
        "rows": str(samples),
    }
    return metadata if decode is None else {**metadata, "decode": decode}


def reply_headers(size_bytes: int, *, digest: str, media_type: str = wire.MEDIA_TYPE) -> list[tuple[bytes, bytes]]:
    """Return the HTTP header lines of a reply with rows."""
    return [
        (b"content-type", media_type.encode()),
        (b"content-length", str(size_bytes).encode()),
        (DIGEST_HEADER.encode(), digest.encode()),
        # The format depends on Accept: an HTTP cache must not hand one client's format to another.
        (b"vary", b"accept"),
    ]


def as_buffer(array: NDArray[Any]) -> memoryview:
    """Return an array's bytes, little-endian and in C order, without a copy where they are so already."""
    packed = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return packed.reshape(-1).view(np.uint8).data


def _make_layout(shapes: Shapes, metadata: Mapping[str, str]) -> ReplyLayout:
    wide_first = sorted(shapes, key=lambda entry: -np.dtype(entry[1]).itemsize)
    table = {name: (np.dtype(dtype), shape) for name, dtype, shape in wide_first}
    names = tuple(table)
    table[wire.CHECKSUM] = (np.dtype("<u8"), (1,))
    header = wire.header_bytes(table, metadata)
    size = sum(dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for dtype, shape in table.values())
    return ReplyLayout(header=header, names=names, size_bytes=len(header) + size)
