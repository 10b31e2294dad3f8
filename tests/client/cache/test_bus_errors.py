"""Full disks and files that are cut while they are read: the signal SIGBUS, which says nothing, ends no trainer."""

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


CUTTER = textwrap.dedent(
    """
    import sys
    from pathlib import Path

    while True:
        try:
            for path in Path(sys.argv[1]).glob("rows-v2/*/*"):
                if path.name in ("rows", "index", "ids"):
                    content = path.read_bytes()
                    with path.open("r+b") as file:
                        file.truncate(0)
                        file.write(content)
        except FileNotFoundError:  # the table is made anew
            pass
    """
)

READER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import numpy as np
    from softlabels.store import LocalRows
    from softlabels.target_store import TargetStore
    from softlabels_client.cache import CachedRows

    root, folder = Path(sys.argv[1]), Path(sys.argv[2])
    near = TargetStore(LocalRows(root), where="near")
    ids = near.ids()
    expected = near.batch(ids)
    for _ in range(int(sys.argv[3])):
        with TargetStore(CachedRows(LocalRows(root), folder=folder), where="cached") as cached:
            for _ in range(12):
                found = cached.batch(ids)
                assert np.array_equal(found.encoded["targets"], expected.encoded["targets"])
            for step in cached.epoch(seed=1, epoch=0, batch_size=40):
                assert np.array_equal(step.encoded["targets"], near.batch(step.ids).encoded["targets"])
    print("read on")
    """
)


@pytest.mark.parametrize("kind", ["dense", "strings"])
def test_files_that_are_cut_while_they_are_read(kind: str, stores: dict[str, Path], tmp_path: Path) -> None:
    """By another process, again and again, in the moment between the check of a size and the read: rows stay right."""
    cutter = subprocess.Popen([sys.executable, "-c", CUTTER, str(tmp_path / "cache")])
    try:
        command = [sys.executable, "-c", READER, str(stores[kind]), str(tmp_path / "cache"), "50"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert cutter.poll() is None, "the process that cuts files ended"
    finally:
        cutter.kill()
        cutter.wait()
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    assert done.stdout == "read on\n"
