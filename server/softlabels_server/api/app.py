"""The FastAPI application: routes, problem details, OpenAPI document and bearer token."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from softlabels import __version__
from softlabels.errors import UnauthorizedError
from softlabels_server.api import openapi, problems, stores
from softlabels_server.api.batch import BatchEndpoint
from softlabels_server.api.epochs import EpochEndpoint
from softlabels_server.catalog import StoreFolder
from softlabels_server.fast_path.request_head import refusal_of
from softlabels_server.settings import Settings

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no token, for load balancers."""


def create_app(store_folder: StoreFolder, settings: Settings) -> FastAPI:
    """Return an application that serves these stores and closes them on shutdown.

    Of the settings, limits and token are used; `softlabels_server.process.server` uses the rest.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        store_folder.close()

    app = FastAPI(
        title="softlabels",
        version=__version__,
        summary="Soft targets, computed once by a teacher ensemble, for any number of students.",
        # FastAPI's documentation pages load scripts from a CDN and stay blank on a closed network.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.include_router(stores.make_router(store_folder))
    app.router.routes += [
        Route(openapi.BATCH_PATH, BatchEndpoint(store_folder, settings), methods=["POST"], name="batch"),
        Route(openapi.EPOCH_PATH, EpochEndpoint(store_folder, settings), methods=["GET"], name="epoch"),
    ]
    describe = app.openapi

    def describe_all() -> dict[str, Any]:
        # FastAPI's method builds the document at the first call and then returns the same one.
        return app.openapi_schema or openapi.complete(describe(), with_token=settings.token is not None)

    app.openapi = describe_all  # type: ignore[method-assign]
    problems.install(app)
    # Added last, so it is the outermost middleware: refused before a route sees the request.
    app.add_middleware(RequestGuard, token=settings.token)
    return app


class RequestGuard:
    """ASGI middleware that answers 400 to ambiguous requests, and 401 to those without the bearer token (RFC 6750)."""

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app = app
        self._token = None if token is None else token.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        refusal = None
        if scope["type"] == "http":
            refusal = refusal_of(scope["headers"], None if scope["path"] in OPEN_PATHS else self._token)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        if isinstance(refusal, UnauthorizedError):
            reply = problems.reply_to(refusal, headers={"WWW-Authenticate": 'Bearer realm="softlabels"'})
        else:  # closed, since where an ambiguous request ends is ambiguous too
            reply = problems.reply_to(refusal, status=400, headers={"Connection": "close"})
        await reply(scope, receive, send)
