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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3

from softlabels.errors import PortInUseError, WorkerDiedError
from softlabels_server import Settings
from softlabels_server.process.server import listen
from softlabels_server.process.workers import WorkerSupervisor

START_S = 60.0
"""Far more than a start takes: the machine may be busy."""

Start = Callable[..., "Process"]


class Process:
    """A server process and what it printed so far."""

    def __init__(self, log: Path, arguments: tuple[object, ...]) -> None:
        self._log = log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "softlabels", "serve", *map(str, arguments)],
                stdout=output,
                stderr=output,
                cwd=log.parent,
            )

    @property
    def printed(self) -> str:
        """Everything on standard output and error."""
        return self._log.read_text(encoding="utf-8")

    def address(self) -> str:
        """The address that it announces, once it does."""
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up and self.popen.poll() is None:
            if found := re.search(r"^softlabels: serving \d+ store\(s\) at (http://\S+)$", self.printed, re.MULTILINE):
                return found.group(1)
            time.sleep(0.05)
        pytest.fail(f"the server did not start (exit code {self.popen.poll()}):\n{self.printed}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.popen.send_signal(number)
        return self.popen.wait(timeout=30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `softlabels serve` with these arguments; ended with the test."""
    processes: list[Process] = []

    def begin(*arguments: object) -> Process:
        processes.append(Process(tmp_path / f"log-{len(processes)}", arguments))
        return processes[-1]

    yield begin
    for process in processes:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.wait()


def get(url: str, **headers: str) -> urllib3.BaseHTTPResponse:
    """One request on a connection of its own."""
    with urllib3.PoolManager() as pool:
        return pool.request("GET", url, headers=headers, retries=False, timeout=30)


class TestStart:
    def test_it_announces_its_address_and_stores(self, start: Start, stores: Any) -> None:
        """On one stable line with the real port, then a line a store; by then it answers."""
        process = start(stores.root, "--port", 0)
        address = process.address()
        assert get(f"{address}/health").json()["stores"] == 7
        lines = process.printed.splitlines()
        assert lines[0] == f"softlabels: serving 7 store(s) at {address}"
        assert "  halves: 100 rows × 7 classes, f16" in lines
        assert "  begun: 100 rows × 7 classes, f32, unfinished" in lines
        assert process.end() == 0

    def test_one_store_may_be_given_itself(self, start: Start, stores: Any) -> None:
        """It is called what its folder is called."""
        address = start(stores.root / "dense", "--port", 0).address()
        assert get(f"{address}/v1/stores/dense").status == 200

    def test_requests_are_not_logged_unless_asked_for(self, start: Start, stores: Any) -> None:
        """A batch takes less time than its line in a log."""
        quiet, chatty = start(stores.root, "--port", 0), start(stores.root, "--port", 0, "--access-log")
        for process in (quiet, chatty):
            get(f"{process.address()}/health")
            assert process.end() == 0
        assert "/health" not in quiet.printed
        assert "GET /health HTTP/1.1" in chatty.printed

    def test_a_token_from_a_file(self, start: Start, stores: Any, tmp_path: Path) -> None:
        """Its first line, without what surrounds it; it is never printed."""
        (tmp_path / "token").write_text(" s3cret-t0ken \nnot this\n")
        process = start(stores.root, "--port", 0, "--token-file", tmp_path / "token")
        address = process.address()
        assert get(f"{address}/v1/stores").status == 401
        assert get(f"{address}/v1/stores", Authorization="Bearer s3cret-t0ken").status == 200
        assert "s3cret" not in process.printed

    def test_open_to_others_without_a_token_it_warns(self, start: Start, stores: Any, tmp_path: Path) -> None:
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

    def test_ipv6(self, start: Start, stores: Any) -> None:
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

    def test_its_port_is_free_again(self, start: Start, stores: Any) -> None:
        """A server started right after the old one gets the same port."""
        first = start(stores.root, "--port", 0)
        address = first.address()
        assert get(f"{address}/health").status == 200
        assert first.end() == 0
        second = start(stores.root, "--port", address.rpartition(":")[2])
        assert second.address() == address


def children_of(pid: int) -> list[int]:
    """Processes that this one started and that serve, those of its bookkeeping left out."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone since it was listed
            parent = int(status.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_bytes()
            if parent == pid and b"spawn_main" in command:
                found.append(int(status.parent.name))
    return sorted(found)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds; the machine may be busy."""
    give_up = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < give_up, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
class TestWorkers:
    def test_they_share_one_port_and_one_line(self, start: Start, stores: Any) -> None:
        """The address is announced once, when all of them answer, and leads to each of them."""
        process = start(stores.root, "--port", 0, "--workers", 2, "--access-log")
        address = process.address()
        assert len(children_of(process.popen.pid)) == 2
        for _ in range(20):
            assert get(f"{address}/health").json()["stores"] == 7
        assert process.end() == 0
        assert process.printed.count("softlabels: serving") == 1
        assert process.printed.count("softlabels: stopped") == 1
        assert process.printed.count("GET /health HTTP/1.1") == 20

    def test_one_that_dies_is_started_again(self, start: Start, stores: Any) -> None:
        """With a line that says so; the port answers all the while."""
        process = start(stores.root, "--port", 0, "--workers", 2)
        address = process.address()
        before = children_of(process.popen.pid)
        os.kill(before[1], signal.SIGKILL)
        wait_for(lambda: "was ended by SIGKILL and is started again" in process.printed)
        assert get(f"{address}/health").status == 200
        wait_for(lambda: len(children_of(process.popen.pid)) == 2)
        after = children_of(process.popen.pid)
        assert before[0] in after
        assert before[1] not in after
        os.kill(before[0], signal.SIGKILL)
        assert get(f"{address}/health").status == 200
        assert process.end() == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_all_stop_when_told_to(self, start: Start, stores: Any, number: signal.Signals) -> None:
        """Told as a terminal or a service manager does, all at once: exit code 0 and no traceback."""
        process = start(stores.root, "--port", 0, "--workers", 2)
        address = process.address()
        workers = children_of(process.popen.pid)
        with urllib3.PoolManager() as pool:
            assert pool.request("GET", f"{address}/health").status == 200
            for pid in workers:
                os.kill(pid, number)
            assert process.end(number) == 0
        assert not any(map(is_running, workers))
        assert process.printed.endswith("softlabels: stopped\n")
        assert "Traceback" not in process.printed
        assert "started again" not in process.printed

    def test_they_do_not_outlive_a_killed_parent(self, start: Start, stores: Any) -> None:
        """Nobody is left to hold the port."""
        process = start(stores.root, "--port", 0, "--workers", 2)
        address = process.address()
        workers = children_of(process.popen.pid)
        process.end(signal.SIGKILL)
        wait_for(lambda: not any(map(is_running, workers)))
        second = start(stores.root, "--port", address.rpartition(":")[2])
        assert second.address() == address

    def test_each_notices_a_replaced_store(
        self, start: Start, tmp_path: Path, write: Callable[..., Any], rows_of: Callable[..., Any]
    ) -> None:
        """The version that lies on disk is the one that every worker serves."""
        root = tmp_path / "stores"
        write(root / "one", rows_of(0))
        address = start(root, "--port", 0, "--workers", 2).address()
        first = {get(f"{address}/v1/stores/one").headers["etag"] for _ in range(12)}
        write(root / "two", rows_of(1), name="one")
        (root / "one").rename(tmp_path / "old")
        (root / "two").rename(root / "one")
        second = {get(f"{address}/v1/stores/one").headers["etag"] for _ in range(12)}
        assert len(first) == len(second) == 1
        assert first != second

    def test_workers_that_cannot_start_are_an_error(self, stores: Any, tmp_path: Path) -> None:
        """And not tried for ever: the folder went away before they looked."""
        root = tmp_path / "gone"
        settings = Settings(port=0, workers=2)
        with listen(settings) as listener:
            workers = WorkerSupervisor(
                root, settings, listener, announce=lambda: pytest.fail("it serves"), say=pytest.fail
            )
            with pytest.raises(WorkerDiedError, match=r"worker \d of 2 ended with exit code 1"):
                workers.run()
        assert children_of(os.getpid()) == []


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
        """A broken installation says which module, and sends nobody to install what is there."""
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
