"""Two writers at once: one owner of each shard, never a mixture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.store.store_reader import LocalRows
from softlabels.store.verify import verify

RACES = 50
Tree = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="module")
def rival(make_fork_server: Callable[..., Any]) -> Any:
    """A second fork server."""
    return make_fork_server()


@pytest.fixture
def race(
    fork_server: Any, rival: Any, stopped: Callable[[int], None], go_on: Callable[[int], None]
) -> Callable[..., Any]:
    """Runs two tasks from the same moment on; their exit codes and what they reported."""

    def run(first: dict[str, Any], second: dict[str, Any], *, turned: bool) -> list[tuple[int, str]]:
        pids = [fork_server.start(wait=True, **first), rival.start(wait=True, **second)]
        for pid in pids:
            stopped(pid)
        for pid in reversed(pids) if turned else pids:
            go_on(pid)
        return [(runner.wait(), runner.said()) for runner in (fork_server, rival)]

    return run


@pytest.mark.parametrize("kind_name", ["zarr", "hdf5", "zarr-sequences"])
class TestOneShard:
    def test_two_writers_that_disagree(
        self, race: Callable[..., Any], kind_of: Callable[..., Any], tmp_path: Path, kind_name: str
    ) -> None:
        """50 races over one shard with different contents: one owner, the other is told."""
        won = [0, 0]
        for number in range(RACES):
            root = tmp_path / "s"
            shutil.rmtree(root, ignore_errors=True)
            tasks = [{"do": "race", "root": root, "kind": kind_name, "seed": seed, "shard": 1} for seed in (0, 1)]
            (code, said), (other_code, other_said) = race(*tasks, turned=bool(number % 2))
            assert sorted((code, other_code)) == [0, 3], (said, other_said)
            assert (said + other_said).split(":")[0] in ("ShardClaimedError", "ShardConflictError")
            winner = 0 if code == 0 else 1
            won[winner] += 1
            assert {fault.kind for fault in verify(root, every_fault=True).faults} == {"unfinished"}
            span = range(32, min(64, kind_of(kind_name).plan.rows))
            expected = kind_of(kind_name, seed=winner).contents(span)["encoded"]["targets"]
            found = LocalRows(root).fetch_rows(np.arange(span.start, span.stop), ("targets",))["targets"]
            np.testing.assert_array_equal(found, expected)
        print(f"{kind_name}: the first writer owned {won[0]} shards, the second {won[1]}")

    def test_two_writers_of_the_whole_store(
        self,
        race: Callable[..., Any],
        fork_server: Any,
        undisturbed: Callable[[str], Path],
        tmp_path: Path,
        tree: Tree,
        kind_name: str,
    ) -> None:
        """Two runs of one job at once, from creation to publication: together or alone they make the same store."""
        for number in range(RACES // 2):
            root = tmp_path / "s"
            shutil.rmtree(root, ignore_errors=True)
            task = {"do": "write", "root": root, "kind": kind_name}
            for code, said in race(task, task, turned=bool(number % 2)):
                assert code in (0, 3), said
                assert code == 0 or said.startswith(("ShardClaimedError", "TruncatedError")), said
            assert fork_server.run("write", root=root, kind=kind_name) == 0, fork_server.said()
            assert tree(root) == tree(undisturbed(kind_name))
            assert verify(root).sound


class TestRepairBesideAWriter:
    def test_a_repair_while_shards_are_written(
        self, race: Callable[..., Any], fork_server: Any, undisturbed: Callable[[str], Path], tmp_path: Path, tree: Tree
    ) -> None:
        """Neither harms the other: the store ends as an undisturbed one."""
        for number in range(RACES // 2):
            root = tmp_path / "s"
            shutil.rmtree(root, ignore_errors=True)
            assert fork_server.run("race", root=root, kind="hdf5", seed=0, shard=2) == 0, fork_server.said()
            raw = bytearray((root / "shards" / "00000002.h5").read_bytes())
            raw[len(raw) // 2] ^= 1
            (root / "shards" / "00000002.h5").write_bytes(raw)
            write = {"do": "write", "root": root, "kind": "hdf5"}
            (_, _), (code, said) = race({"do": "repair", "root": root}, write, turned=bool(number % 2))
            assert code in (0, 3), said
            assert fork_server.run("repair", root=root) == 0, fork_server.said()
            assert fork_server.run("write", root=root, kind="hdf5") == 0, fork_server.said()
            assert tree(root) == tree(undisturbed("hdf5"))
