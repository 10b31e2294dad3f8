"""Reading an epoch as one HTTP stream of safetensors frames, resumed at its cursor if the connection breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from numpy.typing import NDArray

from softlabels import wire
from softlabels.errors import SoftLabelsError, WireError
from softlabels.manifest import IDS, ROW_OFFSETS, Manifest
from softlabels.order import EpochConfig, RankBatches, StepBatch
from softlabels.targets import EpochRows
from softlabels.wire import END_FORMAT
from softlabels_client.http.replies import ReplyStream
from softlabels_client.http.reply_reader import ReplyReader
from softlabels_client.http.transport import HttpTransport

_MOST_HEADER_BYTES = 1 << 20
"""Longest frame header accepted; real ones name a dozen arrays in under 2 KiB."""


def epoch_rows(
    transport: HttpTransport,
    path: str,
    reader: ReplyReader,
    manifest: Manifest,
    digest: str,
    config: EpochConfig,
    fields: tuple[str, ...],
) -> Iterator[EpochRows]:
    """Yield the rows of each step, in order, each once, across reconnections.

    Every frame is compared with what the client computes itself: the number of samples of the step, the cursor after it
    and, if ids are consecutive integers, the ids.

    Raises:
        TruncatedError, WireError, ServerUnreachableError: retries are used up. SoftLabelsError: the server's own error.
    """
    names = tuple(dict.fromkeys((*fields, IDS)))
    failures = 0
    while True:
        steps = config.batches(manifest, digest)
        if not len(steps):
            return
        stream: ReplyStream | None = None
        try:
            query = urlencode({**config.to_query(), "fields": ",".join(names), "digest": digest}, safe=",")
            stream = transport.open(f"{path}/epochs/{config.epoch}?{query}")
            frames = Frames(stream, reader, manifest, names)
            for step in steps:
                rows = frames.read(step)
                yield rows
                config, failures = config.resumed_at(rows.cursor_after), 0
            frames.read_end(steps)
            stream.finish()
            return
        except SoftLabelsError as error:
            failures += 1
            transport.pause_or_raise(error, failures)
        finally:
            if stream is not None:
                stream.close()


class Frames:
    """Reads and checks the frames of one stream.

    Args:
        stream: the reply.
        reader: checks arrays against the manifest.
        manifest: manifest of the store.
        names: requested arrays.
    """

    def __init__(self, stream: ReplyStream, reader: ReplyReader, manifest: Manifest, names: tuple[str, ...]) -> None:
        self._stream, self._reader, self._manifest, self._names = stream, reader, manifest, names
        self._layout: wire.TensorLayout | None = None
        self._like: tuple[bytes, StepBatch] | None = None
        self._count = 0

    def read(self, step: StepBatch) -> EpochRows:
        """Return the rows of this step. Raises WireError, TruncatedError, StoreChangedError."""
        count = len(step.positions)
        header = self._header()
        layout = self._layout if header == self._expected(step, count) else None
        if layout is None:
            layout = wire.parse_header(header)
        blob = self._blob(header, layout)
        if layout is not self._layout:
            self._reader.check(layout, blob, self._names, samples=count)
            _check_cursor(layout.metadata, step)
            self._layout, self._like, self._count = layout, (header, step), count
        arrays = self._reader.verified(layout.arrays(blob))
        ids = self._reader.ids_of(arrays[IDS])
        if self._manifest.ids.dense_start is not None:
            self._reader.check_ids(ids, step.positions + self._manifest.ids.dense_start)
        found: dict[str, NDArray[Any]] = {name: arrays[name] for name in self._names}
        found[IDS] = ids
        if ROW_OFFSETS in arrays:
            found[ROW_OFFSETS] = arrays[ROW_OFFSETS]
        return EpochRows(ids=ids, arrays=found, repeated=step.repeated, cursor_after=step.cursor_after)

    def read_end(self, steps: RankBatches) -> None:
        """Read the frame that ends a complete stream. Raises WireError, TruncatedError."""
        header = self._header()
        layout = wire.parse_header(header)
        metadata = layout.metadata
        counted = (str(steps.batch_count), str(steps.sample_count))
        if (
            layout.entries
            or metadata.get("format") != END_FORMAT
            or (metadata.get("batches"), metadata.get("samples")) != counted
        ):
            raise WireError(f"the stream ends with {metadata} where an epoch of {counted[0]} batches should")

    def _header(self) -> bytes:
        # All headers of a stream have one length: after the first, each takes one read.
        known = 0 if self._like is None else len(self._like[0])
        if 0 < known <= self._stream.left_bytes:
            whole = bytes(self._stream.read(known))
            if int.from_bytes(whole[:8], "little") == known - 8:
                return whole
            return self._rest_of_header(whole)
        return self._rest_of_header(bytes(self._stream.read(8)))

    def _rest_of_header(self, start: bytes) -> bytes:
        """Return a header of which the first 8 or more bytes are known."""
        length = int.from_bytes(start[:8], "little")
        if length > _MOST_HEADER_BYTES:
            raise WireError(f"a frame announces a header of {length} bytes: this is not a stream of safetensors files")
        if 8 + length < len(start):
            raise WireError("a frame's header is shorter than those before it: the stream is out of step")
        return start + bytes(self._stream.read(8 + length - len(start)))

    def _blob(self, header: bytes, layout: wire.TensorLayout) -> memoryview:
        if layout.data_bytes > self._stream.left_bytes:
            raise WireError(f"a frame announces {layout.data_bytes} bytes, more than the stream has left")
        blob = self._stream.buffers.take(len(header) + layout.data_bytes)
        blob[: len(header)] = header
        self._stream.read_into(blob[len(header) :])
        return blob.toreadonly()

    def _expected(self, step: StepBatch, count: int) -> bytes | None:
        """Return the header of this step's frame if it differs from the last parsed one in its cursor alone.

        A header that equals it byte for byte need not be parsed: most frames of a stream differ in one number.
        """
        if self._like is None or count != self._count or ROW_OFFSETS in self._names:
            return None
        header, then = self._like
        if then.repeated != step.repeated:
            return None
        old, new = (b'"cursor":"%d"' % place for place in (then.cursor_after, step.cursor_after))
        if header.count(old) != 1:
            return None
        return header.replace(old, new).rstrip(b" ").ljust(len(header))


def _check_cursor(metadata: Mapping[str, str], step: StepBatch) -> None:
    if metadata.get("cursor") != str(step.cursor_after) or metadata.get("repeated") != str(step.repeated):
        raise WireError(
            f"the stream is at cursor {metadata.get('cursor')!r} where {step.cursor_after} is due: a batch is missing, "
            "or came twice",
            cursor=step.cursor_after,
        )
