"""How do several processes answer on one port? A parent holds the listener, starts workers, starts dead ones again.

All workers accept from the one listening socket, and the parent never closes it: a connection that waits while a worker
dies is taken by another, where with SO_REUSEPORT it would be reset. Whoever is idle accepts first, so connections that
come together spread better too (measured in docs/operations.md). The parent opens no connection and no store's rows.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from softlabels.errors import RequestError, WorkerDiedError
from softlabels_server.api.app import create_app
from softlabels_server.catalog import StoreFolder
from softlabels_server.process.server import make_server, set_up_logging
from softlabels_server.settings import Settings

SHORT_LIFE_S = 10.0
"""A worker that died sooner would probably die again at once."""

PAUSE_S = 1.0
"""How long the place of such a worker stays empty."""

_STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(kw_only=True)
class _Slot:
    """One worker's place: the process that fills it now, or when it is filled again."""

    number: int
    process: SpawnProcess | None = None
    ready: Connection | None = None
    began_s: float = 0.0
    due_s: float = 0.0
    has_answered: bool = False


class WorkerSupervisor:
    """Processes that answer on one listening socket until this one is told to stop.

    Args:
        root: folder of the stores; every worker opens them itself.
        settings: of each; `workers` is how many.
        listener: listens already; closed by the caller.
        announce: called once, when all of them answer.
        say: called with a line when one ended and is started again.
    Raises:
        RequestError: more than one worker where there are no POSIX signals.
    """

    def __init__(
        self,
        root: Path,
        settings: Settings,
        listener: socket.socket,
        *,
        announce: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        if os.name != "posix":
            raise RequestError("several workers need POSIX signals: run with --workers 1 on this system")
        self._root, self._settings, self._listener = root, settings, listener
        self._announce, self._say = announce, say
        # Not forked: whoever calls this may have threads and mapped stores, and locks of either do not survive a fork.
        self._context = multiprocessing.get_context("spawn")
        self._places = [_Slot(number=number + 1) for number in range(settings.workers)]
        self._is_announced = False
        self._signals = 0

    def run(self) -> None:
        """Run them until SIGINT or SIGTERM; replies under way are finished first, a second signal ends them at once.

        Raises:
            WorkerDiedError: a worker ended before all of them answered once.
        """
        # Started now, because starting it unblocks SIGINT, which `_start` blocks.
        resource_tracker.ensure_running()
        with self._signals_caught() as wake:
            try:
                while not self._signals:
                    self._fill()
                    self._wait(wake)
                    self._check_workers()
            finally:
                self._stop(wake)

    def _fill(self) -> None:
        """Start a worker in every empty place whose time has come."""
        for place in self._places:
            if place.process is None and place.due_s <= time.monotonic():
                self._start(place)

    def _start(self, place: _Slot) -> None:
        reader, writer = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work,
            args=(self._root, self._settings, self._listener, writer),
            name=f"softlabels-worker-{place.number}",
        )
        # Ctrl-C reaches every process of a terminal; a worker is to hear of it from its parent alone, or it would be
        # told twice, which means at once. Blocked signals stay blocked in a child, from its first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        writer.close()
        place.process, place.ready, place.began_s = process, reader, time.monotonic()

    def _wait(self, wake: socket.socket) -> None:
        """Sleep until a worker answers or ends, a signal comes, or an empty place is due."""
        awaited: list[Connection | socket.socket | int] = [wake]
        for place in self._places:
            if place.process is not None:
                awaited.append(place.process.sentinel)
            if place.ready is not None:
                awaited.append(place.ready)
        due = [place.due_s for place in self._places if place.process is None]
        wait(awaited, timeout=max(0.0, min(due) - time.monotonic()) if due else None)

    def _check_workers(self) -> None:
        for place in self._places:
            if place.ready is not None and place.ready.poll():
                place.has_answered = place.has_answered or _reported_ready(place.ready)
                place.ready.close()
                place.ready = None
            if place.process is not None and place.process.exitcode is not None and not self._signals:
                self._reap_worker(place, place.process)
        if not self._is_announced and all(place.has_answered for place in self._places):
            self._is_announced = True
            self._announce()

    def _reap_worker(self, place: _Slot, process: SpawnProcess) -> None:
        how = _ending(process.exitcode or 0)
        if not self._is_announced:
            raise WorkerDiedError(
                f"worker {place.number} of {len(self._places)} {how} before it answered: what it printed above says "
                "why; with --workers 1 the server runs in one process"
            )
        lived_s = time.monotonic() - place.began_s
        place.due_s = time.monotonic() + (PAUSE_S if lived_s < SHORT_LIFE_S else 0.0)
        place.process = None
        process.close()
        if place.ready is not None:
            place.ready.close()
            place.ready = None
        self._say(f"worker {place.number} {how} and is started again; its clients connect to the others meanwhile")

    def _stop(self, wake: socket.socket) -> None:
        """Tell them all, wait for them, and end whoever takes too long or was told so twice."""
        processes = [place.process for place in self._places if place.process is not None]
        for process in processes:
            process.terminate()
        told = self._signals
        # Beyond what uvicorn grants replies: it may be importing still.
        give_up_s = time.monotonic() + self._settings.shutdown_timeout_s + 5.0
        while (left := [p for p in processes if p.exitcode is None]) and self._signals <= max(told, 1):
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                break
            _drain(wake)
            wait([wake, *(process.sentinel for process in left)], timeout=left_s)
        for process in processes:
            process.kill()
            process.join()

    @contextmanager
    def _signals_caught(self) -> Iterator[socket.socket]:
        """Count SIGINT and SIGTERM; what this yields can be waited for, and has something to read after each."""
        wake, waker = socket.socketpair()
        with wake, waker:
            wake.setblocking(False)
            waker.setblocking(False)
            before = {number: signal.signal(number, self._note) for number in _STOPPING}
            fd_before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
            try:
                yield wake
            finally:
                signal.set_wakeup_fd(fd_before)
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1


def _work(root: Path, settings: Settings, listener: socket.socket, ready: Connection) -> None:
    """What a worker does: everything that a server of one process does, but for the signs of life."""
    set_up_logging(settings)
    app = create_app(StoreFolder(root), settings)

    def answering() -> None:
        ready.send_bytes(b"ready")
        ready.close()

    server = make_server(app, settings, announce=answering)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by `WorkerSupervisor`"

    def follow() -> None:
        # A parent that was killed cannot tell: without this its workers would hold the port for ever.
        wait([parent.sentinel])
        logging.getLogger(__name__).warning("the process that started this worker is gone: stopping")
        server.should_exit = True

    threading.Thread(target=follow, daemon=True, name="follow-parent").start()
    server.run(sockets=[listener])


def _reported_ready(ready: Connection) -> bool:
    try:
        return ready.recv_bytes(16) == b"ready"
    except EOFError:
        return False  # it ended before


def _drain(wake: socket.socket) -> None:
    try:
        wake.recv(4096)
    except BlockingIOError:
        return


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"
