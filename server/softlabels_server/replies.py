"""How a batch leaves: a safetensors file as buffers, sent without being joined, its length known beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Receive, Scope, Send

from softlabels.wire import MEDIA_TYPE

DIGEST_HEADER = "softlabels-digest"
"""Response header: the version of the store that the rows come from."""

_CONTENT_TYPE = (b"content-type", MEDIA_TYPE.encode())


class SafetensorsReply:
    """A plain ASGI reply of several buffers.

    The buffers belong to the transport from the moment they are sent: they must not be written again.

    Args:
        buffers: the file, in order.
        digest: version of the store.
    """

    def __init__(self, buffers: Sequence[bytes | memoryview], *, digest: str) -> None:
        self._buffers = buffers
        self._headers = [
            _CONTENT_TYPE,
            (b"content-length", str(sum(len(buffer) for buffer in buffers)).encode()),
            (DIGEST_HEADER.encode(), digest.encode()),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the header, then one message a buffer."""
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        last = len(self._buffers) - 1
        for position, buffer in enumerate(self._buffers):
            await send({"type": "http.response.body", "body": buffer, "more_body": position < last})
