"""What was decided about a batch request that will be asked again, word for word, with other ids?

A trainer sends the same request head for every batch of an epoch: same path, fields, version, token and length. Once
such a request has been answered the long way, all that follows from its head alone is kept: which store, which arrays,
which headers. The next request with the very same bytes before its body needs only its ids looked up and rows copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from starlette.types import Scope

from softlabels import wire
from softlabels.errors import SoftLabelsError
from softlabels.manifest import IDS
from softlabels_server.batches import Gathering, has_row_offsets
from softlabels_server.catalog import ServedStore, StoreFolder
from softlabels_server.forms import ReplyForm, form_for
from softlabels_server.replies import reply_headers
from softlabels_server.requests import split_columns
from softlabels_server.settings import Settings

EXTENSION = "softlabels.recipes"
"""Where the HTTP protocol leaves, in a request's scope, the function that keeps a recipe for the request's head."""

MOST_RECIPES = 1024
"""Kept by one process; each takes about 2 KB."""

MOST_HEAD_BYTES = 4096
"""Longer heads are not looked up: no trainer's is a tenth of it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to answer requests that differ in nothing but their ids.

    Attributes:
        stores: says whether the store on disk is still this version.
        store: the version.
        columns: what the body holds, one after the other.
        count: samples in the body.
        names: of the arrays.
        form: their order and the header before them.
        head: the reply's header lines but for the date, which stands between status line and these.
    """

    stores: StoreFolder
    store: ServedStore
    columns: tuple[str, ...]
    count: int
    body_bytes: int
    names: tuple[str, ...]
    form: ReplyForm
    head: bytes

    def answer(self, body: memoryview) -> list[NDArray[Any]] | None:
        """The arrays of the reply, in order; None where the long way has to find out what is amiss."""
        store, pace = self.store, self.store.pace
        if self.stores.opened(store.name) is not store or not pace.fits_the_loop(self.form.size_bytes):
            return None
        keys = split_columns(body, self.columns, self.count)
        try:
            arrays = pace.run_here(partial(store.rows.fetch, keys.pop(IDS), self.names, **keys))
        except SoftLabelsError:
            return None
        found = [arrays[name] for name in self.form.names]
        return [*found, wire.checksum_of(found)]


Recipes: TypeAlias = dict[bytes, Recipe]
"""By the head of a request, from its first byte to the empty line."""


def remember(scope: Scope, gathering: Gathering, stores: StoreFolder, settings: Settings) -> None:
    """Keep what was decided about a request, where its next like can be answered by it.

    Only for binary ids: a JSON body would have to be read first. Not for sequences, whose replies differ in length.
    """
    keep: Callable[[Callable[[], Recipe]], None] | None = scope.get("extensions", {}).get(EXTENSION)
    request, store = gathering.request, gathering.store
    binary = dict(scope["headers"]).get(b"content-type") == b"application/octet-stream"
    fixed = not has_row_offsets(store) and request.decode is None and store.manifest.ids.kind == "int"
    if keep is None or not binary or not fixed or settings.access_log:
        return
    keep(lambda: _make(gathering, stores))


def _make(gathering: Gathering, stores: StoreFolder) -> Recipe:
    request, store = gathering.request, gathering.store
    columns = ("ids",) if request.views is None else ("ids", "views")
    count = len(request.ids)
    shapes = {
        name: np.broadcast_to(np.empty((), spec.dtype), (count, *spec.row_shape))
        for name, spec in ((name, store.manifest.arrays[name]) for name in gathering.names)
    }
    form = form_for(store, shapes, temperature=gathering.temperature, samples=count)
    lines = b"".join(b"%b: %b\r\n" % header for header in reply_headers(form.size_bytes, digest=store.digest))
    return Recipe(
        stores=stores,
        store=store,
        columns=columns,
        count=count,
        body_bytes=8 * count * len(columns),
        names=gathering.names,
        form=form,
        head=lines + b"\r\n",
    )
