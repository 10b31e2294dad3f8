"""A network that cuts, delays, truncates and corrupts: no row wrong, lost or doubled. Killed servers: `tests/soak`."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import softlabels
from softlabels.errors import DamageError, ServerUnreachableError, SoftLabelsError, StoreChangedError
from softlabels.target_store import TargetStore
from softlabels_client import HttpRows, RetryPolicy

PATIENT = RetryPolicy(attempts=40, attempts_at_first=40, first_pause_s=0.002, longest_pause_s=0.02)


class FaultyProxy:
    """Hands bytes on between clients and a server, and does to the server's what a bad network does.

    Args:
        port: of the server.
        seed: of the faults.
        kinds: of faults: cut, delay, truncate, corrupt.
        mean_bytes: how many bytes pass between two faults, on average.
    """

    def __init__(self, port: int, *, seed: int, kinds: tuple[str, ...], mean_bytes: float) -> None:
        self.faults = 0
        self._target, self._kinds, self._mean = port, kinds, mean_bytes
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """End every connection, once no new one can come."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = None
                with contextlib.suppress(OSError):
                    far = socket.create_connection(("127.0.0.1", self._target))
                if far is None:
                    near.close()  # the server is gone
                    continue
                self._open += [near, far]
                for source, sink, faulty in ((near, far, False), (far, near, True)):
                    self._threads.append(threading.Thread(target=self._copy, args=(source, sink, faulty)))
                    self._threads[-1].start()

    def _copy(self, source: socket.socket, sink: socket.socket, faulty: bool) -> None:
        until_fault = self._random.expovariate(1 / self._mean)
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                until_fault -= len(data)
                if faulty and until_fault < 0:
                    until_fault = self._random.expovariate(1 / self._mean)
                    self.faults += 1
                    kind = self._random.choice(self._kinds)
                    if kind == "cut":
                        break
                    if kind == "truncate":
                        sink.sendall(data[: self._random.randrange(len(data))])
                        break
                    if kind == "delay":
                        time.sleep(self._random.uniform(0, 0.02))
                    else:
                        data = self._corrupted(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _corrupted(self, data: bytes) -> bytes:
        """One byte another than it was, in what says how the rows are to be read; a checksum is TCP's business."""
        places = [match.start() for match in re.finditer(rb"[a-zA-Z0-9]", data[:1024])]
        spoilt = bytearray(data)
        spoilt[self._random.choice(places or [0])] ^= 1 << self._random.randrange(7)
        return bytes(spoilt)


@contextlib.contextmanager
def proxied(url: str, **faults: object) -> Iterator[tuple[str, FaultyProxy]]:
    """The same store through a proxy, and the proxy."""
    port = int(re.search(r":(\d+)/", url).group(1))  # type: ignore[union-attr]
    proxy = FaultyProxy(port, **faults)  # type: ignore[arg-type]
    try:
        yield url.replace(f":{port}/", f":{proxy.port}/"), proxy
    finally:
        proxy.close()


def patiently_opened(url: str, timeout_s: float = 2.0, retry: RetryPolicy = PATIENT) -> TargetStore:
    """A store through a bad network; opening may take several attempts, for a spoilt description is refused."""
    for _ in range(200):
        try:
            return TargetStore(HttpRows(url, timeout_s=timeout_s, retry=retry), where=url)
        except SoftLabelsError:
            continue
    pytest.fail("the store could not be opened")


def go_through(url: str, near: TargetStore, *, batches: int, again: Callable[[], TargetStore]) -> tuple[int, int]:
    """Read epochs until so many batches came; returns how many, and how often it had to begin again at a cursor."""
    expected = near.batch(np.arange(len(near))).encoded["targets"]
    store, count, resumed, epoch = again(), 0, 0, 0
    while count < batches:
        seen: list[int] = []
        cursor = 0
        while cursor < len(near):
            stream = store.epoch(seed=5, epoch=epoch, batch_size=7, cursor=cursor)
            try:
                for targets in stream:
                    np.testing.assert_array_equal(targets.encoded["targets"], expected[targets.ids])
                    seen += targets.ids.tolist()
                    count += 1
            except (DamageError, ServerUnreachableError, StoreChangedError, SoftLabelsError):
                resumed += 1
                store = again()
            finally:
                cursor = stream.cursor
                stream.close()
        assert sorted(seen) == list(range(len(near))), "an epoch lost a row or had one twice"
        epoch += 1
    return count, resumed


def ask_often(store: TargetStore, times: int) -> None:
    """The same batch again and again."""
    for _ in range(times):
        store.batch(np.arange(16))


class TestCutsAndDelays:
    def test_an_epoch_goes_on_by_itself(self, served_store: str, tiny_store: Path) -> None:
        """Cut, truncated and delayed: every epoch has exactly its rows, and the caller notices nothing."""
        near = softlabels.open(tiny_store)
        with proxied(served_store, seed=1, kinds=("cut", "delay", "truncate"), mean_bytes=15_000) as (url, proxy):
            store = patiently_opened(url)
            count, resumed = go_through(url, near, batches=600, again=lambda: store)
        assert resumed == 0
        assert proxy.faults > 8, proxy.faults
        assert count >= 600

    def test_batches_are_whole_or_an_error(self, served_store: str, tiny_store: Path) -> None:
        """Asked by id, through the same network."""
        near = softlabels.open(tiny_store)
        expected = near.batch(np.arange(200)).encoded["targets"]
        rng = np.random.default_rng(0)
        with proxied(served_store, seed=2, kinds=("cut", "delay", "truncate"), mean_bytes=20_000) as (url, proxy):
            store = patiently_opened(url)
            for _ in range(300):
                ids = rng.integers(0, 200, size=16)
                np.testing.assert_array_equal(store.batch(ids).encoded["targets"], expected[ids])
        assert proxy.faults > 3


class TestErrors:
    def test_one_that_is_over_holds_no_connection_open(self, served_store: str) -> None:
        """Retried or raised, it does not name what named it: a store that is let go of closes its sockets at once."""
        gc.disable()
        try:
            with proxied(served_store, seed=6, kinds=("cut", "truncate"), mean_bytes=10_000) as (url, proxy):
                patient = patiently_opened(url)
                hasty = patiently_opened(url, retry=RetryPolicy(attempts=1, attempts_at_first=1))
                ask_often(patient, 100)
                assert proxy.faults > 3
                with pytest.raises(SoftLabelsError):
                    ask_often(hasty, 1_000)
                left = [weakref.ref(patient), weakref.ref(hasty)]
                del patient, hasty
            assert [reference() for reference in left] == [None, None]
        finally:
            gc.enable()


class TestCorruption:
    def test_a_spoilt_header_or_id_never_gives_a_wrong_row(self, served_store: str, tiny_store: Path) -> None:
        """Flipped bits in heads and headers: refused and asked for again, or an error; never another row."""
        near = softlabels.open(tiny_store)
        with proxied(served_store, seed=3, kinds=("corrupt",), mean_bytes=8_000) as (url, proxy):
            count, _ = go_through(url, near, batches=300, again=lambda: patiently_opened(url))
        assert proxy.faults > 3
        assert count >= 300


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_a_hundred_thousand_batches(served_store: str, tiny_store: Path) -> None:
    """All faults together, for long; `SOFTLABELS_SOAK_BATCHES` sets another number."""
    batches = int(os.environ.get("SOFTLABELS_SOAK_BATCHES", "100000"))
    near = softlabels.open(tiny_store)
    kinds = ("cut", "delay", "truncate", "corrupt")
    with proxied(served_store, seed=4, kinds=kinds, mean_bytes=50_000) as (url, proxy):
        count, resumed = go_through(url, near, batches=batches, again=lambda: patiently_opened(url))
    print(f"{count} batches, {proxy.faults} faults, begun again {resumed} times")
    assert count >= batches
