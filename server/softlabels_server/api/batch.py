"""Batch route, POST /v1/stores/{name}/batch: check a request against its store, gather the rows, send them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from softlabels import wire
from softlabels.errors import RequestError, StoreChangedError, UnknownFieldError
from softlabels.ids import id_kind, to_fixed_bytes
from softlabels.manifest import FINGERPRINTS, IDS, LABELS
from softlabels.row_sums import crc32c
from softlabels.softmath import check_temperature
from softlabels.store import LocalRows
from softlabels.target_store import TargetStore, check_transfer_set
from softlabels.targets import check_unlocked
from softlabels_server.api.replies import MEDIA_TYPES, Format, accepted_format, encode_arrays, send_buffers
from softlabels_server.api.requests import (
    TARGETS,
    BatchSelection,
    RowOptions,
    from_binary,
    from_json,
    names_digest,
    read_body,
    short,
    too_large,
)
from softlabels_server.catalog import ServedStore, StoreFolder
from softlabels_server.fast_path.response_plan import (
    PLANS_EXTENSION,
    GatheredRows,
    gather,
    layout_for,
    make_response_plan,
    metadata_of,
)
from softlabels_server.fast_path.socket_writer import as_view
from softlabels_server.settings import Settings

BINARY = "application/octet-stream"
JSON = "application/json"


@dataclass(frozen=True)
class BatchEndpoint:
    """Plain ASGI application that answers batch requests: FastAPI's routing would double the cost of a batch."""

    stores: StoreFolder
    settings: Settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, check, gather, send; `api.problems` turns exceptions into replies."""
        headers = Headers(scope=scope)
        reply_format = accepted_format(headers.get("accept"))
        store = await opened(self.stores, scope)
        try:
            selection = await self._read(scope, receive, headers, store)
        except ClientDisconnect:
            return
        check_version(store, if_match=headers.get("if-match"))
        plan = plan_batch(store, selection, self.settings)
        # Of no other request is it known that the rows are still what was written, unless its format has their sums.
        verify = reply_format != "safetensors" or wire.VERIFY_HEADER in headers
        make = partial(plan.buffers, reply_format, verify=verify)
        buffers, checksum = await store.executor_policy.run(make, reply_bytes=plan.reply_bytes)
        # After the gather, so that only a request that could be answered gets a plan.
        if not verify:
            self._keep_response_plan(scope, plan)
        await send_buffers(send, buffers, media_type=MEDIA_TYPES[reply_format], digest=store.digest, checksum=checksum)

    async def _read(self, scope: Scope, receive: Receive, headers: Headers, store: ServedStore) -> BatchSelection:
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in (JSON, BINARY):
            raise HTTPException(415, f"its body is {media_type or 'of no type'!r}; send {JSON} or {BINARY}")
        limits = self.settings
        body = await read_body(receive, headers, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
        query = scope["query_string"].decode("latin-1")
        if media_type == BINARY:
            return from_binary(body, query, limits)
        if query:
            raise RequestError("query parameters go with binary ids; with JSON put everything into the body")
        return from_json(body, store.manifest, limits)

    def _keep_response_plan(self, scope: Scope, plan: BatchPlan) -> None:
        """Let the fast path answer repeats of this request, if its head determines everything except the ids.

        Not for JSON, whose ids have no fixed offsets; nor for sequences, whose replies differ in length; nor with an
        access log, which uvicorn writes and the fast path does not.
        """
        keep = scope.get("extensions", {}).get(PLANS_EXTENSION)
        store, selection = plan.store, plan.selection
        is_binary = dict(scope["headers"]).get(b"content-type") == BINARY.encode()
        is_fixed = not store.has_row_offsets and selection.options.decode is None and store.manifest.ids.kind == "int"
        if keep is None or not is_binary or not is_fixed or self.settings.access_log:
            return
        columns = ("ids",) if selection.views is None else ("ids", "views")
        count = len(selection.ids)
        question = selection.question(store.digest)
        keep(partial(make_response_plan, self.stores, store, columns, count, plan.names, plan.temperature, question))


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """A checked batch request, ready to be gathered.

    Attributes:
        store: version of the store that answers.
        selection: samples and options.
        names: arrays to copy, always with `ids`; without those of the encoding if the server decodes.
        temperature: temperature in the reply's metadata.
        reply_bytes: size of the reply's arrays.
    """

    store: ServedStore
    selection: BatchSelection
    names: tuple[str, ...]
    temperature: float
    reply_bytes: int

    def _gather(self, *, verify: bool) -> GatheredRows:
        selection, options = self.selection, self.selection.options
        is_decoded = options.decode is not None and (options.fields is None or TARGETS in options.fields)
        rows = self.store.rows.every_read() if verify or is_decoded else self.store.rows
        gathered = gather(rows, selection.ids, self.names, views=selection.views, spans=selection.spans)
        arrays = gathered.arrays
        if is_decoded:
            arrays = {str(options.decode): self._decoded(rows), **arrays}
        # From the store, not from the request, so that a client can detect a wrong row.
        ids: Any = arrays[IDS]
        if id_kind(ids) == "str":
            arrays[IDS] = to_fixed_bytes(ids, width_bytes=self.store.manifest.ids.width_bytes)
        return replace(gathered, arrays=arrays)

    def buffers(
        self, reply_format: Format = "safetensors", *, verify: bool = False
    ) -> tuple[list[bytes | NDArray[Any]], int | None]:
        """Return the reply as buffers to send one after the other, and its checksum if it is not part of them.

        Args:
            verify: compare the rows with what was written.
        Raises:
            UnknownIdError, BadIdsError, RequestError, RowsNotCommittedError, DamageError; and as `encode_arrays`.
        """
        store, selection = self.store, self.selection
        gathered = self._gather(verify=verify)
        question = crc32c(selection.column_bytes, selection.question(store.digest))
        samples, decode = len(selection.ids), selection.options.decode
        if reply_format == "safetensors":
            layout = layout_for(store, gathered.arrays, temperature=self.temperature, samples=samples, decode=decode)
            return layout.buffers(gathered, question), None
        metadata = metadata_of(store, self.temperature, samples=samples, decode=decode)
        buffers = encode_arrays(reply_format, gathered.arrays, metadata)
        return buffers, reduce(lambda before, buffer: crc32c(as_view(buffer), before), buffers, question)

    def _decoded(self, rows: LocalRows) -> NDArray[np.float32]:
        selection = self.selection
        targets = TargetStore(rows, where=self.store.name).batch(
            selection.ids, temperature=self.temperature, views=selection.views, spans=selection.spans, labels=False
        )
        return targets.tempered() if selection.options.decode == "logits" else targets.p()


def plan_batch(store: ServedStore, selection: BatchSelection, settings: Settings) -> BatchPlan:
    """Return the plan of a request that this store may answer.

    Raises:
        StoreChangedError, FingerprintMismatchError, TemperatureError, TemperatureLockedError, UnknownFieldError,
        BatchTooLargeError.
    """
    options, manifest = selection.options, store.manifest
    temperature = checked_temperature(store, options)
    names = array_names(store, options.fields, encoded=options.decode is None)
    row_bytes = sum(store.spec_of(name).row_bytes for name in names)
    if options.decode is not None:
        row_bytes += 4 * manifest.classes * (manifest.members or 1)  # members are all decoded before they are averaged
    rows = _row_count(store, selection)
    # Never a division by zero, since the ids are always among the names.
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
            f"store {store.name!r} is now at version {store.digest}, you have {short(yours)}: rows of two versions "
            "must not be mixed; open the store again",
            store=store.digest,
            yours=yours,
        )


def checked_temperature(store: ServedStore, options: RowOptions) -> float:
    """Return the temperature of a reply if the store has the version, transfer set and temperature in the options.

    Raises:
        StoreChangedError, FingerprintMismatchError, TemperatureError, TemperatureLockedError.
    """
    check_version(store, digest=options.digest)
    check_transfer_set(store.manifest, options.transfer_set)
    spec = store.manifest.temperature
    temperature = spec.default if options.temperature is None else check_temperature(options.temperature)
    check_unlocked(temperature, captured=spec.captured, locked=spec.locked)
    return temperature


def array_names(store: ServedStore, fields: list[str] | None, *, encoded: bool = True) -> tuple[str, ...]:
    """Return the names of the arrays to gather for `fields`, each once, always with the ids.

    Args:
        store: the store.
        fields: `fields` of the request.
        encoded: whether `targets` means the encoding's arrays; if not, the server decodes and nothing is gathered.
    Raises:
        UnknownFieldError: the store has no such array.
    """
    stored = {*store.manifest.arrays, IDS, *((FINGERPRINTS,) if store.has_row_offsets else ())}
    if fields is None:
        fields = [TARGETS, LABELS] if LABELS in stored else [TARGETS]
    names: list[str] = []
    for name in fields:
        if name == TARGETS:
            names.extend(store.encoding.fields if encoded else ())
        elif name in stored:
            names.append(name)
        else:
            known = ", ".join(sorted({TARGETS, *stored}))
            raise UnknownFieldError(f"store {store.name!r} keeps no {short(name)}; it keeps {known}", field=name[:128])
    return tuple(dict.fromkeys([*names, IDS]))


def _row_count(store: ServedStore, selection: BatchSelection) -> int:
    """Return the number of rows of the reply before any is read: a small request may ask for very long sequences."""
    if not store.has_row_offsets:
        return len(selection.ids)
    if selection.spans is None:
        return int(store.rows.row_counts(selection.ids).sum())
    # A range that is refused later is clipped to the store here, so that the sum cannot overflow.
    begin, end = np.clip(selection.spans, 0, store.manifest.rows).T
    return max(len(selection.ids), int(np.maximum(end - begin, 0).sum()))
