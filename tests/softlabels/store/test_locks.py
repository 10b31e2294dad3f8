"""Locks of a store: a holder that does not let go is named, waits end, and a merge writes under the lock."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softlabels.cli import main
from softlabels.documents import seal
from softlabels.errors import DamageError, ShardClaimedError, StoreLockedError
from softlabels.store import StoreWriter
from softlabels.store.copies import merge
from softlabels.store.ledger import LOCK_WAIT_S, lock_wait

HOLDER = """
import sys, time
from pathlib import Path
from softlabels.store import StoreWriter

writer = StoreWriter.resume(Path(sys.argv[1]))
with writer.ledger.exclusive(), writer.claim(0):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def stopped(tmp_path: Path, source: Any) -> Iterator[tuple[Path, int]]:
    """An unfinished store, and the number of a stopped process that holds its lock and its first shard."""
    source.write(tmp_path / "store", shards=[1])
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "store"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    os.kill(process.pid, signal.SIGSTOP)
    yield tmp_path / "store", process.pid
    process.kill()
    process.communicate()


class TestAHolderThatDoesNotLetGo:
    def test_the_wait_ends_and_names_the_holder(self, stopped: tuple[Path, int]) -> None:
        """Process and host are in the message, for every method that takes the lock."""
        root, pid = stopped
        writer = StoreWriter.resume(root)
        for action in (lambda: writer.keep_job({}), writer.finish, lambda: StoreWriter.create(root, writer.plan)):
            began_s = time.monotonic()
            with lock_wait(0.1), pytest.raises(StoreLockedError, match=rf"process {pid} on '{socket.gethostname()}'"):
                action()
            assert time.monotonic() - began_s < 5

    def test_a_long_wait_is_not_silent(self, stopped: tuple[Path, int], caplog: pytest.LogCaptureFixture) -> None:
        """After two seconds a line names the holder."""
        root, pid = stopped
        with caplog.at_level(logging.WARNING), lock_wait(2.2), pytest.raises(StoreLockedError):
            StoreWriter.resume(root).keep_job({})
        (line,) = caplog.messages
        assert re.search(rf"waiting for the lock of .*held by process {pid} on .* for \d+ s", line)

    @pytest.mark.parametrize("command", ["repair", "merge"])
    def test_the_commands_say_so(
        self, stopped: tuple[Path, int], command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """`--wait` sets the seconds, and the code is store-locked."""
        root, pid = stopped
        folders = [str(root)] if command == "repair" else [str(root), str(root)]
        assert main([command, *folders, "--wait", "0.2"]) == 1
        told = capsys.readouterr().err
        assert f"process {pid}" in told
        assert "[store-locked]" in told

    def test_a_claimed_shard_names_its_writer(self, stopped: tuple[Path, int]) -> None:
        """As the store's lock does."""
        root, pid = stopped
        with pytest.raises(ShardClaimedError, match=f"process {pid} on"), StoreWriter.resume(root).claim(0):
            pass

    def test_it_goes_on_once_the_holder_is_gone(self, stopped: tuple[Path, int]) -> None:
        """A lock ends with its process, whatever its file says."""
        root, pid = stopped
        os.kill(pid, signal.SIGKILL)
        with lock_wait(30):
            StoreWriter.resume(root).keep_job({"a": 1})

    def test_what_the_file_says_decides_nothing(self, stopped: tuple[Path, int]) -> None:
        """Bytes of any kind in it change only the message."""
        root, _ = stopped
        for raw in (b"", b"\xff" * 2000, b"[" * 1024, b'{"pid": 1e999, "host": 3, "since": NaN}', b"7"):
            (root / "locks" / "store.lock").write_bytes(raw)
            with lock_wait(0), pytest.raises(StoreLockedError, match="held by"):
                StoreWriter.resume(root).finish()

    def test_the_wait_is_ten_minutes_unless_told_otherwise(self) -> None:
        """As the commands' help says."""
        assert LOCK_WAIT_S == 600


class TestMerge:
    def test_the_job_is_written_under_the_lock(self, stopped: tuple[Path, int], source: Any, tmp_path: Path) -> None:
        """A process that holds the destination's lock may be writing the job: the merge waits."""
        root, _ = stopped
        source.write(tmp_path / "part", shards=[2]).keep_job({"store": {}})
        with lock_wait(0.1), pytest.raises(StoreLockedError):
            merge([tmp_path / "part"], root)
        assert not (root / "job.json").exists()

    def test_a_damaged_job_is_not_copied(self, source: Any, tmp_path: Path) -> None:
        """It would be found only when the merged store is resumed."""
        source.write(tmp_path / "part", shards=[2])
        (tmp_path / "part" / "job.json").write_bytes(seal({"a": 1}).replace(b"1", b"2", 1))
        with pytest.raises(DamageError):
            merge([tmp_path / "part"], tmp_path / "all")
        assert not (tmp_path / "all" / "job.json").exists()
