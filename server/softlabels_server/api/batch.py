"""Batch route, POST /v1/stores/{name}/batch: check a request against its store, gather the rows, send them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from softlabels.errors import RequestError, StoreChangedError, UnknownFieldError
from softlabels.ids import id_kind, to_fixed_bytes
from softlabels.manifest import FINGERPRINTS, IDS, LABELS
from softlabels.softmath import check_temperature
from softlabels.target_store import TargetStore, check_transfer_set
from softlabels.targets import check_unlocked
from softlabels_server.api.replies import MEDIA_TYPES, BufferedReply, Format, accepted_format, encode_arrays
from softlabels_server.api.requests import (
    TARGETS,
    BatchSelection,
    from_binary,
    from_json,
    names_digest,
    read_body,
    short,
    too_large,
)
from softlabels_server.catalog import ServedStore, StoreFolder
from softlabels_server.fast_path.response_plan import make_response_plan, plan_keeper
from softlabels_server.fast_path.safetensors_header import layout_for, metadata_of
from softlabels_server.settings import Settings

PATH = "/v1/stores/{name}/batch"
BINARY = "application/octet-stream"
JSON = "application/json"


class BatchEndpoint:
    """Answers batch requests. Plain ASGI: FastAPI's routing would double the cost of a batch.

    Args:
        stores: stores to serve.
        settings: limits of requests and replies.
    """

    def __init__(self, stores: StoreFolder, settings: Settings) -> None:
        self._stores = stores
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, check, gather, send; `api.problems` turns exceptions into replies."""
        headers = Headers(scope=scope)
        reply_format = accepted_format(headers.get("accept"))
        store = await opened(self._stores, scope)
        try:
            selection = await self._read(scope, receive, headers, store)
        except ClientDisconnect:
            return
        check_version(store, if_match=headers.get("if-match"))
        plan = plan_batch(store, selection, self._settings)
        gather = partial(plan.buffers, reply_format)
        buffers = await store.executor_policy.run(gather, reply_bytes=plan.reply_bytes)
        if reply_format == "safetensors":
            self._keep_response_plan(scope, plan)
        await BufferedReply(buffers, media_type=MEDIA_TYPES[reply_format], digest=store.digest)(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, headers: Headers, store: ServedStore) -> BatchSelection:
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in (JSON, BINARY):
            raise HTTPException(415, f"its body is {media_type or 'of no type'!r}; send {JSON} or {BINARY}")
        limits = self._settings
        body = await read_body(receive, headers, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
        query = scope["query_string"].decode("latin-1")
        if media_type == BINARY:
            return from_binary(body, query, limits)
        if query:
            raise RequestError("query parameters go with binary ids; with JSON put everything into the body")
        return from_json(body, store.manifest, limits)

    def _keep_response_plan(self, scope: Scope, plan: BatchPlan) -> None:
        """Let the fast path answer repeats of this request, where its head determines all but the ids.

        Not for JSON, whose ids have no fixed place; nor for sequences, whose replies differ in length; nor with an
        access log, which uvicorn writes and the fast path does not.
        """
        keep = plan_keeper(scope)
        store, selection = plan.store, plan.selection
        is_binary = dict(scope["headers"]).get(b"content-type") == BINARY.encode()
        is_fixed = not store.has_row_offsets and selection.options.decode is None and store.manifest.ids.kind == "int"
        if keep is None or not is_binary or not is_fixed or self._settings.access_log:
            return
        columns = ("ids",) if selection.views is None else ("ids", "views")
        keep(
            partial(
                make_response_plan,
                self._stores,
                store,
                columns=columns,
                count=len(selection.ids),
                names=plan.names,
                temperature=plan.temperature,
            )
        )


def make_route(stores: StoreFolder, settings: Settings) -> Route:
    """Return the batch route over these stores; `api.openapi` describes it."""
    return Route(PATH, BatchEndpoint(stores, settings), methods=["POST"], name="batch")


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """A batch request that passed every check; what remains is to copy its rows.

    Attributes:
        store: version of the store that answers.
        selection: samples and options.
        names: arrays to copy, `ids` among them; without those of the encoding where the server decodes.
        temperature: temperature in the reply's metadata.
        reply_bytes: size of the reply's arrays.
    """

    store: ServedStore
    selection: BatchSelection
    names: tuple[str, ...]
    temperature: float
    reply_bytes: int

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the reply, rows in the order asked.

        Raises:
            UnknownIdError, BadIdsError, RequestError, RowsNotCommittedError, DamageError.
        """
        rows, selection, options = self.store.rows, self.selection, self.selection.options
        kept = tuple(name for name in self.names if name != IDS or IDS in self.store.manifest.arrays)
        arrays = rows.fetch(selection.ids, kept, views=selection.views, spans=selection.spans)
        if options.decode is not None and (options.fields is None or TARGETS in options.fields):
            arrays = {options.decode: self._decoded(options.decode), **arrays}
        # From the store, not from the request, so that a wrong row shows. Sequences keep no ids beside their rows;
        # their index is verified as a whole when the store is opened.
        ids: Any = arrays.get(IDS, selection.ids)
        if id_kind(ids) == "str":
            ids = to_fixed_bytes(ids, width_bytes=self.store.manifest.ids.width_bytes)
        arrays[IDS] = ids
        return arrays

    def buffers(self, reply_format: Format = "safetensors") -> list[bytes | memoryview]:
        """Return the reply as buffers to send one after the other. Raises as `arrays` and `encode_arrays`."""
        store, arrays = self.store, self.arrays()
        samples, decode = len(self.selection.ids), self.selection.options.decode
        if reply_format == "safetensors":
            layout = layout_for(store, arrays, temperature=self.temperature, samples=samples, decode=decode)
            return layout.buffers(arrays)
        metadata = metadata_of(store, self.temperature, samples=samples, decode=decode)
        return encode_arrays(reply_format, arrays, metadata)

    def _decoded(self, decode: str) -> NDArray[np.float32]:
        selection = self.selection
        targets = TargetStore(self.store.rows, where=self.store.name).batch(
            selection.ids, temperature=self.temperature, views=selection.views, spans=selection.spans, labels=False
        )
        return targets.tempered() if decode == "logits" else targets.p()


def plan_batch(store: ServedStore, selection: BatchSelection, settings: Settings) -> BatchPlan:
    """Return the plan of a request that this store may answer.

    Raises:
        StoreChangedError, FingerprintMismatchError, TemperatureError, TemperatureLockedError, UnknownFieldError,
        BatchTooLargeError.
    """
    options = selection.options
    check_version(store, digest=options.digest)
    check_transfer_set(store.manifest, options.transfer_set)
    temperature = reply_temperature(store, options.temperature)
    names = array_names(store, options.fields, encoded=options.decode is None)
    row_bytes = bytes_a_row(store, names) + (0 if options.decode is None else _decoded_bytes(store))
    rows = _row_count(store, selection)
    most = settings.max_reply_bytes // row_bytes
    if rows > most:
        raise too_large(rows, most, "ids" if rows == len(selection.ids) else "rows")
    return BatchPlan(
        store=store, selection=selection, names=names, temperature=temperature, reply_bytes=row_bytes * rows
    )


async def opened(stores: StoreFolder, scope: Scope) -> ServedStore:
    """Return the store that the path names. Raises as `StoreFolder.get`."""
    name: str = scope["path_params"]["name"]
    store = stores.opened(name)
    # The first request of a version reads its manifest and maps its files, which must not block the loop.
    return await run_in_threadpool(stores.get, name) if store is None else store


def check_version(store: ServedStore, *, digest: str | None = None, if_match: str | None = None) -> None:
    """Raise StoreChangedError unless the digest or If-Match header names this version; None skips the check."""
    is_other = digest not in (None, store.digest) or (if_match is not None and not names_digest(if_match, store.digest))
    if is_other:
        yours = (digest or if_match or "")[:128]
        raise StoreChangedError(
            f"store {store.name!r} is now at version {store.digest}, you hold {short(yours)}: rows of two versions "
            "must not be mixed; open the store again",
            store=store.digest,
            yours=yours,
        )


def reply_temperature(store: ServedStore, asked: object) -> float:
    """Return the temperature of a reply. Raises TemperatureError, TemperatureLockedError."""
    spec = store.manifest.temperature
    temperature = spec.default if asked is None else check_temperature(asked)
    check_unlocked(temperature, captured=spec.captured, locked=spec.locked)
    return temperature


def array_names(store: ServedStore, fields: list[str] | None, *, encoded: bool = True) -> tuple[str, ...]:
    """Return the arrays to gather: those that the fields stand for, each once, and always the ids.

    Args:
        store: store that keeps the arrays.
        fields: `fields` of the request.
        encoded: whether `targets` stands for the encoding's arrays; else the server decodes them itself.
    Raises:
        UnknownFieldError: the store keeps no such array.
    """
    kept = {*store.manifest.arrays, IDS}
    if store.has_row_offsets:
        kept.add(FINGERPRINTS)
    if fields is None:
        fields = [TARGETS, LABELS] if LABELS in kept else [TARGETS]
    names: list[str] = []
    for name in fields:
        if name == TARGETS:
            names.extend(store.encoding.fields if encoded else ())
        elif name in kept:
            names.append(name)
        else:
            known = ", ".join(sorted({TARGETS, *kept}))
            raise UnknownFieldError(f"store {store.name!r} keeps no {short(name)}; it keeps {known}", field=name[:128])
    return tuple(dict.fromkeys([*names, IDS]))


def bytes_a_row(store: ServedStore, names: tuple[str, ...]) -> int:
    """Return the bytes of a row in these arrays; arrays that sequences keep once a sample count as if once a row."""
    arrays = store.manifest.arrays
    elsewhere = {IDS: 8 if store.manifest.ids.kind == "int" else store.manifest.ids.width_bytes, FINGERPRINTS: 16}
    return sum(arrays[name].row_bytes if name in arrays else elsewhere[name] for name in names)


def _decoded_bytes(store: ServedStore) -> int:
    # Members are all decoded before they are averaged.
    return 4 * store.manifest.classes * (store.manifest.members or 1)


def _row_count(store: ServedStore, selection: BatchSelection) -> int:
    """Return the number of rows of the reply before any is read: a small request must not fill the memory."""
    if not store.has_row_offsets:
        return len(selection.ids)
    if selection.spans is None:
        return int(store.rows.row_counts(selection.ids).sum())
    # A range that is refused later is clipped to the store here, so that the sum cannot overflow.
    begin, end = np.clip(selection.spans, 0, store.manifest.rows).T
    return max(len(selection.ids), int(np.maximum(end - begin, 0).sum()))
