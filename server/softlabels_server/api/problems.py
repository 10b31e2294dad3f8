"""Error replies: the one place that turns exceptions into problem details (RFC 9457)."""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softlabels.errors import NotFoundError, RequestError, SoftLabelsError
from softlabels.wire import to_problem

MEDIA_TYPE = "application/problem+json"

_log = logging.getLogger(__name__)


class Problem(msgspec.Struct, kw_only=True):
    """Problem details, RFC 9457. Match on `code`: codes are never changed, only added."""

    type: Annotated[str, Meta(examples=["urn:softlabels:error:unknown-id"])]
    title: str
    status: int
    detail: Annotated[str, Meta(description="what is wrong, why it matters, what to do")]
    code: Annotated[str, Meta(examples=["unknown-id"])]
    context: Annotated[dict[str, Any], Meta(description="facts for programs: ids, temperatures, digests")]


def install(app: FastAPI) -> None:
    """Answer every error that leaves a route of this app with problem details."""
    app.add_exception_handler(SoftLabelsError, _product_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(_UnexpectedErrors)


def reply_to(
    error: SoftLabelsError, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the reply for an error, with another HTTP status than that of its class if one is given."""
    body = to_problem_json(error, status=status)
    return Response(body, status_code=status or error.status, media_type=MEDIA_TYPE, headers=headers)


def explained(error: Exception, where: str) -> SoftLabelsError:
    """Return the error to tell a client, and log what the operator must see.

    Args:
        error: any exception; unexpected ones are told without details, and logged under an incident number.
        where: method and path of the request.
    """
    if isinstance(error, SoftLabelsError):
        if error.status >= 500:
            # Damage on the server's side: its operator must see it, not only the client.
            _log.error("%s: %s", where, error, exc_info=error)
        return error
    incident = secrets.token_hex(6)
    _log.error("%s: incident %s", where, incident, exc_info=error)
    return SoftLabelsError(
        f"the server met an unexpected error; its log has the details under incident {incident}", incident=incident
    )


def to_problem_json(error: SoftLabelsError, *, status: int | None = None) -> str:
    """Return an error as problem details, with another HTTP status than that of its class if one is given."""
    return json.dumps(_jsonable({**to_problem(error), "status": status or error.status}), allow_nan=False)


async def _product_error(request: Request, error: Exception) -> Response:
    return reply_to(explained(error, f"{request.method} {request.url.path}"))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    paths = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
    return reply_to(RequestError(f"the request does not match /openapi.json: {'; '.join(paths)}"))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # Only the router raises this one: a missing store or sample is a SoftLabelsError.
    if error.status_code == 404:
        return reply_to(NotFoundError(f"there is no route {request.url.path}; /openapi.json lists all routes"))
    allowed = (error.headers or {}).get("Allow")
    hint = f"; allowed: {allowed}" if allowed else ""
    message = f"{request.method} {request.url.path} is refused: {error.detail}{hint}"
    return reply_to(RequestError(message), status=error.status_code, headers=error.headers)


class _UnexpectedErrors:
    """Middleware that answers unexpected exceptions without details, and logs them under an incident number."""

    # Not an exception handler: Starlette raises an `Exception` again after its handler ran, and uvicorn would log it a
    # second time without the number.

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            if started or scope["type"] != "http":
                raise  # too late for another reply: uvicorn closes the connection
            failure = explained(error, f"{scope['method']} {scope['path']}")
            await reply_to(failure)(scope, receive, send)


def _jsonable(value: Any) -> Any:
    """Return a value that JSON can hold: context may have NumPy scalars, tuples and numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, str | int | float | None) else str(value)
