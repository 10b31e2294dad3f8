"""How are rows of a served store read? One request a batch, and nothing of the answer believed that was not checked."""

from __future__ import annotations

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
from softlabels.epochs import EpochRows
from softlabels.errors import ManifestError, RequestError, WireError
from softlabels.ids import IdArray, id_kind
from softlabels.manifest import IDS, ROW_OFFSETS, Manifest, check_encoding
from softlabels.order import EpochConfig
from softlabels_client.http.address import parse_address
from softlabels_client.http.epoch_stream import epoch_rows
from softlabels_client.http.reply_reader import ReplyReader
from softlabels_client.http.retry import RetryPolicy
from softlabels_client.http.transport import HttpTransport

BINARY = "application/octet-stream"
JSON = "application/json"

_SLACK_BYTES = 1 << 20
"""Room for a reply's header beside the rows, whose size the manifest tells; real headers take under 2 KiB."""

_MOST_CONSTANT_BYTES = 1 << 30
"""What an encoding learnt for one store; a basis of a language model's vocabulary takes a tenth of it."""


class HttpRows:
    """The rows of a store behind a server; `softlabels.open` puts them behind the same object as rows on disk.

    Safe in threads and after fork; pickles without its connections and without asking the server again.

    Args:
        url: `http(s)://host[:port][/prefix]/NAME`.
        token: bearer token, for a server that asks for one.
        timeout_s: how long one request may take, all retries included.
        retry: when a request is sent again.
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
            self._manifest, self._digest = self._describe()
        except BaseException:
            # Nobody else can: the caller gets no object, and the error's traceback would hold the connection open.
            self._transport.close()
            raise
        self._reader = ReplyReader(self._manifest, self._digest, self._where)
        self._queries: dict[tuple[str, ...], str] = {}

    @property
    def manifest(self) -> Manifest:
        """What the store said of itself when it was opened."""
        return self._manifest

    @property
    def digest(self) -> str:
        """The version of the store that was opened; a batch of any other is refused."""
        return self._digest

    @cached_property
    def encoding(self) -> Encoding:
        """How the rows are decoded; what the encoding learnt for this store is fetched once.

        Raises:
            ManifestError: the learnt arrays are not those that the manifest names. As `fetch` does, too.
        """
        if not self._manifest.encoding.constants:
            return self._manifest.make_encoding()
        reply = self._transport.request(
            "GET",
            f"{self._address.path}/constants",
            headers={"Accept": wire.MEDIA_TYPE},
            max_bytes=_MOST_CONSTANT_BYTES,
        )
        arrays, metadata = wire.from_bytes(reply.body)
        self._reader.refuse_other_version(metadata.get("digest"))
        if set(arrays) != set(self._manifest.encoding.constants):
            raise ManifestError(
                f"{self._where} keeps its rows with {', '.join(self._manifest.encoding.constants)} and sent "
                f"{', '.join(sorted(arrays)) or 'nothing'}: no row can be decoded"
            )
        # Copied, for they outlive every batch: the reply's memory would not be used again.
        learnt = {name: array.copy() for name, array in arrays.items()}
        return check_encoding(self._manifest, self._manifest.make_encoding(learnt))

    def fetch(
        self,
        ids: IdArray,
        fields: tuple[str, ...],
        *,
        views: NDArray[np.int64] | None = None,
        spans: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Rows of these ids, in the order asked; ids may repeat.

        Args:
            ids: [B].
            fields: one array each.
            views: [B] which view of each sample, where the store keeps views.
            spans: [B, 2] ranges of sequences; None for whole ones.
        Returns:
            One array a field, [B, ...], read-only views of the reply; string ids come back as strings. Of sequences
            the ranges joined, and `row_offsets` [B + 1].
        Raises:
            StoreChangedError: the server has another version of the store by now.
            WireError, TruncatedError: the reply is not the rows asked for.
            ServerUnreachableError: no usable reply.
            RequestError, UnknownIdError, BadIdsError, RowsNotCommittedError, ChecksumError, … as from a store on disk.
        """
        self._refuse_keys(views, spans)
        names = tuple(dict.fromkeys((*fields, IDS)))
        most_bytes = self._most_reply_bytes(names, ids, spans)
        query, body, media_type = self._question(ids, names, views, spans)
        reply = self._transport.request(
            "POST",
            f"{self._address.path}/batch{query}",
            body=body,
            headers={"Content-Type": media_type, "Accept": wire.MEDIA_TYPE},
            max_bytes=most_bytes,
        )
        arrays, _ = self._reader.read(reply.body, names, samples=len(ids))
        returned = self._reader.ids_of(arrays[IDS])
        self._reader.refuse_other_ids(returned, ids)
        found = {name: arrays[name] for name in fields}
        if IDS in found:
            found[IDS] = returned
        if ROW_OFFSETS in arrays:
            self._refuse_other_lengths(arrays[ROW_OFFSETS], spans)
            found[ROW_OFFSETS] = arrays[ROW_OFFSETS]
        return found

    def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """The rows of each step of an epoch, as one stream that is taken up again where it broke.

        Raises, when it is read: as `fetch` does; a break is an error only when no new connection goes on.
        """
        return epoch_rows(
            self._transport, self._address.path, self._reader, self._manifest, self._digest, config, fields
        )

    def close(self) -> None:
        """Close the connections; a later batch opens new ones."""
        self._transport.close()

    def _describe(self) -> tuple[Manifest, str]:
        reply = self._transport.request(
            "GET", self._address.path, headers={"Accept": JSON}, max_bytes=MAX_DOCUMENT_BYTES + _SLACK_BYTES
        )
        try:
            document = json.loads(bytes(reply.body))
            described, digest = document["manifest"], document["digest"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WireError(
                f"{self._where} did not answer with a store's description ({error!r}): check that this is the address "
                "of a `softlabels serve`"
            ) from error
        if not isinstance(described, dict) or not isinstance(digest, str) or not digest:
            raise WireError(
                f"{self._where} did not answer with a store's description: its manifest or digest is missing"
            )
        manifest = Manifest.from_json(described)
        # An unfinished store's digest is of more than its plan, so only the server can tell it.
        if manifest.finished and manifest.digest != digest:
            raise ManifestError(
                f"the manifest that {self._where} sent has digest {manifest.digest}, announced is {digest}: it was "
                "changed on the way, or the server runs another version of softlabels"
            )
        return manifest, digest

    def _question(
        self,
        ids: IdArray,
        names: tuple[str, ...],
        views: NDArray[np.int64] | None,
        spans: NDArray[np.int64] | None,
    ) -> tuple[str, bytes, str]:
        keys = {name: values for name, values in (("views", views), ("spans", spans)) if values is not None}
        if id_kind(ids) == "str":
            spoken = {name: values.tolist() for name, values in keys.items()}
            document = {"ids": ids.tolist(), "fields": names, "digest": self._digest, **spoken}
            return "", json.dumps(document).encode(), JSON
        query = self._queries.get((*names, *keys))
        if query is None:
            columns = {"columns": ",".join(("ids", *keys))} if keys else {}
            wanted = {"fields": ",".join(names), "digest": self._digest, **columns}
            query = self._queries[*names, *keys] = "?" + urlencode(wanted, safe=",")
        body = b"".join(np.ascontiguousarray(column, dtype="<i8").tobytes() for column in (ids, *keys.values()))
        return query, body, BINARY

    def _most_reply_bytes(self, names: tuple[str, ...], ids: IdArray, spans: NDArray[np.int64] | None) -> int:
        rows = len(ids)
        if self._manifest.layout.kind == "sequences":
            # How long whole sequences are, only the server knows; no range is longer than the store.
            whole = np.array([[0, self._manifest.rows]])
            begin, end = np.clip(whole if spans is None else spans, 0, self._manifest.rows).T
            lengths = np.maximum(end - begin, 0)
            rows += int(lengths.sum()) if spans is not None else len(ids) * int(lengths[0])
        return rows * self._reader.row_bytes(names) + _SLACK_BYTES

    def _refuse_keys(self, views: NDArray[np.int64] | None, spans: NDArray[np.int64] | None) -> None:
        name, kind = self._manifest.name, self._manifest.layout.kind
        if views is not None and kind != "views":
            raise RequestError(f"{name!r} keeps one row a sample: it has no views to ask for")
        if views is None and kind == "views":
            raise RequestError(
                f"{name!r} keeps {self._manifest.layout.views} views a sample: say which one each input shows; a "
                "target of one view never serves another"
            )
        if spans is not None and kind != "sequences":
            raise RequestError(f"{name!r} keeps no sequences: it has no spans to ask for")

    def _refuse_other_lengths(self, offsets: NDArray[np.int64], spans: NDArray[np.int64] | None) -> None:
        if spans is not None and not np.array_equal(np.diff(offsets), spans[:, 1] - spans[:, 0]):
            raise WireError(f"{self._where} returned ranges of other lengths than those asked for")
