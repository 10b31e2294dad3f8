"""How an error becomes a reply: the one place that turns exceptions into RFC 9457 problem details."""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softlabels.errors import NotFoundError, RequestError, SoftLabelsError
from softlabels.problem_details import to_problem

MEDIA_TYPE = "application/problem+json"

_log = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    """Have every error that leaves a route of this app answered with problem details."""
    app.add_exception_handler(SoftLabelsError, _foreseen)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused_by_routing)
    app.add_middleware(_Unforeseen)


def reply_to(
    error: SoftLabelsError, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """The reply that an error is answered with.

    Args:
        error: what went wrong.
        status: where HTTP has a closer one than the error's class, such as 405.
        headers: to send along, such as `Allow`.
    """
    problem = to_problem(error)
    if status is not None:
        problem["status"] = status
    body = json.dumps(_plain(problem), allow_nan=False).encode()
    return Response(body, status_code=problem["status"], media_type=MEDIA_TYPE, headers=dict(headers or {}))


async def _foreseen(request: Request, error: Exception) -> Response:
    assert isinstance(error, SoftLabelsError)
    if error.status >= 500:
        # Damage on the server's side: whoever runs it has to hear of it, not only the client that met it.
        _log.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
    return reply_to(error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    places = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
    return reply_to(
        RequestError(f"the request does not have the form that /openapi.json describes: {'; '.join(places)}")
    )


async def _refused_by_routing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return reply_to(NotFoundError(f"there is nothing at {request.url.path}; /openapi.json lists what there is"))
    allowed = (error.headers or {}).get("Allow")
    hint = f"; allowed: {allowed}" if allowed else ""
    message = f"{request.method} {request.url.path} is refused: {error.detail}{hint}"
    return reply_to(RequestError(message), status=error.status_code, headers=error.headers)


class _Unforeseen:
    """Answers what nobody foresaw without telling of the server's insides: those go to the log, under a number.

    A middleware and not an exception handler: of those for `Exception`, Starlette raises the exception on, and it would
    be logged a second time, without the number.
    """

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
        except Exception:
            if started or scope["type"] != "http":
                raise  # too late for another reply: the HTTP server closes the connection, which the client notices
            incident = secrets.token_hex(6)
            _log.exception("%s %s: incident %s", scope["method"], scope["path"], incident)
            failure = SoftLabelsError(
                f"the server failed in a way that nobody foresaw; its log has the details under incident {incident}",
                incident=incident,
            )
            await reply_to(failure)(scope, receive, send)


def _plain(value: Any) -> Any:
    """A value that JSON can hold: context may carry NumPy scalars, tuples and numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, str | int | float | None) else str(value)
