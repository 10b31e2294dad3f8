"""What the fast path uses of uvicorn beyond its documentation, so that an upgrade that changes it is noticed here."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

ADVICE = (
    f"in uvicorn {uvicorn.__version__}: read softlabels_server/fast_path/protocol.py and socket_writer.py against its "
    "httptools_impl.py before admitting this version in pyproject.toml"
)

HOOKS = {
    "connection_made": ["self", "transport"],
    "connection_lost": ["self", "exc"],
    "data_received": ["self", "data"],
    "on_message_begin": ["self"],
    "on_headers_complete": ["self"],
    "on_message_complete": ["self"],
    "timeout_keep_alive_handler": ["self"],
    "_start_asgi_task": ["self", "cycle", "app"],
}

PROTOCOL_ATTRIBUTES = (
    *("cycle", "scope", "headers", "parser", "transport", "loop", "flow", "server_state"),
    *("timeout_keep_alive", "timeout_keep_alive_task"),
)

CYCLE_ATTRIBUTES = (
    *("scope", "transport", "flow", "keep_alive", "response_complete"),
    *("disconnected", "expected_content_length"),
)


def in_request(check: Callable[[HttpToolsProtocol], None]) -> None:
    """Run a check of uvicorn's protocol in the middle of a request."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def run() -> None:
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        protocol = HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
        protocol.connection_made(MagicMock(spec=asyncio.Transport))
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
        check(protocol)
        protocol.connection_lost(None)
        await asyncio.gather(*protocol.tasks)

    asyncio.run(run())


class TestHttpToolsProtocol:
    @pytest.mark.parametrize(("name", "parameters"), HOOKS.items(), ids=HOOKS)
    def test_hooks_that_are_overridden_exist(self, name: str, parameters: list[str]) -> None:
        """Under the same name with the same parameters, or an override would never be called."""
        hook = getattr(HttpToolsProtocol, name, None)
        assert hook is not None, f"HttpToolsProtocol.{name} is missing {ADVICE}"
        found = list(inspect.signature(hook).parameters)
        assert found == parameters, f"HttpToolsProtocol.{name} takes {found}, not {parameters} {ADVICE}"

    def test_attributes_that_are_read_exist(self) -> None:
        """Of the protocol, its request cycle, flow control and server state."""

        def check(protocol: HttpToolsProtocol) -> None:
            for owner, names in (
                (protocol, PROTOCOL_ATTRIBUTES),
                (protocol.cycle, CYCLE_ATTRIBUTES),
                (protocol.flow, ("drain",)),
                (protocol.server_state, ("default_headers", "total_requests")),
            ):
                missing = [name for name in names if not hasattr(owner, name)]
                assert missing == [], f"{type(owner).__name__} has no {', '.join(missing)} {ADVICE}"

        in_request(check)

    def test_a_request_has_a_cycle_of_its_own(self) -> None:
        """With the scope that was current when it began, incomplete until it is answered."""

        def check(protocol: HttpToolsProtocol) -> None:
            cycle = protocol.cycle
            assert isinstance(cycle, RequestResponseCycle), f"another cycle {ADVICE}"
            assert cycle.scope is protocol.scope, f"the cycle has another scope {ADVICE}"
            assert cycle.response_complete is False, f"a request begins complete {ADVICE}"
            assert cycle.expected_content_length == 0, f"the length is counted otherwise {ADVICE}"

        in_request(check)

    def test_it_is_the_protocol_that_uvicorn_picks(self) -> None:
        """httptools comes with the extra `server`; with h11 there would be no fast path."""
        assert AutoHTTPProtocol is HttpToolsProtocol, f"another default protocol {ADVICE}"


class TestServer:
    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("on_tick", ["self", "counter"]),
            ("startup", ["self", "sockets"]),
            ("capture_signals", ["self"]),
            ("handle_exit", ["self", "sig", "frame"]),
        ],
    )
    def test_methods_that_are_overridden_exist(self, name: str, parameters: list[str]) -> None:
        """Readiness, quiet shutdown and the heap trimmer hang on them."""
        method = getattr(uvicorn.Server, name, None)
        assert method is not None, f"uvicorn.Server.{name} is missing {ADVICE}"
        assert list(inspect.signature(method).parameters) == parameters, f"uvicorn.Server.{name} changed {ADVICE}"
