"""Epoch route, GET /v1/stores/{name}/epochs/{epoch}: a rank's batches as one stream of safetensors frames.

The frames are cut into chunks of about equal size, which are gathered one at a time while the reader keeps up. A frame
that cannot be read is replaced by one that carries the error; where a part of it was sent already, the connection is
closed, and a client that asks for the rest with `Softlabels-Verify` gets the error first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from softlabels import wire
from softlabels.errors import SoftLabelsError
from softlabels.ids import to_fixed_bytes
from softlabels.manifest import IDS, ROW_OFFSETS, ArraySpec
from softlabels.order import EpochConfig, RankBatches, StepBatch
from softlabels.row_sums import append_arrays, append_sum, crc32c, join_arrays
from softlabels.store.store_reader import LocalRows, SelectedRows
from softlabels_server.api.batch import array_names, check_version, checked_temperature, opened
from softlabels_server.api.problems import explained, to_problem_json
from softlabels_server.api.replies import accepted_format
from softlabels_server.api.requests import RowOptions, parse_query, read_query, too_large
from softlabels_server.catalog import ServedStore, StoreFolder
from softlabels_server.fast_path.response_plan import metadata_of, reply_headers
from softlabels_server.fast_path.socket_writer import SOCKET_EXTENSION, AdaptiveChunkSize, Chunk, as_view, send_chunks
from softlabels_server.settings import Settings

_LARGEST_NUMBER, _LARGEST_COUNT = 10**16, 10**10
"""More digits than any cursor and than any row count of a frame; the size of the headers is computed with these."""

_ERROR_BYTES = 4096
"""Least size of the header of the last frame: an error that replaces a frame then fits into the announced length."""

_CURSOR_MARK = "<cursor>"
"""Placeholder for the cursor in a header that is made once for many frames."""


@dataclass(frozen=True)
class EpochEndpoint:
    """Plain ASGI application that answers with epoch streams."""

    stores: StoreFolder
    settings: Settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request, send the length, then chunk after chunk, no faster than the client reads."""
        headers = Headers(scope=scope)
        if accepted_format(headers.get("accept")) != "safetensors":
            raise HTTPException(406, "epochs are sent only as streams of safetensors files")
        store = await opened(self.stores, scope)
        check_version(store, if_match=headers.get("if-match"))
        query = scope["query_string"].decode("latin-1")
        stream = plan_stream(store, scope["path_params"]["epoch"], query, self.settings)
        stream.verify_first = wire.VERIFY_HEADER in headers
        # In a thread: for sequences it adds up the row counts of the whole epoch.
        size_bytes = await run_in_threadpool(stream.checked_size, self.settings.max_reply_bytes)
        lines = reply_headers(size_bytes, digest=store.digest)
        await send({"type": "http.response.start", "status": 200, "headers": lines})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        size = AdaptiveChunkSize()
        timeout_s = self.settings.stall_timeout_s
        if not await send_chunks(scope, send, stream.chunks(size), size, stall_timeout_s=timeout_s):
            return
        if not stream.is_cut:
            # The writer has accounted for every byte of the body, so uvicorn takes an empty message as its end.
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        elif (access := scope.get("extensions", {}).get(SOCKET_EXTENSION)) is not None:
            access.abort()  # what was written is still sent


@dataclass(kw_only=True, eq=False)
class EpochStream:
    """A checked epoch request.

    Attributes:
        store: version of the store that answers.
        config: the epoch.
        batches: its steps.
        names: arrays of a frame, those with larger items first, so that all are aligned.
        temperature: temperature in each frame's metadata.
        question: checksum of the request, see `wire.epoch_question`.
        verify_first: compare the first frame with what was written before any of it is sent.
        is_cut: whether an error ended the stream.
    """

    store: ServedStore
    config: EpochConfig
    batches: RankBatches
    names: tuple[str, ...]
    temperature: float
    question: int
    verify_first: bool = False
    is_cut: bool = False

    @cached_property
    def end_frame(self) -> bytes:
        """Last frame, a safetensors file without arrays: a stream without it is incomplete."""
        metadata = {
            "format": wire.END_FORMAT,
            "digest": self.store.digest,
            "batches": str(self.batches.batch_count),
            "samples": str(self.batches.sample_count),
            "left_out": str(self.batches.left_out),
        }
        return self._last_frame(metadata, self.config.cursor)

    def _last_frame(self, metadata: Mapping[str, str], cursor: int) -> bytes:
        question = wire.frame_question(self.question, cursor)
        size_bytes = max(self._header_bytes, _ERROR_BYTES)
        return wire.to_bytes({}, metadata, question=question, header_size_bytes=size_bytes)

    def _error_frame(self, error: SoftLabelsError, cursor: int) -> bytes:
        """Return the frame that tells of an error; of a long one without its context, or only the beginning."""
        frame = b""
        for message, context in ((error.message, error.context), (error.message, {}), (error.message[:500], {})):
            shorter = type(error)(message, **context)
            metadata = {"format": wire.ERROR_FORMAT, "problem": to_problem_json(shorter)}
            frame = self._last_frame(metadata, cursor)
            if len(frame) <= len(self.end_frame):
                break
        return frame

    def chunks(self, size: AdaptiveChunkSize) -> Iterator[Chunk]:
        """Yield the frames in order as lists of buffers, each gathered on demand.

        Args:
            size: target size of the next chunk.
        """
        cursor, whole = self.config.cursor, self.verify_first or self.store.has_row_offsets
        for step in self.batches:
            is_begun = False
            try:
                for chunk in self._whole_frame(step, cursor) if whole else self._frame(step, cursor, size):
                    yield chunk
                    is_begun = True
            except Exception as failure:  # noqa: BLE001  a client waits for its next frame, whatever the reason
                self.is_cut = True
                error = explained(failure, f"GET /v1/stores/{self.store.name}/epochs/{self.config.epoch}")
                if not is_begun:
                    yield [self._error_frame(error, cursor)]
                return
            cursor, whole = step.cursor_after, self.store.has_row_offsets
        yield [self.end_frame]

    def checked_size(self, most_bytes: int) -> int:
        """Return the size of the whole stream. Raises BatchTooLargeError if a batch is larger than a reply may be."""
        row_bytes = {name: self._specs[name].row_bytes for name in self.names}
        most = most_bytes // max(1, sum(row_bytes.values()))
        if self.config.batch_size > most:
            raise too_large(self.config.batch_size, most)
        samples, frames = self.batches.sample_count, self.batches.batch_count
        size = frames * (self._header_bytes + wire.CHECKSUM_BYTES) + len(self.end_frame)
        if not self.store.has_row_offsets:
            return size + samples * sum(row_bytes.values())
        row_counts = [int(self.store.rows.row_counts_at(step.positions).sum()) for step in self.batches]
        if max(row_counts, default=0) > most:
            raise too_large(max(row_counts), most, "rows")
        # Ids and fingerprints of sequences are not in the manifest's arrays: they have an entry per sample.
        per_row = sum(row_bytes[name] for name in self.names if name in self.store.manifest.arrays)
        per_sample = sum(row_bytes.values()) - per_row
        return size + sum(row_counts) * per_row + samples * per_sample + 8 * (samples + frames)  # n + 1 row offsets

    def _whole_frame(self, step: StepBatch, cursor: int) -> Iterator[Chunk]:
        """Yield a frame in one piece, once all of it is read."""
        rows = self.store.rows.every_read() if self.verify_first else self.store.rows
        selected = rows.select_at(step.positions, view=self._view)
        found = self._read(rows, selected, self.names)
        arrays = {name: found[name] for name in self._specs}
        header = self._header(step, {name: array.shape[0] for name, array in arrays.items()})
        before = crc32c(header, wire.frame_question(self.question, cursor))
        checksum = append_arrays(before, arrays, rows.row_sums(selected.rows), rows.manifest.row_sum_names)
        yield [header, *arrays.values(), np.array([checksum], dtype="<u4")]

    def _frame(self, step: StepBatch, cursor: int, target: AdaptiveChunkSize) -> Iterator[Chunk]:
        """Yield a frame in chunks of about the target size, each read once the one before it is sent."""
        rows = self.store.rows
        selected = rows.select_at(step.positions, view=self._view).rows
        count = len(selected)
        header = self._header(step, dict.fromkeys(self.names, count))
        checksum = crc32c(header, wire.frame_question(self.question, cursor))
        sums = rows.row_sums(selected)
        if sums is not None:
            order = tuple((rows.manifest.row_sum_names.index(name), self._specs[name].row_bytes) for name in self.names)
            checksum = append_sum(checksum, join_arrays(sums, order), count * sum(size for _, size in order))
        pending: list[bytes | NDArray[Any]] = [header]
        size = 0
        for name in self.names:
            begin, row_bytes = 0, self._specs[name].row_bytes
            while begin < count:
                if 2 * size >= target.chunk_bytes:
                    yield pending
                    pending, size = [], 0
                # Equal parts, as close as possible to the target size.
                left = count - begin
                at_once = -(-left // max(1, round(left * row_bytes / target.chunk_bytes)))
                part = SelectedRows(rows=selected[begin : begin + at_once], positions=selected[:0])
                found = self._read(rows, part, (name,))[name]
                if sums is None:
                    checksum = crc32c(as_view(found), checksum)
                size += found.nbytes
                begin += at_once
                pending.append(found)
                del found  # or this generator would hold the array while and after it is sent
        yield [*pending, np.array([checksum], dtype="<u4")]

    def _read(self, rows: LocalRows, selected: SelectedRows, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        found = rows.read(selected, names)
        if IDS in found and self.store.manifest.ids.kind == "str":
            ids: Any = found[IDS]
            found[IDS] = to_fixed_bytes(ids, width_bytes=self.store.manifest.ids.width_bytes)
        return found

    @cached_property
    def _view(self) -> int | None:
        return self.config.view_of(self.store.manifest)

    def _header(self, step: StepBatch, rows: Mapping[str, int]) -> bytes:
        """Return the header of a frame. Frames of one size differ only in the cursor, so one is made for each size."""
        key = (len(step.positions), step.repeated, tuple(rows.items()))
        around = self._headers.get(key)
        if around is None:
            if self.store.has_row_offsets:
                self._headers.clear()  # batches of sequences hardly ever have equal row counts
            text = self._header_text(rows, len(step.positions), _CURSOR_MARK, step.repeated).rstrip()
            before, _, after = text.partition(_CURSOR_MARK.encode())
            around = self._headers[key] = before, after
        text = around[0] + str(step.cursor_after).encode() + around[1]
        size = self._header_bytes
        assert len(text) <= size - 8, "the size was computed with longer numbers"
        return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)

    @cached_property
    def _headers(self) -> dict[Any, tuple[bytes, bytes]]:
        return {}

    @cached_property
    def _header_bytes(self) -> int:
        """Size of every frame's header: enough for the longest numbers, rounded up to whole cache lines."""
        rows = dict.fromkeys(self._specs, _LARGEST_COUNT)
        text = self._header_text(rows, _LARGEST_NUMBER, _LARGEST_NUMBER, _LARGEST_NUMBER)
        return -(-(8 + len(text)) // 64) * 64

    def _header_text(self, rows: Mapping[str, int], samples: int, cursor: object, repeated: int) -> bytes:
        shapes = {name: (np.dtype(spec.dtype), (rows[name], *spec.row_shape)) for name, spec in self._specs.items()}
        metadata = {
            **metadata_of(self.store, self.temperature, samples=samples),
            "format": wire.EPOCH_FORMAT,
            "cursor": str(cursor),
            "repeated": str(repeated),
        }
        return wire.header_bytes({**shapes, wire.CHECKSUM: (np.dtype("<u4"), (1,))}, metadata)[8:]

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        """Every array of a frame, including row offsets, in the order of their bytes."""
        names = (*self.names, ROW_OFFSETS) if self.store.has_row_offsets else self.names
        return {name: self.store.spec_of(name) for name in _wide_first(self.store, names)}


def plan_stream(store: ServedStore, epoch: str, query: str, settings: Settings) -> EpochStream:
    """Return the stream for an epoch request, with the epoch number in its path and the query string.

    Raises:
        RequestError, StoreChangedError, FingerprintMismatchError, TemperatureError, TemperatureLockedError,
        UnknownFieldError, RowsNotCommittedError, BatchTooLargeError.
    """
    parameters = read_query(query)
    named = {name: parameters.pop(name) for name in EpochConfig.__struct_fields__ if name in parameters}
    config = EpochConfig.from_query({**named, "epoch": epoch})
    options = parse_query(parameters, RowOptions)
    temperature = checked_temperature(store, options)
    if config.batch_size > settings.max_batch_ids:
        raise too_large(config.batch_size, settings.max_batch_ids)
    return EpochStream(
        store=store,
        config=config,
        batches=config.batches(store.manifest, store.digest),
        names=_wide_first(store, array_names(store, options.fields)),
        temperature=temperature,
        question=wire.epoch_question(store.digest, config, fields=options.fields, temperature=options.temperature),
    )


def _wide_first(store: ServedStore, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: -np.dtype(store.spec_of(name).dtype).itemsize))
