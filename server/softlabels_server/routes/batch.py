"""POST /v1/stores/{name}/batch: ids in, their rows out. The hot path, so plain ASGI."""

from __future__ import annotations

from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from softlabels.errors import RequestError, StoreChangedError
from softlabels_server.batches import Gathering, plan
from softlabels_server.bodies import read_body
from softlabels_server.catalog import ServedStore, StoreFolder
from softlabels_server.etags import names_digest
from softlabels_server.forms import metadata_of
from softlabels_server.negotiation import MEDIA_TYPES, Form, accepted_form
from softlabels_server.recipes import remember
from softlabels_server.replies import BufferedReply, in_form
from softlabels_server.requests import BatchRequest, from_binary, from_json
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
        form = accepted_form(headers.get("accept"))
        store = await opened(self._stores, scope)
        try:
            request = await self._read(scope, receive, headers, store)
        except ClientDisconnect:
            return  # nobody is there to be answered
        refuse_other_match(headers.get("if-match"), store)
        gathering = plan(store, request, self._settings)
        buffers = await store.pace.run(buffers_in(form, gathering), reply_bytes=gathering.reply_bytes)
        if form == "safetensors":
            remember(scope, gathering, self._stores, self._settings)
        await BufferedReply(buffers, media_type=MEDIA_TYPES[form], digest=store.digest)(scope, receive, send)

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
        return from_json(body, store.manifest, limits)


def make_route(stores: StoreFolder, settings: Settings) -> Route:
    """The route over these stores; `openapi` describes it."""
    return Route(PATH, BatchEndpoint(stores, settings), methods=["POST"], name="batch")


async def opened(stores: StoreFolder, scope: Scope) -> ServedStore:
    """The store that the path names. Raises as `StoreFolder.get` does."""
    name: str = scope["path_params"]["name"]
    store = stores.opened(name)
    # The first request of a version reads its manifest and maps its files.
    return await run_in_threadpool(stores.get, name) if store is None else store


def refuse_other_match(if_match: str | None, store: ServedStore) -> None:
    """Let a store pass that If-Match names, or that no such header speaks of. Raises StoreChangedError."""
    if if_match is not None and not names_digest(if_match, store.digest):
        raise StoreChangedError(
            f"store {store.name!r} is now at version {store.digest}, If-Match names {if_match[:128]}: rows of two "
            "versions must not be mixed; open the store again",
            store=store.digest,
            yours=if_match[:128],
        )


def buffers_in(form: Form, gathering: Gathering) -> Callable[[], list[bytes | memoryview]]:
    """The blocking work of a reply: to gather it and to bring it into its form."""
    if form == "safetensors":
        return gathering.buffers

    def build() -> list[bytes | memoryview]:
        request = gathering.request
        metadata = metadata_of(gathering.store, gathering.temperature, samples=len(request.ids), decode=request.decode)
        return in_form(form, gathering.arrays(), metadata)

    return build
