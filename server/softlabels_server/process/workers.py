"""Supervisor of several serving processes on one port: starts workers, restarts dead ones, stops them all.

All workers accept from one listening socket, which the supervisor never closes: a connection that waits while a worker
dies is accepted by another, where SO_REUSEPORT would reset it. An idle worker accepts first, so simultaneous
connections also spread better (measured in docs/operations.md). docs/adr/0019-server-libraries.md says why this is not
uvicorn's supervisor.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

import msgspec

from softlabels.errors import RequestError, WorkerDiedError
from softlabels_server.api.app import create_app
from softlabels_server.catalog import ScrubState, StoreFolder
from softlabels_server.process.scrub import scrubbing
from softlabels_server.process.server import make_server, set_up_logging, stop_signals_handled_by
from softlabels_server.settings import Settings

SHORT_LIFE_S = 10.0
"""A worker that died sooner would probably die again at once, so it is restarted after a delay."""

RESTART_DELAY_S = 1.0

POLL_S = 0.1
"""Interval between checks of the workers: that of uvicorn's main loop."""

_SIGNALS = {number.value: number.name for number in signal.Signals}


@dataclass
class _Worker:
    """One worker: its process and readiness pipe, or the time of its restart while `process` is None."""

    number: int
    process: SpawnProcess | None = None
    ready: Connection | None = None
    started_s: float = 0.0
    restart_s: float = 0.0
    was_ready: bool = False
    scrub: Connection | None = None


class WorkerSupervisor:
    """Runs worker processes that answer on one listening socket.

    Args:
        root: folder of the stores; each worker opens them itself.
        settings: settings of each worker, `workers` among them.
        listener: listening socket; the caller closes it.
        announce: called once, when all workers answer.
        say: called with a line for the log whenever a worker is restarted.
    Raises:
        RequestError: this system has no POSIX signals.
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
        # Spawned, not forked: the caller may have threads and mapped stores, whose locks do not survive a fork.
        self._context = multiprocessing.get_context("spawn")
        self._workers = [_Worker(number + 1) for number in range(settings.workers)]
        self._is_announced = False
        self._signal_count = 0
        self._scrub_state, self._scrub_lock = b"", threading.Lock()

    def run(self) -> None:
        """Run the workers until SIGINT or SIGTERM, then let replies finish; a second signal ends them at once.

        Raises:
            WorkerDiedError: a worker ended before all of them had answered once.
        """
        # Started now, because its start unblocks SIGINT, which `_start` has to block.
        resource_tracker.ensure_running()
        with (
            stop_signals_handled_by(self._count_signal),
            scrubbing(self._root, self._settings, self._tell_scrub_state),
        ):
            try:
                while not self._signal_count:
                    for worker in self._workers:
                        self._check(worker)
                    if not self._is_announced and all(worker.was_ready for worker in self._workers):
                        self._is_announced = True
                        self._announce()
                    time.sleep(POLL_S)
            finally:
                self._stop()

    def _check(self, worker: _Worker) -> None:
        """Start a worker that is due, note whether it is ready, reap one that ended."""
        process = worker.process
        if process is None:
            if worker.restart_s <= time.monotonic():
                self._start(worker)
            return
        if worker.ready is not None and worker.ready.poll():
            with contextlib.suppress(EOFError):  # it ended before it was ready
                # `recv` would unpickle what it receives, and code of this project reads no pickle.
                worker.was_ready |= worker.ready.recv_bytes(16) == b"ready"
            worker.ready.close()
            worker.ready = None
        # A signal may have gone to every process of the group: a worker that it stopped is not started again.
        if process.exitcode is not None and not self._signal_count:
            self._reap(worker, process)

    def _tell_scrub_state(self, state: ScrubState) -> None:
        """Send the state of the background check to every worker; called in its thread."""
        self._scrub_state = msgspec.json.encode(state)
        for pipe in [worker.scrub for worker in self._workers if worker.scrub is not None]:
            self._send_scrub_state(pipe)

    def _send_scrub_state(self, pipe: Connection) -> None:
        with self._scrub_lock, contextlib.suppress(OSError):  # the worker is gone
            # A worker that does not read must not stop the check: it gets the next state.
            if self._scrub_state and select.select([], [pipe], [], 0)[1]:
                pipe.send_bytes(self._scrub_state)

    def _start(self, worker: _Worker) -> None:
        reader, writer = self._context.Pipe(duplex=False)
        scrub_reader, scrub_writer = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_serve,
            args=(self._root, self._settings, self._listener, writer, scrub_reader),
            name=f"softlabels-worker-{worker.number}",
        )
        # Ctrl-C reaches every process of a terminal. A worker must be stopped by the supervisor alone: a second signal
        # means to stop at once. Signals blocked here stay blocked in the child from its start.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # The worker now holds the only write end, so its death closes the pipe and `poll` reports it.
        writer.close()
        scrub_reader.close()
        worker.scrub = scrub_writer
        self._send_scrub_state(scrub_writer)
        worker.process, worker.ready, worker.started_s = process, reader, time.monotonic()

    def _reap(self, worker: _Worker, process: SpawnProcess) -> None:
        code = process.exitcode or 0
        how = f"ended with exit code {code}" if code >= 0 else f"was ended by {_SIGNALS.get(-code, f'signal {-code}')}"
        if not self._is_announced:
            raise WorkerDiedError(
                f"worker {worker.number} of {len(self._workers)} {how} before it answered: its output above says why; "
                "with --workers 1 the server runs in one process"
            )
        now = time.monotonic()
        worker.restart_s = now + (RESTART_DELAY_S if now - worker.started_s < SHORT_LIFE_S else 0.0)
        worker.process = None
        worker.scrub = None  # and not closed: another thread may be writing to it
        process.close()
        self._say(f"worker {worker.number} {how} and is started again; its clients connect to the others meanwhile")

    def _stop(self) -> None:
        """Stop all workers: terminate them, wait, and kill those that take too long or if a second signal comes."""
        processes = [worker.process for worker in self._workers if worker.process is not None]
        for process in processes:
            process.terminate()
        signals_before = max(self._signal_count, 1)
        # Longer than uvicorn waits for its replies, since a worker may still be importing.
        deadline_s = time.monotonic() + self._settings.shutdown_timeout_s + 5.0
        while any(process.exitcode is None for process in processes):
            if self._signal_count > signals_before or time.monotonic() > deadline_s:
                break
            time.sleep(POLL_S)
        for process in processes:
            process.kill()
            process.join()

    def _count_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal_count += 1


def _serve(
    root: Path, settings: Settings, listener: socket.socket, ready: Connection, scrub_states: Connection
) -> None:
    set_up_logging(settings)
    stores = StoreFolder(root)
    app = create_app(stores, settings)

    def report_ready() -> None:
        ready.send_bytes(b"ready")
        ready.close()

    server = make_server(app, settings, announce=report_ready)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by WorkerSupervisor"

    def follow_parent() -> None:
        # A supervisor that was killed cannot stop its workers: without this they would hold the port for ever.
        wait([parent.sentinel])
        logging.getLogger(__name__).warning("the process that started this worker is gone: stopping")
        server.should_exit = True

    def follow_scrub() -> None:
        with contextlib.suppress(EOFError):
            while True:
                stores.note_scrub(msgspec.json.decode(scrub_states.recv_bytes(), type=ScrubState))

    threading.Thread(target=follow_scrub, daemon=True, name="follow-scrub").start()
    # A daemon: it waits for as long as the parent lives, and must not keep a stopped worker from exiting.
    threading.Thread(target=follow_parent, daemon=True, name="follow-parent").start()
    server.run(sockets=[listener])
