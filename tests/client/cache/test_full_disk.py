"""Full disks that are real: a small tmpfs and a file-size limit stop caching, and never the trainer."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TRAINER = textwrap.dedent(
    """
    import logging
    import resource
    import sys
    from pathlib import Path
    import numpy as np
    from softlabels.store import LocalRows
    from softlabels.target_store import TargetStore
    from softlabels_client.cache import CachedRows

    root, folder, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    near = TargetStore(LocalRows(root), where="near")
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for _ in range(2):
        with TargetStore(CachedRows(LocalRows(root), folder=folder), where="cached") as cached:
            for epoch in range(2):
                plan = {"seed": 1, "epoch": epoch, "batch_size": 9}
                for ours, theirs in zip(cached.epoch(**plan), near.epoch(**plan), strict=True):
                    assert np.array_equal(ours.ids, theirs.ids)
                    assert np.array_equal(ours.encoded["targets"], theirs.encoded["targets"])
            ids = near.ids()[::-1]
            assert np.array_equal(cached.batch(ids).encoded["targets"], near.batch(ids).encoded["targets"])
    print("trained on")
    """
)


def train(root: Path, folder: Path, *before: str, limit: int = 0) -> str:
    """Read a store through a cache in a process of its own; return what it said."""
    command = [*before, sys.executable, "-c", TRAINER, str(root), str(folder), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "mount: " in done.stderr or "unshare: " in done.stderr:
        pytest.skip("mounting a small tmpfs is not permitted here")
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    assert done.stdout.endswith("trained on\n")
    return done.stdout


@pytest.mark.parametrize("kind", ["dense", "strings"])
@pytest.mark.parametrize("room_kib", [4, 8, 12, 16, 64])
def test_a_full_tmpfs(kind: str, room_kib: int, stores: dict[str, Path], tmp_path: Path) -> None:
    """Whatever it still had room for: a hole that is read through a map would end the process by SIGBUS."""
    mount = f'mount -t tmpfs -o size={room_kib}k none {tmp_path} && exec "$@"'
    said = train(stores[kind], tmp_path / "cache", "unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if room_kib in (4, 64):
        assert ("No space left" in said) is (room_kib == 4)


@pytest.mark.parametrize("kind", ["dense", "strings"])
@pytest.mark.parametrize("limit", [500, 2500, 5000, 100_000])
def test_a_limit_on_the_size_of_files(kind: str, limit: int, stores: dict[str, Path], tmp_path: Path) -> None:
    """The same where files may not grow; the rows that fit are kept."""
    said = train(stores[kind], tmp_path / "cache", limit=limit)
    assert ("File too large" in said) is (limit < 100_000)
    assert said.count("WARNING") <= 2  # once each time that the cache is opened
