"""How is a reply laid out? The header of a safetensors file, made once for each (version, fields, batch size)."""

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
"""What the metadata of a reply call its form; docs/http.md describes it."""

MOST_KEPT = 256
"""Headers kept of one store: a trainer has one batch size, and a last batch of another."""

Shapes: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and shape of each array."""


@dataclass(frozen=True, kw_only=True)
class ReplyForm:
    """What stands before the arrays, and their order: those of wider items first, so that all are aligned.

    Attributes:
        header: the length field and header of the safetensors file.
        names: of the arrays, in the order in which their bytes follow; the checksum comes behind them.
        size_bytes: of the whole file.
    """

    header: bytes
    names: tuple[str, ...]
    size_bytes: int

    def buffers(self, arrays: Mapping[str, NDArray[Any]]) -> list[bytes | memoryview]:
        """The file as buffers to be sent one after the other; the arrays are not copied."""
        checksum = wire.checksum_of(arrays[name] for name in self.names)
        return [self.header, *(as_buffer(arrays[name]) for name in self.names), as_buffer(checksum)]


def form_for(
    store: ServedStore,
    arrays: Mapping[str, NDArray[Any]],
    *,
    temperature: float,
    samples: int,
    decode: str | None = None,
) -> ReplyForm:
    """The form of a reply that holds these arrays."""
    shapes: Shapes = tuple((name, array.dtype.str, array.shape) for name, array in arrays.items())
    key = (shapes, temperature, decode)
    form = store.forms.get(key)
    if form is None:
        if len(store.forms) >= MOST_KEPT:
            store.forms.clear()
        form = store.forms[key] = _make(shapes, metadata_of(store, temperature, samples=samples, decode=decode))
    return form


def metadata_of(store: ServedStore, temperature: float, *, samples: int, decode: str | None = None) -> dict[str, str]:
    """What a reply says of itself, all strings."""
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


def as_buffer(array: NDArray[Any]) -> memoryview:
    """An array's bytes, little-endian and in C order, without a copy where it has them so already."""
    packed = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return packed.reshape(-1).view(np.uint8).data


def _make(shapes: Shapes, metadata: Mapping[str, str]) -> ReplyForm:
    wide_first = sorted(shapes, key=lambda entry: -np.dtype(entry[1]).itemsize)
    table = {name: (np.dtype(dtype), shape) for name, dtype, shape in wide_first}
    names = tuple(table)
    table[wire.CHECKSUM] = (np.dtype("<u8"), (1,))
    header = wire.header_bytes(table, metadata)
    size = sum(dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for dtype, shape in table.values())
    return ReplyForm(header=header, names=names, size_bytes=len(header) + size)
