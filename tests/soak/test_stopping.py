"""What happens to replies under way when a server is told to stop?"""

from __future__ import annotations

import signal
import subprocess
from typing import Any

import pytest

import softlabels


class TestRepliesUnderWay:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_they_are_finished(self, serve: Any, workers: int) -> None:
        """A stream of which a part is read when the server is told to stop still comes whole."""
        served = serve("--workers", workers)
        with softlabels.open(f"{served.url}/large") as store, store.epoch(seed=0, epoch=0, batch_size=128) as stream:
            seen = next(stream).ids.tolist()
            served.popen.send_signal(signal.SIGTERM)
            for targets in stream:
                seen += targets.ids.tolist()
        assert served.popen.wait(timeout=30) == 0
        assert sorted(seen) == list(range(20_000))
        assert "Traceback" not in served.log.read_text()

    def test_one_that_nobody_reads_is_cut(self, serve: Any) -> None:
        """It gets `shutdown_timeout_s`, not for ever; being told twice ends workers at once."""
        served = serve("--workers", 2)
        with softlabels.open(f"{served.url}/large") as store, store.epoch(seed=0, epoch=0, batch_size=128) as stream:
            next(stream)
            served.popen.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                served.popen.wait(timeout=1.0)
            served.popen.send_signal(signal.SIGINT)
            assert served.popen.wait(timeout=4.0) == 0
        assert "Traceback" not in served.log.read_text()
