"""GET /v1/stores and /v1/stores/{name}: which stores are there, and what does one say of itself?"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response
from pydantic import BaseModel, Field

from softlabels.problem_details import to_problem
from softlabels_server.catalog import BrokenStore, ServedStore, StoreFolder
from softlabels_server.etags import etag_of, names_digest
from softlabels_server.openapi import NOT_FOUND, PROBLEMS


class StoreSummary(BaseModel):
    """One store in the list."""

    name: str = Field(description="what it is called in URLs")
    rows: int = Field(description="rows when finished")
    classes: int = Field(description="classes of each row")
    encoding: str = Field(description="how rows are encoded, such as `f16`")
    digest: str = Field(description="names this version of the store")
    finished: bool = Field(description="whether every row is there; of an unfinished store committed rows can be read")
    url: str = Field(description="what to give to `softlabels.open`")


class UnreadableStore(BaseModel):
    """A store that is there but cannot be opened."""

    name: str = Field(description="what it is called in URLs")
    problem: dict[str, Any] = Field(description="why it cannot be opened, as problem details")


class StoreList(BaseModel):
    """Every store of this server."""

    stores: list[StoreSummary | UnreadableStore]


class StoreDescription(BaseModel):
    """What a store says of itself."""

    name: str = Field(description="what it is called in URLs")
    digest: str = Field(description="names this version of the store; also the ETag")
    finished: bool = Field(description="whether every row is there")
    manifest: dict[str, Any] = Field(description="the store's manifest, of an unfinished one its plan")


def make_router(stores: StoreFolder) -> APIRouter:
    """The routes over these stores."""
    router = APIRouter(prefix="/v1/stores", tags=["stores"])

    @router.get("", summary="Which stores are there?", responses=PROBLEMS)
    def list_stores(request: Request) -> StoreList:
        return StoreList(stores=[_entry(store, base=str(request.base_url)) for store in stores])

    @router.get(
        "/{name}",
        summary="What does a store say of itself?",
        responses={304: {"description": "The client's copy is of this version"}, 404: NOT_FOUND, **PROBLEMS},
        response_model=StoreDescription,
    )
    def describe_store(
        response: Response,
        name: Annotated[str, Path(description="of the store")],
        if_none_match: Annotated[str | None, Header(description="ETag of the copy that the client holds")] = None,
    ) -> Any:
        store = stores.get(name)
        headers = {"ETag": etag_of(store.digest), "Cache-Control": "no-cache"}
        if names_digest(if_none_match, store.digest):
            return Response(status_code=304, headers=headers)
        response.headers.update(headers)
        manifest = store.manifest
        return StoreDescription(
            name=store.name, digest=store.digest, finished=manifest.finished, manifest=manifest.to_json()
        )

    return router


def _entry(store: ServedStore | BrokenStore, *, base: str) -> StoreSummary | UnreadableStore:
    if isinstance(store, BrokenStore):
        return UnreadableStore(name=store.name, problem=to_problem(store.error))
    manifest = store.manifest
    return StoreSummary(
        name=store.name,
        rows=manifest.rows,
        classes=manifest.classes,
        encoding=manifest.encoding.name,
        digest=store.digest,
        finished=manifest.finished,
        url=f"{base.rstrip('/')}/{store.name}",
    )
