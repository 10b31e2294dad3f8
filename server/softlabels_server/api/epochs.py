"""Epoch route, GET /v1/stores/{name}/epochs/{epoch}: a rank's batches as one stream of safetensors frames.

The frames are cut into chunks of about equal size, which are gathered one at a time while the reader keeps up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from softlabels import wire
from softlabels.ids import to_fixed_bytes
from softlabels.manifest import IDS, ROW_OFFSETS
from softlabels.order import EpochConfig, RankBatches, StepBatch
from softlabels.target_store import check_transfer_set
from softlabels.wire import END_FORMAT
from softlabels_server.api.batch import (
    array_names,
    bytes_a_row,
    check_version,
    opened,
    reply_temperature,
)
from softlabels_server.api.replies import accepted_format
from softlabels_server.api.requests import RowOptions, parse_query, read_query, too_large
from softlabels_server.catalog import ServedStore, StoreFolder
from softlabels_server.fast_path.safetensors_header import metadata_of, reply_headers
from softlabels_server.fast_path.socket_writer import AdaptiveChunkSize, Chunk, writer_for
from softlabels_server.settings import Settings

PATH = "/v1/stores/{name}/epochs/{epoch}"

FRAME_FORMAT = "softlabels-epoch/1"

_MAX_DIGITS = 20
"""More digits than any cursor or row count has; the header's size is computed with numbers of this length."""

_CURSOR_MARK = "<cursor>"
"""Stands for the cursor in a header that is made once for many frames."""


class EpochEndpoint:
    """Answers with epoch streams. Plain ASGI, since it streams.

    Args:
        stores: stores to serve.
        settings: limits of batches, and how long a reader may stall.
    """

    def __init__(self, stores: StoreFolder, settings: Settings) -> None:
        self._stores = stores
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request, announce the length, send chunk by chunk, no faster than the client reads."""
        headers = Headers(scope=scope)
        if accepted_format(headers.get("accept")) != "safetensors":
            raise HTTPException(406, "epochs are sent only as streams of safetensors files")
        store = await opened(self._stores, scope)
        check_version(store, if_match=headers.get("if-match"))
        query = scope["query_string"].decode("latin-1")
        stream = plan_stream(store, scope["path_params"]["epoch"], query, self._settings)
        size_bytes = await run_in_threadpool(stream.checked_size, self._settings.max_reply_bytes)
        lines = reply_headers(size_bytes, digest=store.digest)
        await send({"type": "http.response.start", "status": 200, "headers": lines})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        writer = writer_for(scope, send)
        size = AdaptiveChunkSize()
        chunks = stream.chunks(lambda: size.chunk_bytes)
        if not await writer.send_all(chunks, size, stall_timeout_s=self._settings.stall_timeout_s):
            writer.abort()
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def make_route(stores: StoreFolder, settings: Settings) -> Route:
    """Return the epoch route over these stores; `api.openapi` describes it."""
    return Route(PATH, EpochEndpoint(stores, settings), methods=["GET"], name="epoch")


@dataclass(frozen=True, kw_only=True)
class EpochStream:
    """An epoch request that passed every check.

    Attributes:
        store: version of the store that answers.
        config: the epoch that was asked for.
        batches: its steps.
        names: arrays of a frame, those of wider items first, so that all are aligned.
        temperature: temperature in each frame's metadata.
    """

    store: ServedStore
    config: EpochConfig
    batches: RankBatches
    names: tuple[str, ...]
    temperature: float

    @cached_property
    def size_bytes(self) -> int:
        """Size of the whole stream, the end frame included. For sequences all row counts are added up first."""
        rows, samples = self._rows, self.batches.sample_count
        per_row = sum(self._row_bytes(name) for name in self.names if not self._is_once_a_sample(name))
        per_sample = sum(self._row_bytes(name) for name in self.names if self._is_once_a_sample(name))
        offsets = 8 * (samples + self.batches.batch_count) if self.store.has_row_offsets else 0
        frames = self.batches.batch_count * (self._header_bytes + 8)
        return frames + rows * per_row + samples * per_sample + offsets + len(self.end_frame)

    @cached_property
    def end_frame(self) -> bytes:
        """Last frame, a safetensors file without arrays: a stream without it was cut off."""
        metadata = {
            "format": END_FORMAT,
            "digest": self.store.digest,
            "batches": str(self.batches.batch_count),
            "samples": str(self.batches.sample_count),
            "left_out": str(self.batches.left_out),
        }
        return wire.header_bytes({}, metadata)

    def chunks(self, chunk_bytes: Callable[[], int]) -> Iterator[Chunk]:
        """Yield the frames in order as lists of buffers; each list is gathered when it is asked for.

        Args:
            chunk_bytes: returns the target size of the next chunk.
        Raises:
            RowsNotCommittedError, DamageError.
        """
        for step in self.batches:
            yield from self._frame(step, chunk_bytes)
        yield [self.end_frame]

    def checked_size(self, most_bytes: int) -> int:
        """Return the size of the whole stream. Raises BatchTooLargeError if a batch is larger than a reply may be."""
        most = most_bytes // max(1, sum(self._row_bytes(name) for name in self.names))
        if self.config.batch_size > most:
            raise too_large(self.config.batch_size, most)
        if self.store.has_row_offsets and max(self._row_counts, default=0) > most:
            raise too_large(max(self._row_counts), most, "rows")
        return self.size_bytes

    def _frame(self, step: StepBatch, chunk_bytes: Callable[[], int]) -> Iterator[Chunk]:
        if self.store.has_row_offsets:
            arrays = self._arrays(step.positions, self.names)
            header = self._header(step, {name: array.shape[0] for name, array in arrays.items()})
            yield [header, *(arrays[name] for name in self._ordered), wire.checksum_of(arrays.values())]
            return
        count = len(step.positions)
        pending: list[bytes | NDArray[Any]] = [self._header(step, dict.fromkeys(self.names, count))]
        size = total = 0
        for name in self.names:
            begin = 0
            while begin < count:
                if 2 * size >= chunk_bytes():
                    yield pending
                    pending, size = [], 0
                # Equal parts, as close as possible to the target size. Multiples of eight rows are whole 64-bit words
                # for any dtype, so that the word sums of the parts add up to the array's checksum.
                left = count - begin
                parts = max(1, round(left * self._row_bytes(name) / chunk_bytes()))
                at_once = -(-left // (8 * parts)) * 8
                positions = step.positions[begin : begin + at_once]
                found = self._arrays(positions, (name,))[name]
                kept = None if name == IDS else self.store.rows.word_sum_at(positions, name, view=self._view)
                total += wire.word_sum(found) if kept is None else kept
                size += found.nbytes
                begin += at_once
                pending.append(found)
                del found  # or this frame would keep the array alive while and after it is sent
        yield [*pending, np.array([total % (1 << 64)], dtype="<u8")]

    def _arrays(self, positions: NDArray[np.int64], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        found = self.store.rows.at_positions(positions, names, view=self._view)
        if IDS in found and self.store.manifest.ids.kind == "str":
            ids: Any = found[IDS]
            found[IDS] = to_fixed_bytes(ids, width_bytes=self.store.manifest.ids.width_bytes)
        return found

    @cached_property
    def _view(self) -> int | None:
        return self.config.view_of(self.store.manifest)

    def _header(self, step: StepBatch, rows: Mapping[str, int]) -> bytes:
        """Return the header of a frame; frames of one size differ only in the cursor, so one is made for each size."""
        key = (len(step.positions), step.repeated, tuple(rows.items()))
        around = self._headers.get(key)
        if around is None:
            shapes = self._shapes(rows)
            metadata = self._metadata(len(step.positions), _CURSOR_MARK, step.repeated)
            before, _, after = wire.header_bytes(shapes, metadata)[8:].rstrip().partition(_CURSOR_MARK.encode())
            if self.store.has_row_offsets:
                self._headers.clear()  # batches of sequences hardly ever have equal row counts
            around = self._headers[key] = before, after
        text = around[0] + str(step.cursor_after).encode() + around[1]
        size = self._header_bytes
        assert len(text) <= size - 8, "the size was computed with longer numbers"
        return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)

    @cached_property
    def _headers(self) -> dict[Any, tuple[bytes, bytes]]:
        return {}

    def _metadata(self, samples: int, cursor: object, repeated: int) -> dict[str, str]:
        return {
            **metadata_of(self.store, self.temperature, samples=samples),
            "format": FRAME_FORMAT,
            "cursor": str(cursor),
            "repeated": str(repeated),
        }

    @cached_property
    def _header_bytes(self) -> int:
        """Size of every frame's header: enough for the longest numbers, rounded up to whole cache lines."""
        longest = 10 ** (_MAX_DIGITS - 4)
        shapes = self._shapes(dict.fromkeys(self._ordered, longest // 10**6))
        metadata = self._metadata(longest, longest, longest)
        return -(-len(wire.header_bytes(shapes, metadata)) // 64) * 64

    @cached_property
    def _ordered(self) -> tuple[str, ...]:
        """Every array of a frame, row offsets included, in the order of their bytes."""
        return _wide_first(self.store, (*self.names, ROW_OFFSETS)) if self.store.has_row_offsets else self.names

    def _shapes(self, rows: Mapping[str, int]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        shapes = {name: (_dtype_of(self.store, name), (rows[name], *self._row_shape(name))) for name in self._ordered}
        return {**shapes, wire.CHECKSUM: (np.dtype("<u8"), (1,))}

    @cached_property
    def _rows(self) -> int:
        return sum(self._row_counts) if self.store.has_row_offsets else self.batches.sample_count

    @cached_property
    def _row_counts(self) -> list[int]:
        rows = self.store.rows
        return [int(rows.row_counts_at(step.positions).sum()) for step in self.batches]

    def _is_once_a_sample(self, name: str) -> bool:
        return self.store.has_row_offsets and name not in self.store.manifest.arrays

    def _row_bytes(self, name: str) -> int:
        return bytes_a_row(self.store, (name,))

    def _row_shape(self, name: str) -> tuple[int, ...]:
        spec = self.store.manifest.arrays.get(name)
        if spec is not None:
            return spec.row_shape
        return () if _dtype_of(self.store, name).itemsize == 8 else (self._row_bytes(name),)


def plan_stream(store: ServedStore, epoch: str, query: str, settings: Settings) -> EpochStream:
    """Return the stream for an epoch request that this store may answer.

    Args:
        store: store to read.
        epoch: epoch number in the path.
        query: query string.
        settings: limits of a batch.
    Raises:
        RequestError, StoreChangedError, FingerprintMismatchError, TemperatureError, TemperatureLockedError,
        UnknownFieldError, RowsNotCommittedError, BatchTooLargeError.
    """
    parameters = read_query(query)
    named = {name: parameters.pop(name) for name in EpochConfig.__struct_fields__ if name in parameters}
    config = EpochConfig.from_query({**named, "epoch": epoch})
    options = parse_query(parameters, RowOptions)
    check_version(store, digest=options.digest)
    check_transfer_set(store.manifest, options.transfer_set)
    if config.batch_size > settings.max_batch_ids:
        raise too_large(config.batch_size, settings.max_batch_ids)
    return EpochStream(
        store=store,
        config=config,
        batches=config.batches(store.manifest, store.digest),
        names=_wide_first(store, array_names(store, options.fields)),
        temperature=reply_temperature(store, options.temperature),
    )


def _wide_first(store: ServedStore, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: -_dtype_of(store, name).itemsize))


def _dtype_of(store: ServedStore, name: str) -> np.dtype[Any]:
    spec = store.manifest.arrays.get(name)
    if spec is not None:
        return np.dtype(spec.dtype)
    is_number = name == ROW_OFFSETS or (name == IDS and store.manifest.ids.kind == "int")
    return np.dtype("<i8") if is_number else np.dtype("|u1")
