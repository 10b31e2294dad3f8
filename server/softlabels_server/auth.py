"""Who may ask: everyone, or whoever sends the bearer token."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from softlabels.errors import UnauthorizedError
from softlabels_server import problems

OPEN_PATHS = frozenset({"/health"})
"""What a load balancer asks without a token."""


class BearerToken:
    """Lets requests through that carry the token (RFC 6750); put before the app only where a token is set.

    Args:
        app: what is protected.
        token: the secret.
    """

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app = app
        self._token = token.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        refusal = UnauthorizedError(
            "this server asks for a bearer token and the request carries none or another one: pass it to "
            "softlabels.open(..., token=...), or send the header `Authorization: Bearer TOKEN`"
        )
        reply = problems.reply_to(refusal, headers={"WWW-Authenticate": 'Bearer realm="softlabels"'})
        await reply(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # In constant time, so that how long a refusal takes tells nothing of the secret.
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self._token)
