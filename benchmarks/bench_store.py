"""The store beside plain files and its peers: gather, sequential read, open, write: `make bench-store`.

Every figure is the median over interleaved rounds of one run, and so is every ratio: these are ratios of neighbours in
time, which hold on a noisy machine. Rows are 1,000 f16, 200,000 of them unless said otherwise; a batch is 256 random
rows. All files are in the page cache: what is compared is the way from there to an array.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.atomic_files import sync_folder
from softlabels.documents import seal
from softlabels.encodings import make_encoding
from softlabels.manifest import IdSpec, Manifest, RowLayout, TemperatureSpec, TransferSetSpec
from softlabels.store import LocalRows, StoreWriter, plan_store

OUT = Path(__file__).parent / "out"
SCRATCH = OUT / "scratch" / "store"
ROWS, CLASSES, BATCH, CHUNK = 200_000, 1_000, 256, 64
FOUR_SHARDS = 50_048
ROUNDS = 9
PEERS = ("tensorstore", "lmdb")
AUDIT = {"rows": 0, "top1_agreements": 0, "kl": {}}

Work = Callable[[], float]
"""Does some work once and returns its rate: more is better."""


def plan(rows: int, rows_per_shard: int, *, container: str = "zarr", classes: int = CLASSES, ids: IdSpec) -> Manifest:
    """The plan of a benchmark's store."""
    return plan_store(
        name="bench",
        samples=rows,
        ids=ids,
        encoding=make_encoding("f16", classes=classes),
        temperature=TemperatureSpec(default=1.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="bench", source="bench:rows", arguments={}),
        container=container,  # type: ignore[arg-type]
        rows_per_shard=rows_per_shard,
        rows_per_chunk=CHUNK,
        layout=RowLayout(kind="single", samples=rows, rows=rows),
    )


def write_store(root: Path, manifest: Manifest, rows_NC: NDArray[np.float16], ids: NDArray[Any]) -> Path:
    """A finished store of these rows."""
    writer = StoreWriter.create(root, manifest)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            part = slice(claim.rows.start, claim.rows.stop)
            marks = np.zeros((len(claim.rows), 16), dtype=np.uint8)
            claim.commit(encoded={"targets": rows_NC[part]}, ids=ids[part], fingerprints=marks, audit=AUDIT)
    writer.finish()
    return root


def rate(work: Callable[[NDArray[np.int64]], Any], batches: list[NDArray[np.int64]]) -> Work:
    """Batches a second of `work` over `batches`."""

    def measured() -> float:
        started_s = time.perf_counter()
        for batch in batches:
            work(batch)
        return len(batches) / (time.perf_counter() - started_s)

    return measured


def interleaved(contenders: Mapping[str, Work], *, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Rates of everybody, round by round; a first round is thrown away."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            measured = work()
            if number:
                found[name].append(measured)
    return found


def row(
    what: str, rates: Mapping[str, list[float]], ours: str, peer: str, *, against: str, unit: str
) -> dict[str, Any]:
    """One line of the table."""
    ratios = [a / b for a, b in zip(rates[ours], rates[peer], strict=True)]
    return {
        "what": what,
        "ours": round(statistics.median(rates[ours]), 2),
        "peer": round(statistics.median(rates[peer]), 2),
        "against": against,
        "ratio": round(statistics.median(ratios), 3),
        "unit": unit,
    }


def bench_gather(rows_NC: NDArray[np.float16]) -> list[dict[str, Any]]:
    """Random batches from one flat file, from our stores, and from peers over the same rows."""
    import lmdb
    import tensorstore
    import zarr

    dense = IdSpec(kind="int", dense_start=0)
    ids = np.arange(ROWS)
    four = write_store(SCRATCH / "four", plan(ROWS, FOUR_SHARDS, ids=dense), rows_NC, ids)
    one = write_store(SCRATCH / "one", plan(ROWS, ROWS, ids=dense), rows_NC, ids)
    hdf5 = write_store(SCRATCH / "hdf5", plan(ROWS, FOUR_SHARDS, container="hdf5", ids=dense), rows_NC, ids)
    flat = np.load(SCRATCH / "flat.npy", mmap_mode="r")
    environment = lmdb.open(str(SCRATCH / "lmdb"), map_size=1 << 31)
    with environment.begin(write=True) as transaction:
        for number in range(ROWS):
            transaction.put(number.to_bytes(8, "big"), rows_NC[number].tobytes())
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(four / "targets")}}
    by_tensorstore = tensorstore.open(spec).result()
    by_zarr = zarr.open_group(str(four), mode="r")["targets"]
    stores = {name: LocalRows(path) for name, path in (("four", four), ("one", one), ("hdf5", hdf5))}

    def from_lmdb(batch: NDArray[np.int64]) -> NDArray[np.float16]:
        with environment.begin(buffers=True) as transaction:
            found = b"".join([transaction.get(number.to_bytes(8, "big")) for number in batch.tolist()])
        return np.frombuffer(found, dtype="<f2").reshape(-1, CLASSES)

    rng = np.random.default_rng(1)
    batches = [rng.integers(0, ROWS, BATCH) for _ in range(400)]
    for store in stores.values():  # every chunk verified: what is measured is the steady state
        store.fetch_rows(np.arange(0, ROWS, CHUNK), ("targets",))
    sample = batches[0]
    for name, found in (
        *((name, store.fetch(sample, ("targets",))["targets"]) for name, store in stores.items()),
        ("lmdb", from_lmdb(sample)),
        ("tensorstore", by_tensorstore[sample].read().result()),
        ("zarr", by_zarr.oindex[sample]),
    ):
        assert np.array_equal(np.asarray(found).view(np.uint16), flat[sample].view(np.uint16)), name
    contenders: dict[str, Work] = {
        "numpy": rate(lambda batch: flat[batch], batches),
        **{name: rate(lambda b, s=store: s.fetch(b, ("targets",)), batches) for name, store in stores.items()},
        "lmdb": rate(from_lmdb, batches[:100]),
        "tensorstore": rate(lambda batch: by_tensorstore[batch].read().result(), batches[:20]),
        "zarr": rate(lambda batch: by_zarr.oindex[batch], batches[:1]),
    }
    rates = interleaved(contenders)
    unit = "batches/s"
    return [
        row("gather.numpy", rates, "four", "numpy", against="memmap[ids], one flat file", unit=unit),
        row("gather.one_shard", rates, "one", "numpy", against="memmap[ids], one flat file", unit=unit),
        row("gather.lmdb", rates, "four", "lmdb", against="LMDB, one record a row", unit=unit),
        row("gather.tensorstore", rates, "four", "tensorstore", against="tensorstore, same files", unit=unit),
        row("gather.zarr_python", rates, "four", "zarr", against="zarr-python, same files", unit=unit),
        row("gather.hdf5", rates, "hdf5", "four", against="our Zarr store", unit=unit),
        *bench_sequential(stores["four"], flat),
    ]


def bench_sequential(store: LocalRows, flat: NDArray[np.float16]) -> list[dict[str, Any]]:
    """The whole store in order, in batches of 1,024, each copied out; GB/s."""
    gigabytes = flat.nbytes / 1e9
    spans = [(start, min(start + 1024, ROWS)) for start in range(0, ROWS, 1024)]

    def whole(read: Callable[[int, int], Any]) -> Work:
        def measured() -> float:
            started_s = time.perf_counter()
            for start, stop in spans:
                read(start, stop)
            return gigabytes / (time.perf_counter() - started_s)

        return measured

    rates = interleaved(
        {
            "ours": whole(lambda start, stop: store.fetch_rows(np.arange(start, stop), ("targets",))),
            "numpy": whole(lambda start, stop: np.array(flat[start:stop])),
        }
    )
    return [row("sequential.numpy", rates, "ours", "numpy", against="memmap slices, copied", unit="GB/s")]


def bench_ids() -> list[dict[str, Any]]:
    """Positions of 256 ids a batch: dense, looked-up integers, strings."""
    rng = np.random.default_rng(2)
    shuffled = rng.permutation(ROWS)
    kinds: dict[str, tuple[IdSpec, NDArray[Any]]] = {
        "dense": (IdSpec(kind="int", dense_start=0), np.arange(ROWS)),
        "sorted": (IdSpec(kind="int"), shuffled * 7),
        "string": (IdSpec(kind="str", width_bytes=12), np.array([f"img-{n:08d}" for n in shuffled])),
    }
    few = np.zeros((ROWS, 10), dtype=np.float16)
    contenders: dict[str, Work] = {}
    for name, (spec, ids) in kinds.items():
        root = write_store(SCRATCH / f"ids-{name}", plan(ROWS, FOUR_SHARDS, classes=10, ids=spec), few, ids)
        store = LocalRows(root)
        batches = [ids[rng.integers(0, ROWS, BATCH)] for _ in range(200)]
        contenders[name] = rate(store.positions_of, batches)
    rates = interleaved(contenders)
    return [
        row(f"ids.{name}", rates, name, "dense", against="dense ids", unit="batches/s") for name in ("sorted", "string")
    ]


OPENING = """
import json, sys, time
import softlabels, softlabels.store
started = time.perf_counter()
store = softlabels.open(sys.argv[1])
spent_ms = 1e3 * (time.perf_counter() - started)
peak_kb = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([spent_ms, peak_kb / 1000, len(store)]))
"""


def bench_open() -> list[dict[str, Any]]:
    """Opening a finished store of 10⁹ rows in a fresh process: ms, and MB of the whole process; bounds 50 and 100."""
    root = SCRATCH / "large"
    draft = plan(10**9, 65_536, classes=10, ids=IdSpec(kind="int", dense_start=0))
    (root / "targets/c/0").mkdir(parents=True)
    with (root / "targets/c/0/0").open("wb") as sparse:
        sparse.truncate(65_536 * 20)
    finished = draft.finish(ledger="0" * 64, fingerprint="0" * 32 + "-1000000000", audit={}, metadata_sha256={})
    (root / "plan.json").write_bytes(seal(draft.to_json()))
    (root / "manifest.json").write_bytes(seal(finished.to_json()))
    found = []
    for _ in range(ROUNDS):
        command = [sys.executable, "-c", OPENING, str(root)]
        found.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    spent_ms, peak_mb = (statistics.median(values) for values in list(zip(*found, strict=True))[:2])
    line = {"what": "open.1e9_rows", "ours": round(spent_ms, 2), "peer": 50.0, "against": "bound", "unit": "ms"}
    memory = {
        "what": "open.1e9_rows_memory",
        "ours": round(peak_mb, 1),
        "peer": 100.0,
        "against": "bound",
        "unit": "MB",
    }
    return [{**entry, "ratio": round(entry["ours"] / entry["peer"], 3)} for entry in (line, memory)]


def bench_write(rows_NC: NDArray[np.float16]) -> list[dict[str, Any]]:
    """Committing shards, checksums and receipts included, beside plain write and fsync of the same bytes; GB/s."""
    ids, payload = np.arange(ROWS), rows_NC.tobytes()
    gigabytes = len(payload) / 1e9

    def ours() -> float:
        shutil.rmtree(SCRATCH / "written", ignore_errors=True)
        os.sync()
        started_s = time.perf_counter()
        write_store(SCRATCH / "written", plan(ROWS, FOUR_SHARDS, ids=IdSpec(kind="int", dense_start=0)), rows_NC, ids)
        return gigabytes / (time.perf_counter() - started_s)

    def plain() -> float:
        path = SCRATCH / "plain"
        path.unlink(missing_ok=True)
        os.sync()
        started_s = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            file.write(payload)
            os.fsync(file.fileno())
        sync_folder(SCRATCH)
        # A disk faster than this is not asked for more: a teacher on any device writes a tenth of it.
        return min(1.0, gigabytes / (time.perf_counter() - started_s))

    rates = interleaved({"ours": ours, "plain": plain}, rounds=5)
    return [row("write.disk", rates, "ours", "plain", against="write + fsync, at most 1 GB/s", unit="GB/s")]


def install_peers() -> None:
    """Install what is compared with, where it is missing."""
    for name in PEERS:
        try:
            __import__(name)
        except ImportError:
            print(f"installing {name}, which the store is compared with", flush=True)
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", name], check=True)


def main() -> None:
    """Run everything, print the table, write `benchmarks/out/store.json`."""
    install_peers()
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    try:
        rows_NC = np.random.default_rng(0).normal(size=(ROWS, CLASSES)).astype(np.float16)
        np.save(SCRATCH / "flat.npy", rows_NC)
        table: list[dict[str, Any]] = []
        for part in (lambda: bench_gather(rows_NC), bench_ids, bench_open, lambda: bench_write(rows_NC)):
            for line in part():
                table.append(line)
                print(
                    f"{line['what']:<22}{line['ours']:>12,.6g}{line['peer']:>12,.6g} {line['unit']:<10}"
                    f"ratio {line['ratio']:<9g}against {line['against']}",
                    flush=True,
                )
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    (OUT / "store.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
