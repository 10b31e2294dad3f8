"""Run generated faults in worker processes: every case follows from the seed and its number, and survives no crash.

    python -m tests.faults.generator.run --count 20000 --seed 7 --processes 2
    python -m tests.faults.generator.run --seed 7 --case 1234          # one case again, in this process

A worker that dies, or is silent for long, makes the case that it had begun a wrong one; another goes on after it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests.faults.generator.cases import Bench, combinations, run_case
from tests.faults.generator.judging import VOID, WRONG
from tests.faults.generator.layers import pairs

CASE_LIMIT_S = 60.0
"""A case takes milliseconds; one that waits this long hangs."""

SHOWN = 40

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""A folder in memory, where fsync is free."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a case."""

    number: int
    layer: str
    operation: str
    observer: str
    outcome: str
    told: str
    codes: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    seconds: float = 0.0


def work(pipe: Connection, folder: Path, seed: int, numbers: list[int], only: str) -> None:
    """Run cases one after the other, telling each before it begins and after it ended."""
    bench = BENCH
    assert bench is not None
    bench.settle(folder)
    try:
        for number in numbers:
            pipe.send(("begin", number))
            result = one(bench, seed, number, only)
            # A million of them are kept: only what is wrong needs words.
            pipe.send(("end", result if result.outcome == WRONG else replace(result, told="")))
        pipe.send(("done", None))
    finally:
        bench.close()


def one(bench: Bench, seed: int, number: int, only: str = "") -> Result:
    """Run one case."""
    chosen = combinations(only)
    layer, operation, observer = chosen[number % len(chosen)]
    began = time.monotonic()
    verdict, told = run_case(bench, seed, number, layer, operation, observer)
    return Result(
        number=number,
        layer=layer,
        operation=operation,
        observer=observer,
        outcome=verdict.outcome,
        told=told,
        codes=tuple(sorted(set(verdict.codes))),
        wrong=tuple(text[:300] for text in verdict.wrong[:4]),
        seconds=time.monotonic() - began,
    )


BENCH: Bench | None = None


def run(count: int, seed: int, *, processes: int = 2, only: str = "", first: int = 0) -> list[Result]:
    """Run `count` cases and return what came of each, in order."""
    global BENCH
    folder = Path(tempfile.mkdtemp(prefix="softlabels-generated-", dir=MEMORY))
    BENCH = Bench(folder)
    results: dict[int, Result] = {}
    try:
        BENCH.make_all()
        todo = {index: list(range(first + index, first + count, processes)) for index in range(processes)}
        workers: dict[Connection, _Worker] = {}
        for index, numbers in todo.items():
            worker = _Worker(folder / f"worker-{index}", seed, numbers, only)
            workers[worker.pipe] = worker
        while workers:
            for pipe in wait(list(workers), timeout=1.0):
                assert isinstance(pipe, Connection)
                worker = workers[pipe]
                worker.receive(results)
            for pipe, worker in list(workers.items()):
                left = worker.left_after_death(results)
                if left is not None:
                    del workers[pipe]
                    if left:
                        again = _Worker(worker.folder, seed, left, only)
                        workers[again.pipe] = again
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [results[number] for number in sorted(results)]


class _Worker:
    def __init__(self, folder: Path, seed: int, numbers: list[int], only: str) -> None:
        self.folder, self._seed, self._numbers, self._only = folder, seed, numbers, only
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=work, args=(theirs, folder, seed, numbers, only))
        self._process.start()
        theirs.close()
        self._begun: int | None = None
        self._heard_s = time.monotonic()
        self._done = False

    def receive(self, results: dict[int, Result]) -> None:
        try:
            what, value = self.pipe.recv()
        except (EOFError, OSError):
            self._done = self._done or not self._process.is_alive()
            self._process.join(timeout=5)
            return
        self._heard_s = time.monotonic()
        if what == "begin":
            self._begun = value
        elif what == "end":
            results[value.number] = value
            self._begun = None
        else:
            self._done = True

    def left_after_death(self, results: dict[int, Result]) -> list[int] | None:
        """Return the cases that are left once the worker has ended; None while it lives."""
        if self._process.is_alive():
            if time.monotonic() - self._heard_s < CASE_LIMIT_S or self._done:
                return None
            os.kill(self._process.pid or 0, signal.SIGKILL)
            self._process.join()
        while self.pipe.poll():
            before = self._heard_s
            self.receive(results)
            if self._heard_s == before:
                break
        left = [number for number in self._numbers if number not in results]
        if self._begun is not None and self._begun in left:
            chosen = combinations(self._only)
            layer, operation, observer = chosen[self._begun % len(chosen)]
            results[self._begun] = Result(
                number=self._begun,
                layer=layer,
                operation=operation,
                observer=observer,
                outcome=WRONG,
                told="",
                wrong=(f"the process died or hung: exit code {self._process.exitcode}",),
            )
            left.remove(self._begun)
        elif left and self._process.exitcode != 0:
            raise RuntimeError(f"a worker ended with {self._process.exitcode} before its first case")
        self.pipe.close()
        return left


def untried(results: list[Result]) -> list[tuple[str, str]]:
    """Return the pairs of layer and operation that no case changed anything with."""
    tried = {(result.layer, result.operation) for result in results if result.outcome != VOID}
    return [pair for pair in pairs() if pair not in tried]


def report(results: list[Result], seed: int, seconds: float) -> str:
    """Return a table of outcomes by layer, and the wrong ones with what repeats them."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        table[result.layer][result.outcome] += 1
    words = ("right", "refused", "harmless", "void", WRONG)
    lines = [
        f"{len(results)} cases, seed {seed}, {seconds:.0f} s",
        f"{'layer':24}" + "".join(f"{w:>10}" for w in words),
    ]
    lines += [f"{layer:24}" + "".join(f"{found[w]:>10}" for w in words) for layer, found in sorted(table.items())]
    total = Counter(result.outcome for result in results)
    lines.append(f"{'all':24}" + "".join(f"{total[w]:>10}" for w in words))
    wrong = [result for result in results if result.outcome == WRONG]
    by_kind = Counter((r.layer, r.operation, r.observer) for r in wrong)
    lines += [f"WRONG {count:6} {layer} / {op} / {who}" for (layer, op, who), count in by_kind.most_common(SHOWN)]
    for result in wrong[:SHOWN]:
        lines.append(
            f"WRONG case {result.number} (seed {seed}): {result.layer} / {result.operation} / {result.observer}: "
            f"{result.told}\n      {' | '.join(result.wrong)}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; exit code 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=int(os.environ.get("SOFTLABELS_FAULT_COUNT", "5000")))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SOFTLABELS_FAULT_SEED", "1")))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression over 'layer / operation / observer'")
    parser.add_argument("--case", type=int, help="run this case alone, in this process")
    parser.add_argument("--out", type=Path, help="file for every result, a JSON line each")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if options.case is not None:
        folder = Path(tempfile.mkdtemp(prefix="softlabels-generated-", dir=MEMORY))
        bench = Bench(folder)
        bench.settle(folder / "worker")
        try:
            results = [one(bench, options.seed, options.case, options.only)]
        finally:
            bench.close()
            shutil.rmtree(folder, ignore_errors=True)
        print(results[0])
    else:
        results = run(options.count, options.seed, processes=options.processes, only=options.only)
    print(report(results, options.seed, time.monotonic() - began))
    if options.out is not None:
        options.out.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    return int(any(result.outcome == WRONG for result in results))


if __name__ == "__main__":
    sys.exit(main())
