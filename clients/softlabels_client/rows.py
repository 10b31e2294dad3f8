"""How are rows of a served store read? One request a batch, and nothing of the answer believed that was not checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from softlabels import wire
from softlabels.encodings import Encoding
from softlabels.errors import ManifestError, RequestError, StoreChangedError, UnknownFieldError, WireError
from softlabels.ids import IdArray, from_fixed_bytes, kind_of
from softlabels.manifest import Manifest
from softlabels.opening import IDS
from softlabels.sealing import MAX_MANIFEST_BYTES
from softlabels_client.address import parse_address
from softlabels_client.retrying import RetryPolicy
from softlabels_client.transport import HttpTransport

BINARY = "application/octet-stream"
JSON = "application/json"

_SLACK_BYTES = 1 << 20
"""Room for a reply's header beside the rows, whose size the manifest tells; real headers take under 2 KiB."""


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
        self._manifest, self._digest = self._describe()

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
        """How the rows are decoded.

        Raises:
            RequestError: decoding takes arrays that the encoding learnt for this store, which servers do not hand out.
        """
        learnt = self._manifest.encoding.constants
        if learnt:
            raise RequestError(
                f"rows of {self._manifest.name!r} are decoded with arrays learnt for it ({', '.join(learnt)}), which "
                "this softlabels does not fetch over HTTP: open the store's folder instead"
            )
        return self._manifest.make_encoding()

    def fetch(
        self,
        ids: IdArray,
        fields: tuple[str, ...],
        *,
        views: NDArray[np.int64] | None = None,
        spans: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Rows of these ids, in the order asked; ids may repeat.

        Returns:
            One array a field, [B, ...], read-only views of the reply; string ids come back as strings.
        Raises:
            RequestError: views or spans, which this softlabels does not fetch over HTTP.
            StoreChangedError: the server has another version of the store by now.
            WireError, TruncatedError: the reply is not the rows asked for.
            ServerUnreachableError: no usable reply.
            UnknownIdError, BadIdsError, RowsNotCommittedError, ChecksumError, … as from a store on disk.
        """
        self._refuse_keys(views, spans)
        names = tuple(dict.fromkeys((*fields, IDS)))
        row_bytes = sum(self._spec(name).row_bytes for name in names)
        query, body, media_type = self._question(ids, names)
        reply = self._transport.request(
            "POST",
            f"{self._address.path}/batch{query}",
            body=body,
            headers={"Content-Type": media_type, "Accept": wire.MEDIA_TYPE},
            max_bytes=len(ids) * row_bytes + _SLACK_BYTES,
        )
        arrays, metadata = wire.from_bytes(reply.body)
        self._refuse_other_version(metadata.get("digest"))
        for name in names:
            self._refuse_other_form(arrays, name, rows=len(ids))
        found = {name: arrays[name] for name in fields}
        returned = self._ids_of(arrays[IDS])
        # The promise that row i is the row you think it is: the server reads these ids from the store, not from us.
        if not np.array_equal(returned, ids):
            raise WireError(
                f"{self._where} returned the rows of other samples than those asked for, or in another order: none of "
                "this batch can be used; look at the server, or at the proxy or cache before it",
                asked=ids[:5].tolist(),
                returned=returned[:5].tolist(),
            )
        if IDS in found:
            found[IDS] = returned
        return found

    def close(self) -> None:
        """Close the connections; a later batch opens new ones."""
        self._transport.close()

    def _describe(self) -> tuple[Manifest, str]:
        reply = self._transport.request(
            "GET", self._address.path, headers={"Accept": JSON}, max_bytes=MAX_MANIFEST_BYTES + _SLACK_BYTES
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

    def _spec(self, name: str) -> Any:
        spec = self._manifest.arrays.get(name)
        if spec is None:
            kept = ", ".join(self._manifest.arrays)
            raise UnknownFieldError(f"{self._manifest.name!r} keeps no {name!r}; it keeps {kept}", field=name)
        return spec

    def _question(self, ids: IdArray, names: tuple[str, ...]) -> tuple[str, bytes, str]:
        if kind_of(ids) == "str":
            document = {"ids": ids.tolist(), "fields": names, "digest": self._digest}
            return "", json.dumps(document).encode(), JSON
        query = urlencode({"fields": ",".join(names), "digest": self._digest}, safe=",")
        return f"?{query}", np.ascontiguousarray(ids, dtype="<i8").tobytes(), BINARY

    def _refuse_keys(self, views: object, spans: object) -> None:
        name, kind = self._manifest.name, self._manifest.layout.kind
        if kind != "single":
            raise RequestError(
                f"{name!r} keeps {kind}; this softlabels fetches one row a sample over HTTP: open the store's folder "
                "instead"
            )
        if views is not None or spans is not None:
            raise RequestError(f"{name!r} keeps one row a sample: it has no views or spans to ask for")

    def _refuse_other_version(self, digest: str | None) -> None:
        if digest != self._digest:
            raise StoreChangedError(
                f"{self._where} is now at version {digest}, this was opened at {self._digest}: rows of two versions "
                "must not be mixed; open the store again",
                store=digest,
                yours=self._digest,
            )

    def _refuse_other_form(self, arrays: Mapping[str, NDArray[Any]], name: str, *, rows: int) -> None:
        array, spec = arrays.get(name), self._spec(name)
        if array is None:
            raise WireError(f"{self._where} left {name!r} out of its reply")
        if array.dtype != np.dtype(spec.dtype) or array.shape != (rows, *spec.row_shape):
            raise WireError(
                f"{self._where} sent {name!r} as {array.dtype.str}{list(array.shape)} where the manifest says "
                f"{spec.dtype}{[rows, *spec.row_shape]}"
            )

    def _ids_of(self, kept: NDArray[Any]) -> IdArray:
        if self._manifest.ids.kind == "int":
            return kept
        try:
            return from_fixed_bytes(kept)
        except UnicodeDecodeError as error:
            raise WireError(f"{self._where} returned sample ids that are not UTF-8: {error}") from error
