"""Response plans: everything that follows from a request's head alone, kept so that a repeat needs only a gather.

A trainer sends the same request head for every batch of an epoch: same path, fields, version, token and length. Once
the batch route has answered and checked such a request, its plan is kept under the bytes of the head. The next request
with the same head needs only its ids looked up and its rows copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from starlette.types import Scope

from softlabels import wire
from softlabels.errors import SoftLabelsError
from softlabels.manifest import IDS
from softlabels_server.catalog import ServedStore, StoreFolder
from softlabels_server.fast_path.safetensors_header import ReplyLayout, layout_for, reply_headers

PLANS_EXTENSION = "softlabels.response_plans"
"""ASGI scope extension: a function that keeps a plan for the head of this request."""

MAX_RESPONSE_PLANS = 1024
"""Plans kept by one process; each takes about 2 KB."""

MAX_HEAD_BYTES = 4096
"""Longer heads are not looked up: a trainer's is a tenth of it."""

COLUMN_WIDTHS: Mapping[str, int] = {"ids": 1, "views": 1, "spans": 2}
"""Columns of a binary request body and the number of int64 values per sample in each."""


@dataclass(frozen=True, kw_only=True)
class ResponsePlan:
    """How to answer requests that differ only in their ids.

    Attributes:
        stores: tells whether the store on disk is still this version.
        store: the version.
        columns: columns of the request body, in order.
        count: samples in the body.
        body_bytes: length of the body.
        names: arrays to gather.
        layout: order of the arrays and the header before them.
        head: header lines of the reply except the date, which stands between the status line and these.
    """

    stores: StoreFolder
    store: ServedStore
    columns: tuple[str, ...]
    count: int
    body_bytes: int
    names: tuple[str, ...]
    layout: ReplyLayout
    head: bytes

    def answer(self, body: memoryview) -> list[NDArray[Any]] | None:
        """Return the arrays of the reply in order, or None where the batch route has to answer."""
        store, policy = self.store, self.store.executor_policy
        if self.stores.opened(store.name) is not store or not policy.may_run_in_loop(self.layout.size_bytes):
            return None
        keys = split_columns(body, self.columns, self.count)
        try:
            arrays = policy.run_in_loop(partial(store.rows.fetch, keys.pop(IDS), self.names, **keys))
        except SoftLabelsError:
            # The batch route meets the same error and answers it, so that every error reply has one origin.
            return None
        found = [arrays[name] for name in self.layout.names]
        return [*found, wire.checksum_of(found)]


ResponsePlans: TypeAlias = dict[bytes, ResponsePlan]
"""Plans by the head of a request, from its first byte to the empty line."""


def plan_keeper(scope: Scope) -> Callable[[Callable[[], ResponsePlan]], None] | None:
    """Return the function that keeps a plan for this request, or None where the protocol offers none."""
    keep: Callable[[Callable[[], ResponsePlan]], None] | None = scope.get("extensions", {}).get(PLANS_EXTENSION)
    return keep


def make_response_plan(
    stores: StoreFolder,
    store: ServedStore,
    *,
    columns: tuple[str, ...],
    count: int,
    names: tuple[str, ...],
    temperature: float,
) -> ResponsePlan:
    """Return the plan of a request for fixed-size rows; for attributes see `ResponsePlan`."""
    shapes = {
        name: np.broadcast_to(np.empty((), spec.dtype), (count, *spec.row_shape))
        for name, spec in ((name, store.manifest.arrays[name]) for name in names)
    }
    layout = layout_for(store, shapes, temperature=temperature, samples=count)
    lines = b"".join(b"%b: %b\r\n" % header for header in reply_headers(layout.size_bytes, digest=store.digest))
    return ResponsePlan(
        stores=stores,
        store=store,
        columns=columns,
        count=count,
        body_bytes=8 * count * len(columns),
        names=names,
        layout=layout,
        head=lines + b"\r\n",
    )


def split_columns(body: bytes | memoryview, columns: tuple[str, ...], count: int) -> dict[str, NDArray[np.int64]]:
    """Return the columns of a binary body by name, [count] or [count, 2] each, views of the body."""
    found, begin = {}, 0
    for name in columns:
        values = np.frombuffer(body, dtype="<i8", count=count * COLUMN_WIDTHS[name], offset=begin).astype(
            np.int64, copy=False
        )
        found[name] = values if COLUMN_WIDTHS[name] == 1 else values.reshape(count, COLUMN_WIDTHS[name])
        begin += values.nbytes
    return found
