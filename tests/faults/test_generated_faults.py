"""Generated faults: the table is whole, and no case of some thousands returns a wrong row or loses one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from softlabels_server import Settings, StoreFolder, create_app
from tests.faults.generator.cases import Bench, combinations
from tests.faults.generator.judging import WRONG
from tests.faults.generator.layers import HTTP_LAYERS, LAYERS, OPERATIONS, ROUTES_WITHOUT_ROWS, not_applicable, pairs
from tests.faults.generator.network import kind_of
from tests.faults.generator.run import report, run, untried
from tests.faults.generator.trainer_cases import unlisted

COUNT = 6_000
"""Every combination of layer, operation and observer once, and those with a quick observer more often: minutes."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Every kind of store, written."""
    made = Bench(tmp_path_factory.mktemp("bench"))
    made.make_all()
    made.settle(made.folder)
    return made


class TestTable:
    def test_every_file_of_a_store_is_in_a_layer(self, bench: Bench) -> None:
        """A new file of the format fails here until the table knows it; one in no layer raises."""
        assert set(bench.shelf.kinds_with) <= set(LAYERS)

    def test_every_file_of_a_cache_is_in_a_layer(self, bench: Bench) -> None:
        """Locks aside, which hold no bytes."""
        assert list(unlisted(bench.disk)) == []

    def test_every_route_is_a_layer(self, tmp_path: Path) -> None:
        """Or it is listed with the reason why nothing rests on its replies."""
        (tmp_path / "stores").mkdir()
        app = create_app(StoreFolder(tmp_path / "stores"), Settings())
        for path in (*app.openapi()["paths"], "/openapi.json"):
            if path not in ROUTES_WITHOUT_ROWS:
                assert f"reply: {kind_of(path)}" in HTTP_LAYERS, path

    def test_every_pair_has_a_case(self, bench: Bench) -> None:
        """A pair of layer and operation that nothing tries is one that nobody knows about."""
        assert bench.shelf.kinds_with
        tried = {(layer, operation) for layer, operation, _ in combinations()}
        assert set(pairs()) - tried == set()

    def test_a_pair_is_left_out_for_a_reason_only(self) -> None:
        """In words."""
        for layer in LAYERS:
            for operation in OPERATIONS:
                reason = not_applicable(layer, operation)
                assert (layer, operation) in pairs() or (reason is not None and len(reason) > 20)


def test_thousands_of_faults() -> None:
    """Each is right, refused with a code that names the layer, or harmless for a reason."""
    seed = int(os.environ.get("SOFTLABELS_FAULT_SEED", time.time_ns() % 2**32))
    count = int(os.environ.get("SOFTLABELS_FAULT_COUNT", COUNT))
    began = time.monotonic()
    results = run(count, seed)
    print(report(results, seed, time.monotonic() - began))
    assert [result for result in results if result.outcome == WRONG] == []
    assert len(results) == count
    assert untried(results) == []
