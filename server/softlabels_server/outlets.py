"""How do the bytes of a long reply leave? No faster than the client reads, and past the transport where that is known."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray
from starlette.types import Scope, Send

from softlabels_server.forms import as_buffer

EXTENSION = "softlabels.pour"
"""Where the HTTP protocol leaves, in a request's scope, itself as a `Pourer`."""


class Pourer(Protocol):
    """What the HTTP protocol can do for a reply under way."""

    def pour(self, scope: Any, buffers: Sequence[bytes | NDArray[Any]]) -> bool:
        """Send body bytes; whether the socket took all of them at once."""
        ...

    async def drained(self, scope: Any) -> bool:
        """Wait until the client has read enough for more; False where it is gone."""
        ...

    def abandon(self) -> None:
        """Close the connection in the middle of the reply, so that the client notices."""
        ...


class PouringOutlet:
    """Onto the socket. Yields to other requests now and then, since a fast reader would never make it wait."""

    def __init__(self, pourer: Pourer, scope: Scope) -> None:
        self._pourer, self._scope = pourer, scope

    async def send(self, buffers: Sequence[bytes | NDArray[Any]]) -> bool:
        """Send body bytes; False where the client is gone."""
        if self._pourer.pour(self._scope, buffers):
            await asyncio.sleep(0)
        return await self._pourer.drained(self._scope)

    def abandon(self) -> None:
        """Close the connection in the middle of the reply."""
        self._pourer.abandon()


class PlainOutlet:
    """As ASGI has it, for servers that know nothing of pouring."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def send(self, buffers: Sequence[bytes | NDArray[Any]]) -> bool:
        """Send body bytes; an ASGI server does not say whether anybody is there."""
        for buffer in buffers:
            body = buffer if isinstance(buffer, bytes) else as_buffer(buffer)
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
        return True

    def abandon(self) -> None:
        """A reply that is not whole when the app returns is cut by the server, which is all that is wanted."""


def outlet_of(scope: Scope, send: Send) -> PouringOutlet | PlainOutlet:
    """The best way out for a reply to this request."""
    pourer: Pourer | None = scope.get("extensions", {}).get(EXTENSION)
    return PlainOutlet(send) if pourer is None else PouringOutlet(pourer, scope)
