"""POST /v1/stores/{name}/batch: ids in, one safetensors file out. The hot path, so plain ASGI."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from softlabels.errors import RequestError, StoreChangedError
from softlabels_server.batches import BatchRequest, from_binary, from_json, plan
from softlabels_server.bodies import read_body
from softlabels_server.catalog import ServedStore, StoreFolder
from softlabels_server.etags import names_digest
from softlabels_server.replies import SafetensorsReply
from softlabels_server.settings import Settings

PATH = "/v1/stores/{name}/batch"
BINARY = "application/octet-stream"
JSON = "application/json"


class BatchEndpoint:
    """Answers batch requests.

    Args:
        stores: what can be asked for.
        settings: bounds of a request and its reply.
    """

    def __init__(self, stores: StoreFolder, settings: Settings) -> None:
        self._stores = stores
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, check, gather, send; errors leave as exceptions, see `problems`."""
        headers = Headers(scope=scope)
        name: str = scope["path_params"]["name"]
        store = self._stores.opened(name)
        if store is None:
            # The first request of a version reads its manifest and maps its files.
            store = await run_in_threadpool(self._stores.get, name)
        try:
            request = await self._read(scope, receive, headers, store)
        except ClientDisconnect:
            return  # nobody is there to be answered
        _refuse_other_match(headers.get("if-match"), store)
        gathering = plan(store, request, self._settings)
        buffers = await store.pace.run(gathering.buffers, reply_bytes=gathering.reply_bytes)
        await SafetensorsReply(buffers, digest=store.digest)(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, headers: Headers, store: ServedStore) -> BatchRequest:
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in (JSON, BINARY):
            raise HTTPException(415, f"its body is {media_type or 'of no type'!r}; send {JSON} or {BINARY}")
        limits = self._settings
        body = await read_body(receive, headers, most_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
        query = scope["query_string"].decode("latin-1")
        if media_type == BINARY:
            return from_binary(body, query, limits)
        if query:
            raise RequestError("query parameters go with binary ids; with JSON say it all in the body")
        return from_json(body, store, limits)


def make_route(stores: StoreFolder, settings: Settings) -> Route:
    """The route over these stores; `openapi` describes it."""
    return Route(PATH, BatchEndpoint(stores, settings), methods=["POST"], name="batch")


def _refuse_other_match(if_match: str | None, store: ServedStore) -> None:
    if if_match is not None and not names_digest(if_match, store.digest):
        raise StoreChangedError(
            f"store {store.name!r} is now at version {store.digest}, If-Match names {if_match[:128]}: rows of two "
            "versions must not be mixed; open the store again",
            store=store.digest,
            yours=if_match[:128],
        )
