"""How the parts become one app: routes, problem details, and what protects them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from softlabels import __version__
from softlabels_server import openapi, problems
from softlabels_server.auth import BearerToken
from softlabels_server.catalog import StoreFolder
from softlabels_server.routes import batch, constants, epochs, health, stores
from softlabels_server.settings import Settings


class SoftLabelsApp(FastAPI):
    """FastAPI, with the plain ASGI routes described beside its own.

    Args:
        with_token: whether the server asks for a bearer token.
        more: what FastAPI takes.
    """

    def __init__(self, *, with_token: bool, **more: Any) -> None:
        super().__init__(**more)
        self._with_token = with_token

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made once."""
        if self.openapi_schema is None:
            self.openapi_schema = openapi.complete(super().openapi(), with_token=self._with_token)
        return self.openapi_schema


def create_app(store_folder: StoreFolder, settings: Settings) -> FastAPI:
    """An app that serves these stores; it closes them when it is shut down.

    Args:
        store_folder: what is served.
        settings: see `Settings`; host, port and timeouts of connections are the business of `running`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        store_folder.close()

    app = SoftLabelsApp(
        title="softlabels",
        version=__version__,
        summary="Soft targets, computed once by a teacher ensemble, for any number of students.",
        # The pages of FastAPI load their scripts from elsewhere; a server on a closed network would show blank ones.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        with_token=settings.token is not None,
    )
    app.include_router(health.make_router(store_folder))
    app.include_router(stores.make_router(store_folder))
    app.router.routes += [
        batch.make_route(store_folder, settings),
        epochs.make_route(store_folder, settings),
        constants.make_route(store_folder),
    ]
    problems.install(app)
    if settings.token is not None:
        app.add_middleware(BearerToken, token=settings.token)
    return app
