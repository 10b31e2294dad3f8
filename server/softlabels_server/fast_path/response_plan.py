"""Response plans: everything that follows from a request's head alone, stored so that a repeat needs only a gather.

A trainer sends the same request head for every batch of an epoch: same path, fields, version, token and length. Once
the batch route has checked and answered such a request, its plan is stored under the bytes of the head. The next
request with the same head needs only its ids looked up and its rows copied. The batch route itself uses `ReplyLayout`,
the safetensors header of a reply, built once for each combination of version, fields and batch size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from softlabels import wire
from softlabels.errors import SoftLabelsError
from softlabels.ids import IdArray
from softlabels.manifest import IDS
from softlabels.row_sums import append_arrays, crc32c
from softlabels.store import LocalRows
from softlabels_server.catalog import ServedStore, StoreFolder

PLANS_EXTENSION = "softlabels.response_plans"
"""ASGI scope extension: a function that stores a plan for the head of this request."""

MAX_RESPONSE_PLANS = 1024
"""Plans stored by one process; each takes about 2 KB."""

MAX_LAYOUTS = 256
"""Layouts stored per store; a trainer needs two, one for its batch size and one for the last batch of an epoch."""

MAX_HEAD_BYTES = 4096
"""Longer heads are not looked up: a trainer's is a tenth of it."""

DIGEST_HEADER = "softlabels-digest"
"""Response header: version of the store that the rows come from."""

COLUMN_WIDTHS: Mapping[str, int] = {"ids": 1, "views": 1, "spans": 2}
"""Columns of a binary request body and the number of int64 values per sample in each."""

Shapes: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and shape of each array."""


@dataclass(frozen=True, kw_only=True)
class GatheredRows:
    """Rows of a reply.

    Attributes:
        arrays: one per field, by name.
        sums: [R, `sum_names`] CRC-32C of stored arrays' rows, kept since they were written; None where they are not.
    """

    arrays: dict[str, NDArray[Any]]
    sums: NDArray[np.uint32] | None
    sum_names: tuple[str, ...]


def gather(
    rows: LocalRows,
    ids: IdArray,
    names: tuple[str, ...],
    *,
    views: NDArray[np.int64] | None = None,
    spans: NDArray[np.int64] | None = None,
) -> GatheredRows:
    """Return rows with the sums that were kept of them: what is sent must still be what was written.

    Raises as `LocalRows.fetch`.
    """
    selected = rows.select(ids, views=views, spans=spans)
    arrays = rows.read(selected, names)
    return GatheredRows(arrays=arrays, sums=rows.row_sums(selected.rows), sum_names=rows.manifest.row_sum_names)


@dataclass(frozen=True, kw_only=True)
class ReplyLayout:
    """Header and array order of a reply. Arrays with larger items come first, so that all are aligned.

    Attributes:
        header: length field and header of the safetensors file.
        names: arrays in the order of their bytes; the checksum follows them.
        size_bytes: size of the whole file.
    """

    header: bytes
    names: tuple[str, ...]
    size_bytes: int

    def buffers(self, gathered: GatheredRows, question: int) -> list[bytes | NDArray[Any]]:
        """Return the file as buffers to send one after the other, without copying the arrays.

        Args:
            question: checksum of the request.
        """
        arrays = {name: gathered.arrays[name] for name in self.names}
        checksum = append_arrays(crc32c(self.header, question), arrays, gathered.sums, gathered.sum_names)
        return [self.header, *arrays.values(), np.array([checksum], dtype="<u4")]


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
    # The cache belongs to one version of the store; the number of samples is the length of `ids`, part of every reply.
    key = (shapes, temperature, decode)
    layout = store.layouts.get(key)
    if layout is None:
        if len(store.layouts) >= MAX_LAYOUTS:
            store.layouts.clear()
        layout = _make_layout(shapes, metadata_of(store, temperature, samples=samples, decode=decode))
        store.layouts[key] = layout
    return layout


def _make_layout(shapes: Shapes, metadata: Mapping[str, str]) -> ReplyLayout:
    wide_first = sorted(shapes, key=lambda entry: -np.dtype(entry[1]).itemsize)
    table = {name: (np.dtype(dtype), shape) for name, dtype, shape in wide_first}
    names = tuple(table)
    table[wire.CHECKSUM] = (np.dtype("<u4"), (1,))
    header = wire.header_bytes(table, metadata)
    size = sum(dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for dtype, shape in table.values())
    return ReplyLayout(header=header, names=names, size_bytes=len(header) + size)


def metadata_of(store: ServedStore, temperature: float, *, samples: int, decode: str | None = None) -> dict[str, str]:
    """Return the metadata of a reply, all strings."""
    manifest = store.manifest
    metadata = {
        "format": wire.BATCH_FORMAT,
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
        # The format depends on Accept: an HTTP cache must not send one client's format to another.
        (b"vary", b"accept"),
    ]


@dataclass(frozen=True, kw_only=True)
class ResponsePlan:
    """How to answer requests that differ only in their ids.

    Attributes:
        stores: checks whether the store on disk is still this version.
        store: the version.
        columns: columns of the request body, in order.
        count: samples in the body.
        body_bytes: length of the body.
        names: arrays to gather.
        layout: order of the arrays and the header before them.
        head: header lines of the reply; the status line and the date precede them.
        question: checksum of the request up to its columns.
    """

    stores: StoreFolder
    store: ServedStore
    columns: tuple[str, ...]
    count: int
    body_bytes: int
    names: tuple[str, ...]
    layout: ReplyLayout
    head: bytes
    question: int

    def answer(self, body: memoryview) -> list[bytes | NDArray[Any]] | None:
        """Return the buffers of the reply's body, or None where the batch route has to answer."""
        store, policy = self.store, self.store.executor_policy
        if self.stores.opened(store.name) is not store or not policy.may_run_in_loop(self.layout.size_bytes):
            return None
        keys = split_columns(body, self.columns, self.count)
        try:
            gathered = policy.run_in_loop(partial(gather, store.rows, keys.pop(IDS), self.names, **keys))
        except SoftLabelsError:
            # The batch route meets the same error and answers it, so that every error reply has one origin.
            return None
        return self.layout.buffers(gathered, crc32c(body, self.question))


def make_response_plan(
    stores: StoreFolder,
    store: ServedStore,
    columns: tuple[str, ...],
    count: int,
    names: tuple[str, ...],
    temperature: float,
    question: int,
) -> ResponsePlan:
    """Return the plan of a request for fixed-size rows; for arguments see `ResponsePlan`."""
    specs = {name: store.spec_of(name) for name in names}
    # The layout depends on dtypes and shapes alone: views of a single element stand for the arrays.
    shapes = {name: np.broadcast_to(np.empty((), s.dtype), (count, *s.row_shape)) for name, s in specs.items()}
    layout = layout_for(store, shapes, temperature=temperature, samples=count)
    lines = b"".join(b"%b: %b\r\n" % header for header in reply_headers(layout.size_bytes, digest=store.digest))
    return ResponsePlan(
        stores=stores,
        store=store,
        columns=columns,
        count=count,
        # One int64 per column: `spans`, which has two, is for sequences, whose requests get no plan.
        body_bytes=8 * count * len(columns),
        names=names,
        layout=layout,
        head=lines + b"\r\n",
        question=question,
    )


def split_columns(body: bytes | memoryview, columns: tuple[str, ...], count: int) -> dict[str, NDArray[np.int64]]:
    """Return the columns of a binary body by name, [count] or [count, 2] each, views of the body."""
    found, begin = {}, 0
    for name in columns:
        width = COLUMN_WIDTHS[name]
        # The columns are little-endian; only a big-endian machine copies them.
        values = np.frombuffer(body, "<i8", count * width, begin).astype(np.int64, copy=False)
        found[name] = values if width == 1 else values.reshape(count, width)
        begin += values.nbytes
    return found
