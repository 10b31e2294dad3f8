"""Replies checked against the request: checksum, store version, arrays, dtypes, shapes, ids; whole and in frames."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels import wire
from softlabels.errors import FormatVersionError, SoftLabelsError, StoreChangedError, UnknownFieldError, WireError
from softlabels.ids import IdArray, from_fixed_bytes
from softlabels.manifest import FINGERPRINTS, IDS, ROW_OFFSETS, ArraySpec, Manifest
from softlabels.order import EpochConfig, RankBatches, StepBatch
from softlabels.targets import EpochRows
from softlabels.transfer_set import FINGERPRINT_BYTES
from softlabels_client.http.replies import ReplyStream
from softlabels_client.http.retry import SumMismatchError

_MOST_HEADERS = 64
"""Headers remembered; replies to batches of one size have equal headers."""

_MOST_HEADER_BYTES = 1 << 20
"""Longest frame header accepted; real ones name a dozen arrays in under 2 KiB."""


_OLDER_FORMATS = frozenset({"softlabels-batch/1", "softlabels-epoch/1", "softlabels-end/1"})
"""Their checksum misses exchanged words, and they do not say which question they answer."""


class ErrorFrame(Exception):  # noqa: N818  not an error of its own
    """The server ended a stream with the problem in `error`."""

    def __init__(self, error: SoftLabelsError) -> None:
        super().__init__(error)
        self.error = error


class ReplyReader:
    """Parses and checks the replies of one store version; `where` is the store's URL, for messages."""

    def __init__(self, manifest: Manifest, digest: str, where: str) -> None:
        self.manifest, self._digest, self._where = manifest, digest, where
        self._specs = _specs(manifest)
        # A header, which says where the arrays are, is parsed and checked once: equal bytes have the same meaning.
        self._known: dict[tuple[bytes, tuple[str, ...], int], wire.TensorLayout] = {}

    def row_bytes(self, names: tuple[str, ...]) -> int:
        """Return the bytes of a row in these arrays. Raises UnknownFieldError."""
        return sum(self._spec(name).row_bytes for name in names)

    def read(self, blob: memoryview, names: tuple[str, ...], *, samples: int, question: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of a reply, as views of it.

        Args:
            blob: body of the reply.
            names, samples: requested arrays, and number of requested samples.
            question: checksum of the request, see `wire.batch_question`.
        Raises:
            SumMismatchError: changed on the way, or the reply to another request.
            WireError: inconsistent, or not the requested arrays. StoreChangedError: rows of another version.
            FormatVersionError: from a server of an older version.
        """
        self.check_intact(blob, question)
        header = wire.raw_header(blob)
        # Names and samples are part of the key, since the same header is wrong as the reply to another request.
        layout = self._known.get((header, names, samples))
        if layout is None:
            layout = wire.parse_header(blob)
            arrays = self.check(layout, blob, names, samples=samples)
            if len(self._known) >= _MOST_HEADERS:
                self._known.clear()
            # Row counts of sequences are not part of the header, so those replies are checked each time.
            if ROW_OFFSETS not in arrays:
                self._known[header, names, samples] = layout
            return arrays
        return layout.arrays(blob)

    def check_intact(self, blob: memoryview, question: int) -> None:
        """Raise SumMismatchError unless a file ends with the checksum of this question and of its own bytes."""
        if wire.is_intact(blob, question):
            return
        with contextlib.suppress(WireError):
            found = wire.parse_header(blob).metadata.get("format")
            if found in _OLDER_FORMATS:
                raise FormatVersionError(
                    f"{self._where} answers in {found}, whose rows cannot be verified: this softlabels reads "
                    f"{wire.BATCH_FORMAT} and {wire.EPOCH_FORMAT}; upgrade the server",
                    found=found,
                )
        raise SumMismatchError

    def ids_of(self, sent: NDArray[Any]) -> IdArray:
        """Return the ids in a reply's array. Raises WireError if they are not UTF-8."""
        if self.manifest.ids.kind == "int":
            return sent
        try:
            return from_fixed_bytes(sent)
        except UnicodeDecodeError as error:
            raise WireError(f"{self._where} returned sample ids that are not UTF-8: {error}") from error

    def check_ids(self, returned: IdArray, asked: IdArray) -> None:
        """Raise WireError unless the reply has the requested ids, which the server reads from the store."""
        if not np.array_equal(returned, asked):
            raise WireError(
                f"{self._where} returned rows of other samples than requested, or in another order, so this batch "
                "cannot be used: check the server, or the proxy or cache before it",
                asked=asked[:5].tolist(),
                returned=returned[:5].tolist(),
            )

    def check_version(self, digest: str | None) -> None:
        """Raise StoreChangedError unless this is the version that was opened."""
        if digest != self._digest:
            raise StoreChangedError(
                f"{self._where} is now at version {digest}, this was opened at {self._digest}: rows of two versions "
                "must not be mixed; open the store again",
                store=digest,
                yours=self._digest,
            )

    def check(
        self, layout: wire.TensorLayout, blob: memoryview, names: tuple[str, ...], *, samples: int
    ) -> dict[str, NDArray[Any]]:
        """Return the arrays of a reply whose header is new, checked against the manifest. Raises as `read`."""
        arrays = layout.arrays(blob)
        self.check_version(layout.metadata.get("digest"))
        rows = samples
        if self.manifest.layout.kind == "sequences":
            offsets = arrays.get(ROW_OFFSETS)
            if offsets is None or offsets.dtype != np.dtype("<i8") or offsets.shape != (samples + 1,):
                raise WireError(f"{self._where} did not say which rows belong to which of the {samples} sequences")
            rows = int(offsets[-1])
            if offsets[0] != 0 or bool((np.diff(offsets) < 0).any()):
                raise WireError(f"{self._where} sent row offsets that do not ascend from 0")
        for name in names:
            per_sample = name == IDS or (name == FINGERPRINTS and name not in self.manifest.arrays)
            self._check_array(arrays.get(name), name, rows=samples if per_sample else rows)
        return arrays

    def _spec(self, name: str) -> ArraySpec:
        spec = self._specs.get(name)
        if spec is None:
            stored = ", ".join(self._specs)
            raise UnknownFieldError(f"{self.manifest.name!r} has no {name!r}; it has {stored}", field=name)
        return spec

    def _check_array(self, array: NDArray[Any] | None, name: str, *, rows: int) -> None:
        spec = self._spec(name)
        if array is None:
            raise WireError(f"{self._where} left {name!r} out of its reply")
        if array.dtype != np.dtype(spec.dtype) or array.shape != (rows, *spec.row_shape):
            raise WireError(
                f"{self._where} sent {name!r} as {array.dtype.str}{list(array.shape)} where the manifest says "
                f"{spec.dtype}{[rows, *spec.row_shape]}"
            )


class FrameReader:
    """Reads and checks the frames of the stream of an epoch's rest; `names` are the requested arrays.

    Every frame is compared with what the client computes itself: the number of samples of the step, the cursor after it
    and, if ids are consecutive integers, the ids.
    """

    def __init__(
        self, stream: ReplyStream, reader: ReplyReader, names: tuple[str, ...], config: EpochConfig, question: int
    ) -> None:
        self._stream, self._reader, self._names = stream, reader, names
        self._question, self._begin, self._cursor = question, config.cursor, config.cursor
        # The last parsed header, its layout, and the step whose frame it began.
        self._parsed: tuple[bytes, wire.TensorLayout, StepBatch] | None = None

    def read(self, step: StepBatch) -> EpochRows:
        """Return the rows of this step.

        Raises:
            ErrorFrame, SumMismatchError, WireError, TruncatedError, StoreChangedError, FormatVersionError.
        """
        header = self._header()
        known = self._known_layout(header, step)
        layout = known or wire.parse_header(header)
        blob = self._intact(header, layout, self._cursor)
        if known is None:
            arrays = self._reader.check(layout, blob, self._names, samples=len(step.positions))
            _check_cursor(layout.metadata, step)
            self._parsed = header, layout, step
        else:
            arrays = layout.arrays(blob)
        ids = self._reader.ids_of(arrays[IDS])
        first_id = self._reader.manifest.ids.dense_start
        if first_id is not None:
            self._reader.check_ids(ids, step.positions + first_id)
        names = (*self._names, ROW_OFFSETS) if ROW_OFFSETS in arrays else self._names
        found: dict[str, NDArray[Any]] = {name: arrays[name] for name in names}
        found[IDS] = ids
        self._cursor = step.cursor_after
        return EpochRows(ids=ids, arrays=found, repeated=step.repeated, cursor_after=step.cursor_after)

    def read_end(self, steps: RankBatches) -> None:
        """Read the frame that ends a complete stream. Raises as `read`."""
        header = self._header()
        layout = wire.parse_header(header)
        self._intact(header, layout, self._begin)
        expected = (wire.END_FORMAT, str(steps.batch_count), str(steps.sample_count))
        found = tuple(layout.metadata.get(name) for name in ("format", "batches", "samples"))
        if found != expected:
            raise WireError(f"the stream ends with {layout.metadata}, not as an epoch of {steps.batch_count} batches")

    def _header(self) -> bytes:
        # All headers of a stream but that of its end have one length: after the first, each takes one read.
        usual = 8 if self._parsed is None else len(self._parsed[0])
        # The end frame is shorter: reading more than the stream has left would be taken for a cut.
        start = bytes(self._stream.read(usual if usual <= self._stream.left_bytes else 8))
        length = int.from_bytes(start[:8], "little")
        if 8 + length == len(start):
            return start
        if length > _MOST_HEADER_BYTES:
            raise WireError(f"a frame announces a header of {length} bytes: this is not a stream of safetensors files")
        if 8 + length < len(start):
            raise WireError("a frame's header is shorter than those before it: the stream is out of step")
        return start + bytes(self._stream.read(8 + length - len(start)))

    def _intact(self, header: bytes, layout: wire.TensorLayout, cursor: int) -> memoryview:
        """Read the rest of a frame and return all of it, unless it is another one or carries an error."""
        if layout.data_bytes > self._stream.left_bytes:
            raise WireError(f"a frame announces {layout.data_bytes} bytes, more than the stream has left")
        blob = self._stream.buffers.take(len(header) + layout.data_bytes)
        # The header stays before the arrays, because the layout's offsets count from the start of the file.
        blob[: len(header)] = header
        self._stream.read_into(blob[len(header) :])
        blob = blob.toreadonly()
        if layout.metadata.get("format") == wire.ERROR_FORMAT:
            # An error is in place of the next frame, also of the last.
            self._reader.check_intact(blob, wire.frame_question(self._question, self._cursor))
            raise ErrorFrame(wire.problem_in(layout))
        self._reader.check_intact(blob, wire.frame_question(self._question, cursor))
        return blob

    def _known_layout(self, header: bytes, step: StepBatch) -> wire.TensorLayout | None:
        """Return the last parsed layout if this header must, and does, equal the last one but for the cursor.

        Most frames of a stream differ in this one number, and need not be parsed.
        """
        if self._parsed is None or ROW_OFFSETS in self._names:
            return None
        last, layout, then = self._parsed
        old, new = (b'"cursor":"%d"' % cursor for cursor in (then.cursor_after, step.cursor_after))
        # The cursor must occur exactly once, or `replace` would change other parts of the header too.
        if len(then.positions) != len(step.positions) or then.repeated != step.repeated or last.count(old) != 1:
            return None
        # Headers are padded with spaces to one length, so a cursor with more digits takes the place of padding.
        return layout if header == last.replace(old, new).rstrip(b" ").ljust(len(last)) else None


def _check_cursor(metadata: Mapping[str, str], step: StepBatch) -> None:
    if metadata.get("cursor") != str(step.cursor_after) or metadata.get("repeated") != str(step.repeated):
        raise WireError(
            f"the stream is at cursor {metadata.get('cursor')!r}, expected was {step.cursor_after}: a batch is missing "
            "or repeated",
            cursor=step.cursor_after,
        )


def _specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Return every array that a reply may contain; sequence stores keep ids and fingerprints apart from their rows."""
    specs = dict(manifest.arrays)
    if manifest.layout.kind == "sequences":
        text = ArraySpec(dtype="|u1", row_shape=(manifest.ids.width_bytes,))
        specs[IDS] = text if manifest.ids.kind == "str" else ArraySpec(dtype="<i8", row_shape=())
        specs[FINGERPRINTS] = ArraySpec(dtype="|u1", row_shape=(FINGERPRINT_BYTES,))
    return specs
