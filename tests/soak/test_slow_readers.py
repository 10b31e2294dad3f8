"""What do readers cost who take an epoch stream at a trickle, or stop taking it, and who else feels it?"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import softlabels

THREADS_MB = 24.0
"""What the pool's forty threads hold of their own, however few readers there are: an arena of the allocator each."""

MOST_MB_A_READER = 0.5
"""A piece of 64 KiB and its copy, what gathers the next, a task, a connection: 0.25 MB in use, 0.33 with holes between,
as measured."""

MOST_MB_A_FAST_READER = 6.0
"""Pieces of 1 MiB: one at the socket, its copy, one made ahead, and what gathers them."""

MOST_GROWTH_MB = 8.0
"""What a server's memory moves by from run to run."""

MOST_GROWTH = 0.15
"""Of what readers cost, from the first third of the time to the rest, while they read on: holes come and go between
what is in use, and are given back when they are many."""

KEPT_MB = 64.0
"""Freed memory that the allocator keeps (`softlabels_server.process.server`); most of the rest is returned in 20 s."""

MOST_STUCK = 0.35
"""Of what the readers cost: holes between what is in use that are smaller than a page cannot be given back."""

MOST_LATENCY_S = 0.5
"""Of anybody's batch meanwhile, 99 of 100: a few ms as measured on a quiet machine. The longest is printed, not judged,
for it is the machine's: another program may have both cores."""

STREAM_BYTES = 20_000 * 1_000 * 2
"""The rows of a whole epoch of the store `large`."""


class SlowReaders:
    """So many streams of one server, opened and hardly read.

    Args:
        served: the server.
        count: of the readers.
    """

    def __init__(self, served: Any, count: int) -> None:
        self._sockets: list[socket.socket] = []
        head = "GET /v1/stores/large/epochs/{}?seed=0&batch_size=1024 HTTP/1.1\r\nHost: x\r\n\r\n"
        for number in range(count):
            reader = socket.socket()
            # Before it connects, so that the kernel takes no more than this for the reader.
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
            reader.settimeout(60)
            reader.connect((served.host, served.port))
            reader.sendall(head.format(number).encode())
            self._sockets.append(reader)

    def read_a_little(self) -> int:
        """Some 10 KB each; how many bytes came in all."""
        return sum(len(reader.recv(64 << 10)) for reader in self._sockets)

    def read_at_least(self, size_bytes: int) -> None:
        """So many bytes each, one reader after the other."""
        for reader in self._sockets:
            left = size_bytes
            while left > 0:
                left -= len(reader.recv(1 << 20))

    def read_to_the_end(self, number: int) -> int:
        """All that still comes to one of them, until the server closes; how many bytes that is."""
        size = 0
        with contextlib.suppress(ConnectionResetError):
            while data := self._sockets[number].recv(1 << 20):
                size += len(data)
        return size

    def close(self) -> None:
        """Go away, in the middle of it all."""
        for reader in self._sockets:
            reader.close()


class Regular:
    """Another client of the same server, which wants its batches now."""

    def __init__(self, served: Any) -> None:
        self._store = softlabels.open(f"{served.url}/small")
        self._ids = np.random.default_rng(3).integers(0, 20_000, size=(64, 256))
        self.latencies_s: list[float] = []

    def ask(self, count: int) -> None:
        """So many batches, timed."""
        for ids in itertools.islice(itertools.cycle(self._ids), count):
            began = time.perf_counter()
            self._store.batch(ids)
            self.latencies_s.append(time.perf_counter() - began)

    def summary(self) -> str:
        """For people."""
        p50, p99 = np.percentile(self.latencies_s, [50, 99]) * 1e3
        return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {max(self.latencies_s) * 1e3:.1f} ms"


@contextlib.contextmanager
def slow_readers(served: Any, count: int) -> Iterator[SlowReaders]:
    """Readers who are gone after the block."""
    with contextlib.closing(SlowReaders(served, count)) as readers:
        yield readers


def wait_for_files(served: Any, count: int) -> None:
    """Until the server has no more files open than that."""
    give_up = time.monotonic() + 60
    while served.open_files() > count:
        assert time.monotonic() < give_up, f"{served.open_files()} files are open, {count} were before"
        time.sleep(0.05)


def settled_mb(served: Any, most_mb: float) -> float:
    """What the server holds once it is no more than that, or after a minute."""
    give_up = time.monotonic() + 60
    while served.anonymous_mb() > most_mb and time.monotonic() < give_up:
        time.sleep(0.5)
    held_mb: float = served.anonymous_mb()
    return held_mb


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize(
    ("count", "rounds", "pause_s"),
    [
        pytest.param(100, 8, 0.1, id="a-hundred"),
        pytest.param(1_000, 120, 1.5, id="a-thousand", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_readers_at_a_trickle(serve: Any, count: int, rounds: int, pause_s: float) -> None:
    """Each costs a bounded piece of memory, which does not grow while they read on; others are served as ever."""
    served = serve()
    regular = Regular(served)
    regular.ask(500)
    alone_mb, files = served.anonymous_mb(), served.open_files()
    print(f"alone: {alone_mb:.1f} MB; a batch takes {regular.summary()}")
    regular.latencies_s.clear()
    found: list[float] = []
    received = 0
    with slow_readers(served, count) as readers:
        for number in range(rounds):
            received += readers.read_a_little()
            regular.ask(20)
            time.sleep(pause_s)
            found.append(served.anonymous_mb())
            if number % 10 == 0 or number == rounds - 1:
                each_kb = received / count / 1e3
                print(f"{count} readers, {each_kb:.0f} KB each: {found[-1]:.1f} MB; a batch takes {regular.summary()}")
    wait_for_files(served, files)
    regular.ask(100)
    most_mb = alone_mb + KEPT_MB + MOST_STUCK * (max(found) - alone_mb)
    after_mb = settled_mb(served, most_mb)
    print(f"when they are gone: {after_mb:.1f} MB, {served.open_files()} open files")
    assert received / count > 10_000 * rounds, "they hardly read at all"
    assert max(found) - alone_mb < count * MOST_MB_A_READER + MOST_GROWTH_MB, found
    first_third_mb = max(found[: rounds // 3]) - alone_mb
    assert max(found) - alone_mb < first_third_mb * (1 + MOST_GROWTH) + MOST_GROWTH_MB, found
    assert after_mb <= most_mb
    assert np.percentile(regular.latencies_s, 99) < MOST_LATENCY_S, regular.summary()


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize(
    ("count", "timeout_s", "herds"),
    [
        pytest.param(50, 0.8, 2, id="fifty"),
        pytest.param(1_000, 30.0, 3, id="a-thousand", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_readers_who_stop_are_dropped(serve: Any, count: int, timeout_s: float, herds: int) -> None:
    """After `stall_timeout_s`: their streams are cut, their sockets closed, and the next herd needs no more memory."""
    served = serve("--stall-timeout", timeout_s)
    regular = Regular(served)
    regular.ask(500)
    alone_mb, files = served.anonymous_mb(), served.open_files()
    peaks: list[float] = []
    for _ in range(herds):
        with slow_readers(served, count) as readers:
            readers.read_a_little()
            assert served.open_files() > files + count / 2, "they were dropped before their time"
            time.sleep(timeout_s / 4)
            peaks.append(served.anonymous_mb())
            wait_for_files(served, files)
            assert readers.read_to_the_end(0) < STREAM_BYTES / 2
    regular.ask(100)
    most_mb = alone_mb + KEPT_MB + MOST_STUCK * (max(peaks) - alone_mb)
    after_mb = settled_mb(served, most_mb)
    shown = ", ".join(f"{peak:.0f}" for peak in peaks)
    print(f"alone {alone_mb:.0f} MB; with {count} each time {shown} MB; when all are dropped {after_mb:.0f} MB")
    assert max(peaks) - alone_mb < count * MOST_MB_A_READER + THREADS_MB
    assert peaks[-1] - max(peaks[:-1]) < MOST_GROWTH_MB + 0.05 * count
    assert after_mb <= most_mb
    assert np.percentile(regular.latencies_s, 99) < MOST_LATENCY_S, regular.summary()
    assert "ERROR" not in served.log.read_text(), "dropping a reader was the plan"


def test_readers_who_were_fast_and_stop(serve: Any) -> None:
    """Whoever has shown that it reads is gathered ahead for, in large pieces: it costs those when it stops, no more."""
    served = serve()
    Regular(served).ask(500)
    alone_mb = served.anonymous_mb()
    with slow_readers(served, 10) as readers:
        readers.read_at_least(12 << 20)
        time.sleep(0.5)
        each_mb = (served.anonymous_mb() - alone_mb) / 10
    print(f"{each_mb:.1f} MB each")
    assert each_mb < MOST_MB_A_FAST_READER


def test_a_reader_who_comes_back_goes_on(serve: Any) -> None:
    """The public client was dropped while its trainer did something else: it connects again and loses no row."""
    served = serve("--stall-timeout", 0.5)
    with softlabels.open(f"{served.url}/large") as store, store.epoch(seed=1, epoch=0, batch_size=512) as stream:
        seen = next(stream).ids.tolist()
        files = served.open_files()
        time.sleep(1.0)
        wait_for_files(served, files - 1)
        for targets in stream:
            seen += targets.ids.tolist()
    assert sorted(seen) == list(range(20_000))
