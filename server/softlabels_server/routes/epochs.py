"""GET /v1/stores/{name}/epochs/{epoch}: a rank's batches of an epoch, one after the other. Plain ASGI: it streams."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from softlabels_server.catalog import StoreFolder
from softlabels_server.epochs import EpochStream, plan_stream
from softlabels_server.negotiation import accepted_form
from softlabels_server.outlets import Appetite, outlet_of
from softlabels_server.replies import reply_headers
from softlabels_server.routes.batch import opened, refuse_other_match
from softlabels_server.settings import Settings

PATH = "/v1/stores/{name}/epochs/{epoch}"


class EpochEndpoint:
    """Answers with streams.

    Args:
        stores: what can be asked for.
        settings: bounds of a batch and of a reader's slowness.
    """

    def __init__(self, stores: StoreFolder, settings: Settings) -> None:
        self._stores = stores
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, say how long it will be, then send piece by piece, no faster than it is read."""
        headers = Headers(scope=scope)
        if accepted_form(headers.get("accept")) != "safetensors":
            raise HTTPException(406, "epochs are streams of safetensors files and nothing else")
        store = await opened(self._stores, scope)
        refuse_other_match(headers.get("if-match"), store)
        query = scope["query_string"].decode("latin-1")
        stream = plan_stream(store, scope["path_params"]["epoch"], query, self._settings)
        size_bytes = await run_in_threadpool(_checked_size, stream, self._settings.max_reply_bytes)
        start = {
            "type": "http.response.start",
            "status": 200,
            "headers": reply_headers(size_bytes, digest=store.digest),
        }
        await send(start)
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        await self._send_all(stream, scope, send)

    async def _send_all(self, stream: EpochStream, scope: Scope, send: Send) -> None:
        outlet = outlet_of(scope, send)
        appetite = Appetite()
        pieces = stream.pieces(lambda: appetite.piece_bytes)
        if not await outlet.send_all(pieces, appetite, stall_timeout_s=self._settings.stall_timeout_s):
            outlet.abandon()
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def make_route(stores: StoreFolder, settings: Settings) -> Route:
    """The route over these stores; `openapi` describes it."""
    return Route(PATH, EpochEndpoint(stores, settings), methods=["GET"], name="epoch")


def _checked_size(stream: EpochStream, most_bytes: int) -> int:
    stream.check_size(most_bytes)
    return stream.size_bytes
