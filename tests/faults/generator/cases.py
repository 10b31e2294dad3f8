"""Cases: every pair of layer and operation with all that observes it; each follows from the seed and a number."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from tests.faults.generator.disk_cases import OBSERVERS, Shelf, kinds_for, run_disk_case
from tests.faults.generator.http_cases import OBSERVERS as HTTP_OBSERVERS
from tests.faults.generator.http_cases import Network, run_http_case
from tests.faults.generator.job_cases import JobShelf, run_job_case
from tests.faults.generator.judging import Verdict
from tests.faults.generator.layers import (
    CACHE_PATTERNS,
    CHECKPOINT,
    DISK_PATTERNS,
    HTTP_LAYERS,
    JOB_LAYERS,
    RESUMED_LAYERS,
    pairs,
    right_codes,
)
from tests.faults.generator.raw_cases import TokenServer, run_raw_case
from tests.faults.generator.readers import Place, Server
from tests.faults.generator.trainer_cases import (
    CACHE_OBSERVERS,
    CHECKPOINT_OBSERVERS,
    TrainersDisk,
    run_cache_case,
    run_checkpoint_case,
)

RESUME_JOB = "resume job"

RAW = "raw socket"

OFTEN = {"reader": 5, "verify": 3, "server": 2, "client": 2, "cache": 1}
"""How often more a combination is tried whose observer is quick."""

Combination = tuple[str, str, str]
"""Layer, operation, observer."""

_SHELF: Shelf | None = None


class Bench:
    """What cases run on: the stores, shared, and a folder and a server of the worker's own."""

    def __init__(self, folder: Path) -> None:
        global _SHELF
        self.shelf = _SHELF = Shelf(folder / "made")
        self.folder = folder
        self._server: Server | None = None
        self._network: Network | None = None
        self._token_server: TokenServer | None = None

    def make_all(self) -> None:
        """Write every kind of store, before workers are forked."""
        self.shelf.make_all()

    def settle(self, folder: Path) -> None:
        """Take a folder for this process."""
        self.folder = folder
        (folder / "served").mkdir(parents=True, exist_ok=True)
        self.disk = TrainersDisk(folder / "disk", self.shelf)
        self.jobs = JobShelf(folder / "jobs")
        self._server = Server(folder / "served")

    def place(self, number: int) -> Place:
        """Return the place of a case."""
        assert self._server is not None
        return Place(self.folder, number, self._server)

    def network(self) -> Network:
        """Return the servers of every version and the proxy, started when they are first needed."""
        if self._network is None:
            self._network = Network(self.folder / "versions", self.shelf)
        return self._network

    def token_server(self) -> TokenServer:
        """Return the server that asks for a token, started when it is first needed."""
        if self._token_server is None:
            self._token_server = TokenServer(self.folder / "with-token", self.shelf)
        return self._token_server

    def close(self) -> None:
        """End the servers."""
        if self._token_server is not None:
            self._token_server.server.close()
        if self._server is not None:
            self._server.close()
        if self._network is not None:
            self._network.close()


@lru_cache
def combinations(only: str = "") -> list[Combination]:
    """Return every combination, in one order; `only` is a regular expression over "layer / operation / observer"."""
    found: list[Combination] = []
    for layer, operation in pairs():
        if layer in DISK_PATTERNS:
            assert _SHELF is not None
            found += [(layer, operation, who) for who in OBSERVERS if kinds_for(_SHELF, layer, who)]
            if layer in RESUMED_LAYERS and layer in _SHELF.kinds_with and operation not in ("exchange replies",):
                found.append((layer, operation, RESUME_JOB))
        elif layer in JOB_LAYERS:
            found.append((layer, operation, RESUME_JOB))
        elif layer in CACHE_PATTERNS:
            found += [(layer, operation, who) for who in CACHE_OBSERVERS if not (who == "distill" and "ids" in layer)]
        elif layer == CHECKPOINT:
            found += [(layer, operation, who) for who in CHECKPOINT_OBSERVERS]
        else:
            if layer == "request: batch":
                found.append((layer, operation, RAW))
            # Training asks for batches by id, never for an epoch's stream.
            found += [(layer, operation, who) for who in HTTP_OBSERVERS if not (who == "distill" and "epoch" in layer)]
    chosen = [entry for entry in found if re.search(only, " / ".join(entry))]
    # Shuffled the same each time, so that any stretch of numbers has something of everything; first each one once.
    order, rng = [*range(len(chosen))], np.random.default_rng(0)
    again = [i for i in order for _ in range(OFTEN.get(chosen[i][2], 0))]
    return [chosen[i] for i in (*rng.permutation(order), *rng.permutation(again))]


def run_case(bench: Bench, seed: int, number: int, layer: str, operation: str, observer: str) -> tuple[Verdict, str]:
    """Run one case; return its verdict and what was done, in words."""
    rng = np.random.default_rng([seed, number])
    verdict = Verdict()
    place = bench.place(number)
    try:
        if observer == RAW:
            told = run_raw_case(bench.token_server(), rng, operation, verdict)
        elif layer in HTTP_LAYERS:
            network = bench.network()
            told = run_http_case(network, bench.shelf, place.cache, rng, layer, operation, observer, verdict)
        elif observer == RESUME_JOB:
            told = run_job_case(bench.jobs, place.aside, rng, layer, operation, verdict)
        elif layer in CACHE_PATTERNS:
            told = run_cache_case(bench.shelf, bench.disk, place, rng, layer, operation, observer, verdict)
        elif layer == CHECKPOINT:
            told = run_checkpoint_case(bench.shelf, bench.disk, place, rng, operation, verdict)
        else:
            told = run_disk_case(bench.shelf, place, rng, layer, operation, observer, verdict)
    finally:
        place.clear()
    verdict.refuse_other_codes(right_codes(layer, operation, observer) | {"reported", "answered", "closed"})
    return verdict, told
