"""Routes about the server and its stores: /health, /v1/stores, /v1/stores/{name} and /v1/stores/{name}/constants."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Header, Path, Request, Response
from pydantic import BaseModel, Field

from softlabels import __version__, wire
from softlabels.wire import to_problem
from softlabels_server.api.openapi import FILE, PROBLEMS, problem
from softlabels_server.api.replies import npy_header
from softlabels_server.api.requests import etag_of, names_digest
from softlabels_server.catalog import BrokenStore, ServedStore, StoreFolder
from softlabels_server.fast_path.response_plan import DIGEST_HEADER

CONSTANTS_PATH = "/v1/stores/{name}/constants"

StoreName: TypeAlias = Annotated[str, Path(description="name of the store")]
IfNoneMatch: TypeAlias = Annotated[str | None, Header(description="ETag of the client's copy")]

_MAY_BE_CACHED: dict[int | str, dict[str, Any]] = {
    304: {"description": "The client's copy is of this version"},
    404: problem("No store of that name (`unknown-store`)"),
    **PROBLEMS,
}
_CONSTANTS_REPLY = {"description": "The arrays; `ETag` is the store's digest", "content": {wire.MEDIA_TYPE: FILE}}


class ScrubHealth(BaseModel):
    """State of the background check. Names of stores are in the log, since anyone may read this."""

    interval_s: float = Field(description="every file is read once in this time")
    rounds: int = Field(description="finished rounds")
    finished_s: float | None = Field(description="Unix time at which the last round ended; absent before")
    read_bytes: int = Field(description="read in the round under way")
    total_bytes: int = Field(description="to read in this round")
    damaged: int = Field(description="shards refused as damaged; a file that a whole store depends on counts as one")


class Health(BaseModel):
    """State of the server."""

    status: str = Field(description="`ok` whenever the server answers")
    version: str = Field(description="version of softlabels that serves")
    stores: int = Field(description="number of stores now")
    scrub: ScrubHealth | None = Field(description="background check; absent without `serve --scrub`")


class StoreSummary(BaseModel):
    """Entry of the store list."""

    name: str = Field(description="name in URLs")
    rows: int = Field(description="number of rows of the finished store")
    classes: int = Field(description="number of classes")
    encoding: str = Field(description="name of the row encoding, such as `f16`")
    digest: str = Field(description="digest that identifies this version of the store")
    finished: bool = Field(description="whether all rows are present")
    url: str = Field(description="argument for `softlabels.open`")


class UnreadableStore(BaseModel):
    """Entry of a store that exists but cannot be opened."""

    name: str = Field(description="name in URLs")
    problem: dict[str, Any] = Field(description="reason, as problem details")


class StoreList(BaseModel):
    """Every store of this server."""

    stores: list[StoreSummary | UnreadableStore]


class StoreDescription(BaseModel):
    """Manifest and version of a store."""

    name: str = Field(description="name in URLs")
    digest: str = Field(description="digest that identifies this version of the store; also the ETag")
    finished: bool = Field(description="whether all rows are present")
    manifest: dict[str, Any] = Field(description="manifest of the store, or its plan while it is unfinished")


def make_router(stores: StoreFolder) -> APIRouter:
    """Return the JSON routes over these stores."""
    # Routes are plain functions, not coroutines, so that FastAPI runs them in threads: opening stores reads disks.
    router = APIRouter()

    @router.get("/health", summary="State of the server", tags=["server"], response_model_exclude_none=True)
    def health() -> Health:
        state = stores.scrub
        scrub = None
        if state is not None:
            numbers = {name: getattr(state, name) for name in ScrubHealth.model_fields if name != "damaged"}
            scrub = ScrubHealth(**numbers, damaged=len(state.damage))
        return Health(status="ok", version=__version__, stores=len(stores.names()), scrub=scrub)

    @router.get("/v1/stores", summary="List the stores", tags=["stores"], responses=PROBLEMS)
    def list_stores(request: Request) -> StoreList:
        return StoreList(stores=[_entry(store, base=str(request.base_url)) for store in stores])

    @router.get(
        "/v1/stores/{name}",
        summary="Describe a store",
        tags=["stores"],
        responses=_MAY_BE_CACHED,
        response_model=StoreDescription,
    )
    def describe_store(response: Response, name: StoreName, if_none_match: IfNoneMatch = None) -> Any:
        store = stores.get(name)
        response.headers.update(_version_headers(store))
        if names_digest(if_none_match, store.digest):
            return Response(status_code=304, headers=response.headers)
        manifest = store.manifest
        return StoreDescription(
            name=store.name, digest=store.digest, finished=manifest.finished, manifest=manifest.to_json()
        )

    @router.head(CONSTANTS_PATH, include_in_schema=False)
    @router.get(
        CONSTANTS_PATH,
        summary="Arrays that the encoding learned for this store",
        description="A safetensors file of the arrays that decoding needs; without arrays for most encodings.",
        tags=["stores"],
        operation_id="constants",
        response_class=Response,
        responses={200: _CONSTANTS_REPLY, **_MAY_BE_CACHED},
    )
    def constants(name: StoreName, if_none_match: IfNoneMatch = None) -> Response:
        store = stores.get(name)
        headers = {**_version_headers(store), DIGEST_HEADER: store.digest}
        if names_digest(if_none_match, store.digest):
            return Response(status_code=304, headers=headers)
        constants = store.encoding.constants
        # With the bytes before it in its file, a client computes the SHA-256 that the manifest has of the file.
        files = {f"npy:{key}": npy_header(array).decode("latin-1") for key, array in constants.items()}
        metadata = {"format": wire.CONSTANTS_FORMAT, "store": store.name, "digest": store.digest, **files}
        file = wire.to_bytes(constants, metadata)
        return Response(file, media_type=wire.MEDIA_TYPE, headers=headers)

    return router


def _version_headers(store: ServedStore) -> dict[str, str]:
    # `no-cache` lets a cache keep a copy but makes it ask each time whether the store was replaced.
    return {"ETag": etag_of(store.digest), "Cache-Control": "no-cache"}


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
