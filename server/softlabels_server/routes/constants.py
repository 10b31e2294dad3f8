"""GET /v1/stores/{name}/constants: the arrays that a store's encoding learnt, without which no row can be decoded."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from softlabels import wire
from softlabels_server.catalog import ServedStore, StoreFolder
from softlabels_server.etags import etag_of, names_digest
from softlabels_server.replies import DIGEST_HEADER
from softlabels_server.routes.batch import opened

PATH = "/v1/stores/{name}/constants"
FORMAT = "softlabels-constants/1"


class ConstantsEndpoint:
    """Answers with learnt arrays; with a file of none where the encoding has none.

    Args:
        stores: what can be asked for.
    """

    def __init__(self, stores: StoreFolder) -> None:
        self._stores = stores

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, or 304 to a client that holds this version's."""
        store = await opened(self._stores, scope)
        headers = {"ETag": etag_of(store.digest), "Cache-Control": "no-cache", DIGEST_HEADER: store.digest}
        if names_digest(Headers(scope=scope).get("if-none-match"), store.digest):
            reply = Response(status_code=304, headers=headers)
        else:
            body = await run_in_threadpool(_file, store)
            reply = Response(body, media_type=wire.MEDIA_TYPE, headers=headers)
        await reply(scope, receive, send)


def make_route(stores: StoreFolder) -> Route:
    """The route over these stores; `openapi` describes it."""
    return Route(PATH, ConstantsEndpoint(stores), methods=["GET"], name="constants")


def _file(store: ServedStore) -> bytes:
    metadata = {"format": FORMAT, "store": store.name, "digest": store.digest}
    return wire.to_bytes(store.encoding.constants, metadata)
