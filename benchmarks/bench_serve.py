"""Serving: rows per second at a client, beside a bare TCP socket and Arrow Flight over the same gather.

    python -m benchmarks.bench_serve [--rounds N] [--folder FOLDER]

Every contender's server and clients are processes of their own; they take turns in short slices, and a ratio is the
median over the rounds of ours to the peer's in the same round. A table on the screen; `benchmarks/out/serve.json` has a
row for each figure. Arrow Flight needs pyarrow, which is installed where it is missing; Redis takes part where
redis-server is there or Debian's can be installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve_redis import is_there, redis
from benchmarks.serve_stores import STORES, loss_of, make_stores

OUT = Path(__file__).parent / "out" / "serve.json"
SLICE_S = "0.5"
WARM_UP_S = "1.5"
IN_ORDER, SHUFFLED = "-1", "3"
WORKERS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: `ratio` is ours to the peer's."""

    what: str
    ours: float
    peer: float
    against: str
    ratio: float
    unit: str


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is ended with the block."""
    started = subprocess.Popen(
        [sys.executable, "-m", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(timeout=20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def first_line(started: subprocess.Popen[str]) -> str:
    """What a server says first: where it listens."""
    assert started.stdout is not None
    return started.stdout.readline().strip()


class Contender:
    """One server and its clients.

    Args:
        kind: as `serve_clients` names it, ours with `@` and a number of workers where that is not 1.
        store: which of `STORES`.
        clients: how many ask at once.
        batch: rows a batch.
    """

    def __init__(self, stack: ExitStack, folder: Path, kind: str, store: str, *, clients: int, batch: int) -> None:
        kind, _, workers = kind.partition("@")
        server = kind.partition("_")[0]
        if server == "ours":
            command = ("softlabels", "serve", str(folder), "--port", "0", "--workers", workers or "1")
            line = first_line(stack.enter_context(process(*command)))
            found = re.search(r" at (http://\S+)", line)
            assert found is not None, line
            address = f"{found.group(1)}/{store}"
        elif server == "redis":
            address = stack.enter_context(redis(folder / store))
        else:
            peer = stack.enter_context(process("benchmarks.serve_peers", server, str(folder / store)))
            address = f"127.0.0.1:{first_line(peer)}"
        samples, classes, encoding = STORES[store]
        row_bytes = classes * (2 if encoding == "f16" else 4)
        numbers = [str(number) for number in (samples, row_bytes, batch)]
        self.kind = kind
        self._clients = [
            stack.enter_context(process("benchmarks.serve_clients", kind, address, *numbers)) for _ in range(clients)
        ]
        for client in self._clients:
            assert first_line(client) == "ready"

    def run(self, line: str) -> list[dict[str, float]]:
        """What every client found when it was told this."""
        for client in self._clients:
            assert client.stdin is not None
            client.stdin.write(line + "\n")
            client.stdin.flush()
        return [json.loads(first_line(client)) for client in self._clients]


def rate(found: list[dict[str, float]], unit: str) -> float:
    """Of all clients together."""
    counted, scale = ("bytes", 1e6) if unit == "MB/s" else ("batches", 1.0)
    return sum(one[counted] / one["seconds"] for one in found) / scale


def compete(
    stack: ExitStack,
    folder: Path,
    kinds: dict[str, str],
    *,
    clients: int,
    batch: int,
    lines: tuple[str, ...],
    rounds: int,
) -> dict[str, list[list[dict[str, float]]]]:
    """Rounds of short slices, the contenders in turn; kinds by name, with the store that each reads."""
    contenders = {
        kind: Contender(stack, folder, kind, store, clients=clients, batch=batch) for kind, store in kinds.items()
    }
    streams = lines[0] in (IN_ORDER, SHUFFLED)
    for contender in contenders.values():
        contender.run(lines[0] if streams else WARM_UP_S)
    found: dict[str, list[list[dict[str, float]]]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind, contender in contenders.items():
            found[kind].append(contender.run(lines[number % len(lines)]))
    return found


def compared(what: str, against: str, ours: list[float], peer: list[float], unit: str) -> Row:
    """Medians, and the median of the rounds' ratios."""
    return Row(
        what=what,
        ours=round(statistics.median(ours), 1),
        peer=round(statistics.median(peer), 1),
        against=against,
        ratio=round(statistics.median(a / b for a, b in zip(ours, peer, strict=True)), 3),
        unit=unit,
    )


def batches(folder: Path, rounds: int) -> Iterator[Row]:
    """W1 and W3: random batches of 256 rows."""
    peers = ("tcp", "flight", "redis") if is_there() else ("tcp", "flight")
    if "redis" not in peers:
        print("Redis does not take part: there is no redis-server, and it could not be installed")
    for name, store, clients in (("W1.1", "w1", 1), ("W1.4", "w1", 4), ("W3", "w3", 1)):
        with ExitStack() as stack:
            kinds = dict.fromkeys(("ours", *peers), store)
            found = compete(stack, folder, kinds, clients=clients, batch=256, lines=(SLICE_S,), rounds=rounds)
        rates = {kind: [rate(one, "batches/s") for one in slices] for kind, slices in found.items()}
        for peer in peers:
            yield compared(f"{name}.{peer}", peer, rates["ours"], rates[peer], "batches/s")
        for quantile in ("p50_us", "p99_us"):
            by_kind = {k: [max(c[quantile] for c in one) for one in s] for k, s in found.items()}
            yield compared(f"{name}.{quantile}", "flight", by_kind["ours"], by_kind["flight"], "µs")


def quantised(folder: Path, rounds: int) -> Iterator[Row]:
    """W1 with eight-bit rows, against the bare socket's rows of f16."""
    with ExitStack() as stack:
        kinds = {"ours": "w1q8", "ours_decoded": "w1q8", "tcp": "w1"}
        found = compete(stack, folder, kinds, clients=1, batch=256, lines=(SLICE_S,), rounds=rounds)
    rates = {kind: [256 * rate(one, "batches/s") for one in slices] for kind, slices in found.items()}
    yield compared("W1.1.q8_tcp", "tcp f16", rates["ours"], rates["tcp"], "rows/s")
    yield compared("W1.1.q8_decoded_tcp", "tcp f16", rates["ours_decoded"], rates["tcp"], "rows/s")


def streams(folder: Path, rounds: int) -> Iterator[Row]:
    """W2: the whole store in batches of 1,024, in order and shuffled."""
    with ExitStack() as stack:
        kinds = dict.fromkeys(("ours_epoch", "tcp_epoch", "flight_epoch"), "w1")
        lines = (IN_ORDER, SHUFFLED)
        found = compete(stack, folder, kinds, clients=1, batch=1024, lines=lines, rounds=2 * rounds)
    rates = {kind: [rate(one, "MB/s") for one in slices] for kind, slices in found.items()}
    for peer in ("tcp", "flight"):
        yield compared(f"W2.{peer}", peer, rates["ours_epoch"], rates[f"{peer}_epoch"], "MB/s")
        for name, part in (("in_order", slice(0, None, 2)), ("shuffled", slice(1, None, 2))):
            ours, theirs = rates["ours_epoch"][part], rates[f"{peer}_epoch"][part]
            yield compared(f"W2.{name}.{peer}", peer, ours, theirs, "MB/s")


def workers(folder: Path, rounds: int) -> Iterator[Row]:
    """W1 by one and four clients of servers with one, two and four workers: the peer is the server with one."""
    for clients, name in ((4, ""), (1, ".one_client")):
        with ExitStack() as stack:
            kinds = dict.fromkeys((f"ours@{count}" for count in WORKERS), "w1")
            found = compete(stack, folder, kinds, clients=clients, batch=256, lines=(SLICE_S,), rounds=rounds)
        rates = {kind: [rate(one, "batches/s") for one in slices] for kind, slices in found.items()}
        for count in WORKERS:
            what = f"workers.{count}{name}"
            yield compared(what, "workers.1", rates[f"ours@{count}"], rates["ours@1"], "batches/s")
            for quantile in ("p50_us", "p99_us"):
                by_kind = {k: [max(c[quantile] for c in one) for one in s] for k, s in found.items()}
                yield compared(f"{what}.{quantile}", "workers.1", by_kind[f"ours@{count}"], by_kind["ours@1"], "µs")


def main() -> int:
    """Run everything; 0 when it ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "softlabels-bench-2")
    options = parser.parse_args()
    if importlib.util.find_spec("pyarrow") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "pyarrow"], check=True)
    make_stores(options.folder)
    rows: list[dict[str, Any]] = []
    print(loss_of(options.folder / "w1q8"))
    print(f"{'what':28} {'ours':>12} {'peer':>12} {'ratio':>7}  unit, against")
    for part in (batches, quantised, streams, workers):
        for row in part(options.folder, options.rounds):
            rows.append(asdict(row))
            print(f"{row.what:28} {row.ours:12,.1f} {row.peer:12,.1f} {row.ratio:7.2f}  {row.unit}, {row.against}")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
