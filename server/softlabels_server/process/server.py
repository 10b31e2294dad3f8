"""One serving process: the listening socket, uvicorn's configuration, signals and memory."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from softlabels.errors import PortInUseError, RequestError
from softlabels_server.fast_path.protocol import make_protocol
from softlabels_server.process.memory import HeapTrimmer, configure_malloc
from softlabels_server.settings import Settings

TICKS_PER_TRIM = 100
"""uvicorn ticks ten times a second, so the heap is checked every 10 s."""

BACKLOG = 2048
"""Connections that may wait to be accepted: uvicorn's own default."""


def listen(settings: Settings) -> socket.socket:
    """Return a socket that listens on the address in the settings.

    Raises:
        PortInUseError: another process listens there.
        RequestError: the address is not this machine's, or not allowed.
    """
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = f"cannot listen on {host} port {port}: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            advice = "choose another port with --port, or let --port 0 find a free one"
            raise PortInUseError(f"{reason}; {advice}", host=host, port=port) from error
        raise RequestError(f"{reason}; give an address of this machine with --host", host=host, port=port) from error


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket, as reached from this machine where it listens on every address."""
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def make_server(app: FastAPI, settings: Settings, *, announce: Callable[[], None] = lambda: None) -> StoppableServer:
    """Return a server of this application; `run(sockets=[listener])` runs it until it is told to stop.

    Args:
        app: the application.
        settings: limits of connections; the address is the listener's.
        announce: called once, when requests are being answered.
    """
    config = uvicorn.Config(
        app,
        http=make_protocol(header_timeout_s=settings.header_timeout_s),
        ws="none",
        lifespan="on",
        log_config=None,  # logging belongs to whoever starts the process
        access_log=settings.access_log,
        # Nothing here depends on a client's address, so there is no reason to trust X-Forwarded-For.
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_timeout_s,
        timeout_graceful_shutdown=settings.shutdown_timeout_s,
        backlog=BACKLOG,
    )
    return StoppableServer(config, announce=announce)


def set_up_logging(settings: Settings) -> None:
    """Log warnings and errors to standard error, and requests where the settings ask for it."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    if settings.access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)


def raise_open_file_limit() -> None:
    """Allow this process as many open files, and so connections, as the system's hard limit.

    Shells start with a soft limit of 1,024, for programs that still use `select`; a stream needs two files.
    """
    if sys.platform == "win32":
        return
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        except (OSError, ValueError) as error:  # macOS refuses the hard limit that it reports
            logging.getLogger(__name__).warning("only %d files may be open at once: %s", limit, error)


class StoppableServer(uvicorn.Server):
    """uvicorn's server that ends quietly on SIGTERM and Ctrl-C.

    Args:
        config: uvicorn's configuration.
        announce: called once, when requests are being answered.
    """

    def __init__(self, config: uvicorn.Config, *, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce
        self._heap_trimmer = HeapTrimmer()

    async def on_tick(self, counter: int) -> bool:
        """Check the heap now and then, in a thread since it takes milliseconds; then do what uvicorn does."""
        if counter % TICKS_PER_TRIM == TICKS_PER_TRIM - 1:
            await asyncio.to_thread(self._heap_trimmer.trim_if_idle)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to answer requests, then announce it."""
        configure_malloc()
        raise_open_file_limit()
        await super().startup(sockets=sockets)
        if self.started:
            self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM. uvicorn raises them again afterwards, which would end the process by a signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
