"""How is an app run? By one process that listens, announces itself, and stops when told to; `workers` runs several."""

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

TICKS_BETWEEN_LOOKS = 100
"""uvicorn ticks ten times a second: every 10 s it is seen whether much freed memory can be given back."""

BACKLOG = 2048
"""Connections that may wait to be accepted: uvicorn's own choice."""


def listen(settings: Settings) -> socket.socket:
    """A socket that listens where the settings say.

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
    """The address to reach a listening socket at, from this machine when it listens on every address."""
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def make_server(app: FastAPI, settings: Settings, *, announce: Callable[[], None] = lambda: None) -> StoppableServer:
    """A server of this app; `run(sockets=[listener])` runs it until it is told to stop.

    Args:
        app: what answers.
        settings: bounds of connections; the address is the listener's business.
        announce: called once, when requests are being answered.
    """
    config = uvicorn.Config(
        app,
        http=make_protocol(header_timeout_s=settings.header_timeout_s),
        ws="none",
        lifespan="on",
        # Logging is set up by whoever starts the process.
        log_config=None,
        access_log=settings.access_log,
        # Nothing here depends on where a request came from; a proxy's word on it would be one more thing to trust.
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_timeout_s,
        timeout_graceful_shutdown=settings.shutdown_timeout_s,
        backlog=BACKLOG,
    )
    return StoppableServer(config, announce=announce)


def set_up_logging(settings: Settings) -> None:
    """Warnings and errors on standard error; requests too where that was asked for."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    if settings.access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)


def raise_open_file_limit() -> None:
    """Let this process have as many connections as the system allows it at all.

    Shells start with a soft limit of 1,024 files, for programs that still use `select`; a stream takes two.
    """
    if sys.platform == "win32":
        return
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        except (OSError, ValueError) as error:  # macOS has a lower limit than the one that it names
            logging.getLogger(__name__).warning("only %d files may be open at once: %s", limit, error)


class StoppableServer(uvicorn.Server):
    """uvicorn, ending quietly on SIGTERM and Ctrl-C: being told to stop is no failure.

    Args:
        config: uvicorn's.
        announce: called once, when requests are being answered.
    """

    def __init__(self, config: uvicorn.Config, *, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce
        self._heap_trimmer = HeapTrimmer()

    async def on_tick(self, counter: int) -> bool:
        """What uvicorn does, and now and then a look at the memory: in a thread, for it may take some milliseconds."""
        if counter % TICKS_BETWEEN_LOOKS == TICKS_BETWEEN_LOOKS - 1:
            await asyncio.to_thread(self._heap_trimmer.trim_if_idle)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, then say so."""
        configure_malloc()
        raise_open_file_limit()
        await super().startup(sockets=sockets)
        if self.started:
            self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM; unlike uvicorn's own, do not raise them again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
