"""HttpRows: the rows of a served store, one request per batch or one stream per epoch, with every reply checked."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from softlabels import wire
from softlabels.documents import MAX_DOCUMENT_BYTES
from softlabels.encodings import Encoding
from softlabels.errors import (
    ManifestError,
    RequestError,
    ServerUnreachableError,
    SoftLabelsError,
    TruncatedError,
    WireError,
)
from softlabels.ids import IdArray, id_kind
from softlabels.manifest import IDS, ROW_OFFSETS, Manifest, check_encoding, store_digest
from softlabels.order import EpochConfig
from softlabels.row_sums import crc32c
from softlabels.targets import EpochRows
from softlabels_client.http.address import parse_address
from softlabels_client.http.replies import ReplyStream
from softlabels_client.http.reply_reader import ErrorFrame, FrameReader, ReplyReader
from softlabels_client.http.retry import RetryPolicy, SumMismatchError, changed_on_the_way
from softlabels_client.http.transport import HttpTransport

BINARY = "application/octet-stream"
JSON = "application/json"

_SLACK_BYTES = 1 << 20
"""Bytes allowed for a reply's header beside its rows; real headers take under 2 KiB."""

_MOST_CONSTANT_BYTES = 1 << 30
"""Longest encoding constants accepted; a basis for a language model's vocabulary takes a tenth of this."""


class HttpRows:
    """Row source of a store behind a server; `softlabels.open` wraps it in a `TargetStore`.

    Safe in threads and after fork; pickles without its connections, and unpickles without a request.

    Args:
        url: `http(s)://host[:port][/prefix]/NAME`.
        token, timeout_s, retry: as in `HttpTransport`.
    Attributes:
        manifest: manifest of the store when it was opened.
        digest: digest of the version that was opened; rows of any other are refused.
    Raises:
        RequestError, UnknownStoreError, ServerUnreachableError, ManifestError, FormatVersionError.
    """

    def __init__(
        self, url: str, *, token: str | None = None, timeout_s: float = 30.0, retry: RetryPolicy | None = None
    ) -> None:
        self._address = parse_address(url)
        self._transport = HttpTransport(self._address, token=token, timeout_s=timeout_s, retry=retry)
        self._where = self._address.base_url + self._address.path
        try:
            self.manifest, self.digest = self._describe()
        except BaseException:
            # The caller gets no object to close, and the error's traceback would keep the connection open.
            self._transport.close()
            raise
        self._reader = ReplyReader(self.manifest, self.digest, self._where)
        # By arrays and columns: the query of a binary request, and the checksum of its question up to the columns.
        self._questions: dict[tuple[str, ...], tuple[str, int]] = {}

    @cached_property
    def encoding(self) -> Encoding:
        """Encoding of the rows; its constants are fetched once.

        Raises:
            ManifestError: the constants are not those that the manifest names; and as `fetch`.
        """
        if not self.manifest.encoding.constants:
            return self.manifest.make_encoding()
        reply = self._transport.request(
            "GET",
            f"{self._address.path}/constants",
            headers={"Accept": wire.MEDIA_TYPE},
            max_bytes=_MOST_CONSTANT_BYTES,
            read=self._read_constants,
        )
        return check_encoding(self.manifest, self.manifest.make_encoding(reply.content))

    def fetch(
        self,
        ids: IdArray,
        fields: tuple[str, ...],
        *,
        views: NDArray[np.int64] | None = None,
        spans: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return the rows of these ids, in this order; ids may repeat.

        Args:
            ids: [B] sample ids.
            fields: names of the arrays to return.
            views: [B] view of each sample, for stores of views.
            spans: [B, 2] row ranges of sequences; None for whole ones.
        Returns:
            One array per field, [B, ...], read-only views of the reply; string ids as strings. For sequences the ranges
            concatenated, and `row_offsets` [B + 1].
        Raises:
            StoreChangedError: the server now has another version of the store.
            WireError, TruncatedError: the reply is not the requested rows.
            ServerUnreachableError: no usable reply.
            RequestError, UnknownIdError, BadIdsError, RowsNotCommittedError, ChecksumError, … as for a local store.
        """
        self._check_keys(views, spans)
        # The ids are always requested, to check that the rows are those of the samples asked for.
        names = tuple(dict.fromkeys((*fields, IDS)))
        most_bytes = self._most_reply_bytes(names, ids, spans)
        query, body, media_type, question = self._batch_request(ids, names, views, spans)
        reply = self._transport.request(
            "POST",
            f"{self._address.path}/batch{query}",
            body=body,
            headers={"Content-Type": media_type, "Accept": wire.MEDIA_TYPE},
            max_bytes=most_bytes,
            read=lambda blob: self._reader.read(blob, names, samples=len(ids), question=question),
        )
        arrays: dict[str, NDArray[Any]] = reply.content
        returned = self._reader.ids_of(arrays[IDS])
        self._reader.check_ids(returned, ids)
        found = {name: arrays[name] for name in fields}
        if IDS in found:
            found[IDS] = returned
        if ROW_OFFSETS in arrays:
            found[ROW_OFFSETS] = arrays[ROW_OFFSETS]
            if spans is not None and not np.array_equal(np.diff(found[ROW_OFFSETS]), spans[:, 1] - spans[:, 0]):
                raise WireError(f"{self._where} returned ranges of other lengths than requested")
        return found

    def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """Yield the rows of each step of an epoch, read as one stream, which is resumed at its cursor if it breaks.

        Raises, while iterating: as `fetch`; a broken stream only once retries are used up.
        """
        names = tuple(dict.fromkeys((*fields, IDS)))
        failures = mismatches = 0
        # No steps are left if the stream broke after the last one: all rows have been yielded.
        while len(steps := config.batches(self.manifest, self.digest)):
            stream: ReplyStream | None = None
            try:
                query = urlencode({**config.to_query(), "fields": ",".join(names), "digest": self.digest}, safe=",")
                path = f"{self._address.path}/epochs/{config.epoch}?{query}"
                # The server then compares the frame that failed with what was written, before any of it is sent.
                stream = self._transport.open(path, verify=failures > 0)
                question = wire.epoch_question(self.digest, config, fields=names)
                frames = FrameReader(stream, self._reader, names, config, question)
                for step in steps:
                    rows = frames.read(step)
                    yield rows
                    # Progress resets the count: retries are limited for each break, not for the whole epoch.
                    config, failures, mismatches = config.resumed_at(rows.cursor_after), 0, 0
                frames.read_end(steps)
                stream.finish()
                return
            except ErrorFrame as frame:
                raise frame.error from None
            except SumMismatchError:
                failures, mismatches = failures + 1, mismatches + 1
                error = changed_on_the_way(self._where)
                self._transport.pause_or_raise(error, failures, transient=mismatches < 2)
            except SoftLabelsError as error:
                failures += 1
                transient = isinstance(error, TruncatedError | WireError | ServerUnreachableError)
                self._transport.pause_or_raise(error, failures, transient=transient)
            finally:
                if stream is not None:
                    stream.close()

    def close(self) -> None:
        """Close idle connections; a later batch opens new ones."""
        self._transport.close()

    def _describe(self) -> tuple[Manifest, str]:
        described: tuple[Manifest, str] = self._transport.request(
            "GET",
            self._address.path,
            headers={"Accept": JSON},
            max_bytes=MAX_DOCUMENT_BYTES + _SLACK_BYTES,
            read=self._read_description,
        ).content
        return described

    def _read_description(self, body: memoryview) -> tuple[Manifest, str]:
        try:
            document = json.loads(bytes(body))
            described, digest = document["manifest"], document["digest"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WireError(
                f"{self._where} did not answer with a store's description ({error!r}): check that this is the address "
                "of a `softlabels serve`"
            ) from error
        if not isinstance(described, dict) or not isinstance(digest, str) or not digest:
            raise WireError(f"{self._where} did not answer with a store's description: manifest or digest is missing")
        manifest = Manifest.from_json(described)
        if store_digest(manifest) != digest:
            raise ManifestError(
                f"the manifest from {self._where} has digest {store_digest(manifest)}, announced as {digest}: it was "
                "changed in transit, or the server runs another version of softlabels"
            )
        return manifest, digest

    def _read_constants(self, body: memoryview) -> dict[str, NDArray[Any]]:
        arrays, metadata = wire.from_bytes(body)
        self._reader.check_version(metadata.get("digest"))
        if set(arrays) != set(self.manifest.encoding.constants):
            raise ManifestError(
                f"{self._where} encodes rows with {', '.join(self.manifest.encoding.constants)} and sent "
                f"{', '.join(sorted(arrays)) or 'nothing'}: no row can be decoded"
            )
        constants = {}
        for name, array in arrays.items():
            # The file in the store, whose digest the manifest has: its own header, then the array's bytes.
            file = metadata.get(f"npy:{name}", "").encode("latin-1", "replace") + array.tobytes()
            if hashlib.sha256(file).hexdigest() != self.manifest.metadata_sha256.get(
                wire.CONSTANT_PATH.format(name=name)
            ):
                raise SumMismatchError
            constants[name] = np.load(io.BytesIO(file), allow_pickle=False)
        return constants

    def _batch_request(
        self,
        ids: IdArray,
        names: tuple[str, ...],
        views: NDArray[np.int64] | None,
        spans: NDArray[np.int64] | None,
    ) -> tuple[str, bytes, str, int]:
        """Return query, body and media type of a batch request, and the checksum of its question."""
        keys = {name: values for name, values in (("views", views), ("spans", spans)) if values is not None}
        found = self._questions.get((*names, *keys))
        if found is None:
            columns = {"columns": ",".join(("ids", *keys))} if keys else {}
            wanted = {"fields": ",".join(names), "digest": self.digest, **columns}
            question = wire.batch_question(self.digest, columns=("ids", *keys), fields=names)
            found = self._questions[*names, *keys] = "?" + urlencode(wanted, safe=","), question
        columns_sent = wire.column_bytes(ids, *keys.values())
        question = crc32c(columns_sent, found[1])
        if id_kind(ids) == "str":
            keys_json = {name: values.tolist() for name, values in keys.items()}
            document = {"ids": ids.tolist(), "fields": names, "digest": self.digest, **keys_json}
            return "", json.dumps(document).encode(), JSON, question
        return found[0], columns_sent, BINARY, question

    def _most_reply_bytes(self, names: tuple[str, ...], ids: IdArray, spans: NDArray[np.int64] | None) -> int:
        rows = len(ids)
        if self.manifest.layout.kind == "sequences":
            # Only the server knows how long whole sequences are; no range is longer than the store.
            if spans is None:
                rows += len(ids) * self.manifest.rows
            else:
                # Clipped, so that ranges outside the store, which the server refuses, do not raise the limit.
                begin, end = np.clip(spans, 0, self.manifest.rows).T
                rows += int(np.maximum(end - begin, 0).sum())
        return rows * self._reader.row_bytes(names) + _SLACK_BYTES

    def _check_keys(self, views: NDArray[np.int64] | None, spans: NDArray[np.int64] | None) -> None:
        name, kind = self.manifest.name, self.manifest.layout.kind
        if views is not None and kind != "views":
            raise RequestError(f"{name!r} keeps one row a sample: it has no views")
        if views is None and kind == "views":
            raise RequestError(
                f"{name!r} has {self.manifest.layout.views} views a sample: pass `views`, the one that each input "
                "shows, since targets of different views differ"
            )
        if spans is not None and kind != "sequences":
            raise RequestError(f"{name!r} keeps no sequences: it has no spans")
