"""GET /health: is the server alive?"""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from softlabels import __version__
from softlabels_server.catalog import StoreFolder


class Health(BaseModel):
    """That the server answers, what it is and how many stores it sees."""

    status: str = Field(description="`ok`, or the request would not have been answered")
    version: str = Field(description="version of softlabels that serves")
    stores: int = Field(description="how many stores there are now")


def make_router(stores: StoreFolder) -> APIRouter:
    """The route over these stores."""
    router = APIRouter(tags=["server"])

    @router.get("/health", summary="Is the server alive?")
    def health() -> Health:
        return Health(status="ok", version=__version__, stores=len(stores.names()))

    return router
