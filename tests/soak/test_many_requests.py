"""Does a server's memory stay flat, however many requests it answers?"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.errors import SoftLabelsError

MOST_GROWTH_MB = 4.0
"""From a tenth of the requests to all of them. The allocator's own arenas move by up to 2 MB from run to run; a leak of
5 bytes a request would be 4.5 MB over 900,000."""


class Visitors:
    """Asks one server in every way that clients do, mostly in the usual one.

    Args:
        served: the server.
        seed: of what is asked for.
    """

    def __init__(self, served: Any, *, seed: int) -> None:
        self._served, self._random = served, np.random.default_rng(seed)
        self._store = softlabels.open(f"{served.url}/small")
        self._raw = http.client.HTTPConnection(served.host, served.port, timeout=30)
        self.count = 0

    def ask_until(self, count: int) -> None:
        """Ask until so many requests were answered since the beginning."""
        while self.count < count:
            turn = self.count % 1_000
            if turn == 0:
                self._come_anew()
            elif turn == 250:
                self._ask_as_people_do()
            elif turn == 500:
                self._ask_for_what_is_not_there()
            elif turn == 750 and self.count % 4_000 == 750:
                self._leave_an_epoch_half_read()
            else:
                ids = self._random.integers(0, 20_000, size=int(self._random.integers(1, 129)))
                assert self._store.batch(ids).ids[-1] == ids[-1]
            self.count += 1

    def close(self) -> None:
        """Close the connections."""
        self._raw.close()

    def _come_anew(self) -> None:
        """A client on a connection of its own, which the server closes or the client does."""
        other = softlabels.open(f"{self._served.url}/large")
        other.batch(self._random.integers(0, 20_000, size=256))

    def _ask_as_people_do(self) -> None:
        document = {"ids": self._random.integers(0, 20_000, size=5).tolist(), "decode": "p"}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._raw.request("POST", "/v1/stores/small/batch", body=json.dumps(document), headers=headers)
        reply = self._raw.getresponse()
        assert len(json.loads(reply.read())["arrays"]["ids"]) == 5

    def _ask_for_what_is_not_there(self) -> None:
        with pytest.raises(SoftLabelsError):
            self._store.batch([20_000 + self.count])
        self._raw.request("GET", f"/v1/stores/none-{self.count}")
        reply = self._raw.getresponse()
        assert (reply.status, reply.read() != b"") == (404, True)

    def _leave_an_epoch_half_read(self) -> None:
        stream = self._store.epoch(seed=self.count, epoch=0, batch_size=512)
        for number, _ in enumerate(stream):
            if number == 20:
                break
        stream.close()


@pytest.fixture
def visitors(serve: Any) -> Iterator[tuple[Visitors, Any]]:
    """Clients of a server, and the server."""
    served = serve()
    with contextlib.closing(Visitors(served, seed=1)) as asking:
        yield asking, served


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(20_000, id="twenty-thousand"),
        pytest.param(1_000_000, id="a-million", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_memory_is_flat_over_many_requests(visitors: tuple[Visitors, Any], requests: int) -> None:
    """After all of them the server holds what it held after a tenth: its own memory, and that with the stores'."""
    asking, served = visitors
    began = time.monotonic()
    found: list[tuple[float, float, int]] = []
    for tenth in range(1, 11):
        asking.ask_until(tenth * requests // 10)
        found.append((served.anonymous_mb(), served.resident_mb(), served.open_files()))
        print(
            f"after {asking.count} requests, {time.monotonic() - began:.0f} s: {found[-1][0]:.1f} MB of its own, "
            f"{found[-1][1]:.1f} MB with mapped files, {found[-1][2]} open files",
            flush=True,
        )
    (own_then, all_then, files_then), (own_now, all_now, files_now) = found[0], found[-1]
    assert own_now - own_then < MOST_GROWTH_MB, found
    assert all_now - all_then < MOST_GROWTH_MB, found
    assert files_now - files_then <= 4, found
