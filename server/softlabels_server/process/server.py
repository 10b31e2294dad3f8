"""One serving process: listening socket, uvicorn's configuration, signals and heap memory."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import mmap
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from softlabels.errors import PortInUseError, RequestError
from softlabels_server.fast_path.protocol import make_protocol
from softlabels_server.settings import Settings

TICKS_PER_TRIM = 100
"""uvicorn ticks ten times a second, so the heap is checked every 10 s."""

BACKLOG = 2048
"""Connections that may wait to be accepted: uvicorn's own default."""

KEPT_BYTES = 64 << 20
"""Free memory that the process keeps at the end of its heap."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h: parameters of `mallopt`

MAX_HEAP_BLOCK_BYTES = 16 << 20
"""Blocks up to this size come from the heap; glibc accepts no more than 32 MiB."""

_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def listen(settings: Settings) -> socket.socket:
    """Return a socket that listens on the address in the settings.

    Raises:
        PortInUseError: another process listens there.
        RequestError: the address is not this machine's, or not allowed.
    """
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # Sets SO_REUSEADDR on POSIX, so a restarted server gets its port although old connections are in TIME_WAIT.
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
    """Return a server of this application; `run(sockets=[listener])` runs it until SIGTERM or Ctrl-C.

    `announce` is called once, when requests are being answered.
    """
    config = uvicorn.Config(
        app,
        http=make_protocol(header_timeout_s=settings.header_timeout_s, token=settings.token),
        ws="none",
        lifespan="on",
        log_config=None,  # logging is configured by the caller
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
    """Allow this process as many open files, and so connections, as the system's hard limit."""
    # Shells start with a soft limit of 1,024, for programs that still use `select`; a stream needs two descriptors.
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
    """uvicorn's server that exits without an error on SIGTERM and Ctrl-C; arguments as in `make_server`."""

    def __init__(self, config: uvicorn.Config, *, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce
        self._heap_trimmer = HeapTrimmer()

    async def on_tick(self, counter: int) -> bool:
        """Trim the heap every `TICKS_PER_TRIM` ticks, in a thread since it takes milliseconds."""
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

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Stop on SIGINT and SIGTERM. uvicorn raises them again afterwards, which would end the process by a signal."""
        # Python allows only the main thread to set signal handlers.
        is_main = threading.current_thread() is threading.main_thread()
        return stop_signals_handled_by(self.handle_exit) if is_main else contextlib.nullcontext()


@contextlib.contextmanager
def stop_signals_handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call the handler on SIGINT and SIGTERM; restore the handlers before it at the end."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def configure_malloc() -> bool:
    """Make the allocator keep freed blocks of a reply's size; return whether it can.

    By default glibc returns a large block to the system as soon as it is freed. A server that gathers half a megabyte a
    hundred times a second then has every page of it mapped and zeroed each time: half of a batch's cost, measured.
    """
    mallopt = getattr(_C_LIBRARY, "mallopt", None)
    if mallopt is None:
        return False  # a C library other than glibc
    return bool(mallopt(_M_MMAP_THRESHOLD, MAX_HEAP_BLOCK_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))


class _Mallinfo(ctypes.Structure):  # malloc.h: `struct mallinfo2`
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


class HeapTrimmer:
    """Returns freed memory to the system if much of it stays unused.

    A thousand streams that end leave holes all over the heap, which glibc alone never returns: it trims only the top.
    """

    def __init__(self) -> None:
        self._was_large = False
        self._stuck_bytes = 0
        self._describe = getattr(_C_LIBRARY, "mallinfo2", None)  # glibc 2.33
        if self._describe is not None:
            self._describe.restype = _Mallinfo

    def trim_if_idle(self) -> bool:
        """Trim if more than `KEPT_BYTES` are free now and were at the last call; return whether it trimmed."""
        if self._describe is None or _C_LIBRARY is None:
            return False
        found = self._describe()
        # mallinfo counts pages already returned as free, so resident memory has to be compared too. Holes smaller than
        # a page are never returned; without subtracting what stayed last time, every other call would trim in vain.
        used_bytes = found.uordblks + found.hblkhd
        idle_bytes = max(0, _resident_bytes() - used_bytes)
        self._stuck_bytes = min(self._stuck_bytes, idle_bytes)
        # Twice in a row, since memory that is free only between two bursts of batches is about to be used again.
        is_large = min(found.fordblks, idle_bytes - self._stuck_bytes) > KEPT_BYTES
        must_trim, self._was_large = is_large and self._was_large, is_large
        if not must_trim:
            return False
        _C_LIBRARY.malloc_trim(ctypes.c_size_t(0))
        self._stuck_bytes = max(0, _resident_bytes() - used_bytes)
        return True


def _resident_bytes() -> int:
    """Return this process's resident memory without mapped files."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * mmap.PAGESIZE
