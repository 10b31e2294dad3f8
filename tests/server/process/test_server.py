"""`softlabels serve` as a process of its own: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import urllib3

from softlabels.errors import PortInUseError
from softlabels_server import Settings
from softlabels_server.process.server import listen

START_S = 60.0
"""Far more than a start takes: the machine may be busy."""

Start = Callable[..., Any]
Get = Callable[..., Any]


class TestStart:
    def test_it_announces_its_address_and_stores(self, start: Start, stores: Any, get: Get) -> None:
        """On one stable line with the real port, then a line a store; by then it answers."""
        process = start(stores.root, "--port", 0)
        address = process.address()
        assert get(f"{address}/health").json()["stores"] == 7
        lines = process.printed.splitlines()
        assert lines[0] == f"softlabels: serving 7 store(s) at {address}"
        assert "  halves: 100 rows × 7 classes, f16" in lines
        assert "  begun: 100 rows × 7 classes, f32, unfinished" in lines
        assert process.end() == 0

    def test_one_store_may_be_given_itself(self, start: Start, stores: Any, get: Get) -> None:
        """It is called what its folder is called."""
        address = start(stores.root / "dense", "--port", 0).address()
        assert get(f"{address}/v1/stores/dense").status == 200

    def test_requests_are_not_logged_unless_asked_for(self, start: Start, stores: Any, get: Get) -> None:
        """A batch takes less time than its line in a log."""
        quiet, chatty = start(stores.root, "--port", 0), start(stores.root, "--port", 0, "--access-log")
        for process in (quiet, chatty):
            get(f"{process.address()}/health")
            assert process.end() == 0
        assert "/health" not in quiet.printed
        assert "GET /health HTTP/1.1" in chatty.printed

    def test_a_token_from_a_file(self, start: Start, stores: Any, tmp_path: Path, get: Get) -> None:
        """Its first line, without what surrounds it; it is never printed."""
        (tmp_path / "token").write_text(" s3cret-t0ken \nnot this\n")
        process = start(stores.root, "--port", 0, "--token-file", tmp_path / "token")
        address = process.address()
        assert get(f"{address}/v1/stores").status == 401
        assert get(f"{address}/v1/stores", Authorization="Bearer s3cret-t0ken").status == 200
        assert "s3cret" not in process.printed

    def test_open_to_others_without_a_token_it_warns(self, start: Start, stores: Any, tmp_path: Path, get: Get) -> None:
        """With one it does not."""
        (tmp_path / "token").write_text("t")
        careless = start(stores.root, "--port", 0, "--host", "0.0.0.0")
        careful = start(stores.root, "--port", 0, "--host", "0.0.0.0", "--token-file", tmp_path / "token")
        assert get(f"{careless.address()}/health").status == 200
        assert "warning" in careless.printed
        careful.address()
        assert "warning" not in careful.printed

    def test_limits_can_be_set(self, start: Start, stores: Any) -> None:
        """From the command line as in Python."""
        address = start(stores.root, "--port", 0, "--max-batch-ids", 3).address()
        with urllib3.PoolManager() as pool:
            reply = pool.request(
                "POST",
                f"{address}/v1/stores/dense/batch",
                body=bytes(32),
                headers={"Content-Type": "application/octet-stream"},
            )
        assert (reply.status, reply.json()["code"]) == (413, "batch-too-large")

    @pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="limits are read from /proc")
    def test_as_many_connections_as_the_system_allows(self, start: Start, stores: Any) -> None:
        """A shell's soft limit of 1,024 files would be 500 streams."""
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[1]), before[1]))
        try:
            process = start(stores.root, "--port", 0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        process.address()
        limits = Path(f"/proc/{process.popen.pid}/limits").read_text(encoding="ascii")
        found = re.search(r"Max open files +(\S+) +(\S+)", limits)
        assert found is not None
        assert found.group(1) == found.group(2)

    def test_ipv6(self, start: Start, stores: Any, get: Get) -> None:
        """The address is bracketed."""
        with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                pytest.skip("this machine has no IPv6 loopback")
        address = start(stores.root, "--port", 0, "--host", "::1").address()
        assert address.startswith("http://[::1]:")
        assert get(f"{address}/health").status == 200


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_being_told_to_stop_is_no_failure(self, start: Start, stores: Any, number: signal.Signals) -> None:
        """Exit code 0, also with a connection open, and no traceback."""
        process = start(stores.root, "--port", 0)
        with urllib3.PoolManager() as pool:
            assert pool.request("GET", f"{process.address()}/health").status == 200
            assert process.end(number) == 0
        assert process.printed.endswith("softlabels: stopped\n")
        assert "Traceback" not in process.printed

    def test_its_port_is_free_again(self, start: Start, stores: Any, get: Get) -> None:
        """A server started right after the old one gets the same port."""
        first = start(stores.root, "--port", 0)
        address = first.address()
        assert get(f"{address}/health").status == 200
        assert first.end() == 0
        second = start(stores.root, "--port", address.rpartition(":")[2])
        assert second.address() == address


class TestRefusals:
    def test_a_port_in_use_has_an_error_of_its_own(self) -> None:
        """Its code tells a script to take another port, which no other refusal does."""
        with listen(Settings(port=0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(PortInUseError, match="--port 0") as caught:
                listen(Settings(port=port))
        assert (caught.value.code, caught.value.context["port"]) == ("port-in-use", port)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param(["nowhere"], "no folder", id="folder missing"),
            pytest.param(["."], "no store in", id="nothing there"),
            pytest.param(["{stores}", "--port", "70000"], "70000", id="no port"),
            pytest.param(["{stores}", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1", id="not our address"),
            pytest.param(["{stores}", "--token-file", "missing"], "token file", id="no token file"),
            pytest.param(["{stores}", "--token-file", os.devnull], "is empty", id="empty token file"),
            pytest.param(["{stores}", "--max-batch-ids", "0"], "max_batch_ids", id="no batches"),
            pytest.param(["{stores}", "--workers", "0"], "workers is 0", id="no workers"),
        ],
    )
    def test_it_says_why_it_does_not_start(self, start: Start, stores: Any, arguments: list[str], message: str) -> None:
        """One plain message, exit code 1, no traceback."""
        process = start(*(argument.format(stores=stores.root) for argument in arguments))
        assert process.popen.wait(timeout=START_S) == 1
        assert message in process.printed
        assert "Traceback" not in process.printed

    @pytest.mark.parametrize("library", ["fastapi", "uvicorn"])
    def test_a_missing_extra(self, library: str, tmp_path: Path) -> None:
        """Names the extra to install."""
        code = (
            "import sys; sys.modules[sys.argv[1]] = None; from softlabels.cli import main; "
            "sys.exit(main(['serve', sys.argv[2]]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, library, tmp_path],
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 1
        assert "softlabels[server]" in done.stderr
        assert "[missing-extra]" in done.stderr

    @pytest.mark.parametrize("module", ["softlabels_server.process.server", "softlabels.ids"])
    def test_a_missing_module_of_its_own_is_no_missing_extra(self, module: str, tmp_path: Path) -> None:
        """A broken installation says which module, and does not advise to install what is installed."""
        code = (
            "import sys; from softlabels.cli import main; sys.modules[sys.argv[1]] = None; "
            "sys.exit(main(['serve', sys.argv[2]]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, module, tmp_path], capture_output=True, text=True, timeout=START_S, check=False
        )
        assert done.returncode == 1
        assert module in done.stderr
        assert "softlabels[server]" not in done.stderr

    def test_a_port_in_use(self, start: Start, stores: Any) -> None:
        """Says which, and how to get another."""
        first = start(stores.root, "--port", 0)
        port = first.address().rpartition(":")[2]
        second = start(stores.root, "--port", port)
        assert second.popen.wait(timeout=START_S) == 1
        assert port in second.printed
        assert "--port" in second.printed


TRIM_CODE = """
import re
from softlabels_server.process.server import HeapTrimmer, configure_malloc

def own_mb():
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\\s+(\\d+)", file.read()).group(1)) / 1024

print("configured", configure_malloc())
trimmer = HeapTrimmer()
assert not trimmer.trim_if_idle() and not trimmer.trim_if_idle(), "little is free"
before = own_mb()
blocks = [bytearray(100_000) for _ in range(2_000)]
pins = [bytearray(blocks.pop(number)) for number in range(1_990, 0, -10)]
full = own_mb()
del blocks
print("kept", round(own_mb() - before), "of", round(full - before))
print("trimmed", trimmer.trim_if_idle(), trimmer.trim_if_idle(), trimmer.trim_if_idle())
print("left", round(own_mb() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
class TestHeapTrimmer:
    def test_much_freed_memory_is_returned_at_the_second_check(self) -> None:
        """200 MB with blocks in use all over them: kept at first, returned when they stay idle."""
        done = subprocess.run(
            [sys.executable, "-c", TRIM_CODE], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        if "configured True" not in done.stdout:
            pytest.skip("this machine's C library has no mallopt: nothing is kept")
        said = dict(re.findall(r"^(\w+) (.+)$", done.stdout, re.MULTILINE))
        assert said["trimmed"] == "False True False"
        assert int(said["kept"].split()[0]) > 140
        assert int(said["left"]) < 60, done.stdout
