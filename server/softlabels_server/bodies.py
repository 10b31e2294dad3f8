"""How a request's body comes in: whole, within bounds of size and time, or not at all."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from softlabels.errors import BatchTooLargeError


async def read_body(receive: Receive, headers: Headers, *, most_bytes: int, timeout_s: float) -> bytes:
    """The request's body. uvicorn bounds neither its size nor its time.

    Raises:
        BatchTooLargeError: it is announced or turns out to be larger than `most_bytes`.
        HTTPException: 408, it is not there after `timeout_s`.
        ClientDisconnect: the client went away.
    """
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > most_bytes:
        raise _too_large(most_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _joined(receive, most_bytes)
    except TimeoutError as error:
        late = f"its body was not there after {timeout_s:g} s"
        # Closed, since what still comes of this body could not be told from the next request.
        raise HTTPException(408, late, headers={"Connection": "close"}) from error


async def _joined(receive: Receive, most_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        size += len(piece)
        if size > most_bytes:
            raise _too_large(most_bytes)
        pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _too_large(most_bytes: int) -> BatchTooLargeError:
    return BatchTooLargeError(
        f"the request's body is larger than {most_bytes} bytes: ask in smaller batches", most=most_bytes
    )
