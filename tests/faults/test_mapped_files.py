"""Files that are cut, written to and replaced while readers gather from them: right rows or errors, to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.manifest import Container, IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store
from softlabels.transfer_set import sample_fingerprints

READERS = """
import collections, faulthandler, json, os, sys, threading, time
import numpy as np
from softlabels.errors import DamageError, StoreChangedError
from softlabels.store import LocalRows

root, seconds, mode = sys.argv[1], float(sys.argv[2]), sys.argv[3]
if mode == "faulthandler before":
    faulthandler.enable()
rows = LocalRows(root)
fields = tuple(rows.manifest.arrays)
every = np.arange(rows.manifest.rows)
expected = {name: array.copy() for name, array in rows.fetch_rows(every, fields).items()}
if mode == "faulthandler after":
    faulthandler.enable()
if mode == "forked" and os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
counts = collections.Counter()
end = time.monotonic() + seconds

def read(seed):
    rng = np.random.default_rng(seed)
    while time.monotonic() < end:
        chosen = rng.integers(0, len(every), 64)
        try:
            found = rows.fetch_rows(chosen, fields)
        except (DamageError, StoreChangedError) as error:
            counts[error.code] += 1
        else:
            same = all(found[name].tobytes() == expected[name][chosen].tobytes() for name in fields)
            counts["right" if same else "wrong"] += 1

threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
print("ready", flush=True)
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(counts), flush=True)
"""

SECONDS = float(os.environ.get("SOFTLABELS_TRUNCATION_S", "2"))
"""The gathers of ten seconds are some 10,000."""


def write_store(root: Path, container: Container, seed: int) -> None:
    """A store of 3,000 random rows in four shards of 150 KB; another seed is another run of the same plan."""
    encoding = make_encoding("f16", classes=100)
    plan = plan_store(
        name="t",
        samples=3000,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=1.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}),
        container=container,
        rows_per_shard=768,
        rows_per_chunk=64,
    )
    writer = StoreWriter.create(root, plan)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            ids = np.asarray(claim.rows)
            logits = np.random.default_rng([seed, shard]).normal(size=(len(ids), 100)).astype(np.float16)
            exact = (logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
            audit = Audit((1.0,))
            audit.add(exact, exact, captured=1.0)
            marks = sample_fingerprints(ids[:, None])
            claim.commit(encoded=encoding.encode(exact), ids=ids, fingerprints=marks, audit=audit.to_json())
    writer.finish()


def cut_and_restore(root: Path, other: Path, running: Callable[[], bool]) -> None:
    """Cut files of the store, at any place, and write them again in place."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".json"]
    contents = {path: path.read_bytes() for path in files}
    while running():
        for number, path in enumerate(files):
            os.truncate(path, len(contents[path]) * (number % 4) // 4)
            with path.open("r+b") as file:
                file.write(contents[path])


def copy_over(root: Path, other: Path, running: Callable[[], bool]) -> None:
    """`cp -r other/. root/`, again and again, once with the other store and once with its own files."""
    own = root.with_name("own")
    subprocess.run(["cp", "-a", str(root), str(own)], check=True)
    while running():
        for source in (other, own):
            subprocess.run(["cp", "-rp", f"{source}/.", str(root)], check=True)


def rename(root: Path, other: Path, running: Callable[[], bool]) -> None:
    """Exchange the two stores' folders, again and again."""
    aside = root.with_name("aside")
    while running():
        root.rename(aside)
        other.rename(root)
        aside.rename(other)


@pytest.mark.skipif(sys.platform != "linux", reason="the guard of mapped files works on Linux")
@pytest.mark.parametrize("mode", ["plain", "faulthandler before", "faulthandler after", "forked"])
@pytest.mark.parametrize("change", [cut_and_restore, copy_over, rename])
@pytest.mark.parametrize("container", ["zarr", "hdf5"])
def test_files_that_change_under_readers(
    tmp_path: Path, container: Container, change: Callable[..., None], mode: str
) -> None:
    """Three threads read while another process changes the files: right rows or an error, to the end."""
    write_store(tmp_path / "store", container, 0)
    write_store(tmp_path / "other", container, 1)
    command = [sys.executable, "-c", READERS, str(tmp_path / "store"), str(SECONDS), mode]
    # To files: with a pipe, a report of faulthandler for each of many faults would fill it and stop the reader.
    with (tmp_path / "out").open("w+") as out, (tmp_path / "errors").open("w+") as errors:
        reader = subprocess.Popen(command, stdout=out, stderr=errors)
        while reader.poll() is None and not (tmp_path / "out").read_text().startswith("ready"):
            time.sleep(0.01)
        change(tmp_path / "store", tmp_path / "other", lambda: reader.poll() is None)
    assert reader.returncode == 0, (tmp_path / "errors").read_text()[-5000:]
    counts = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    print(counts)
    assert counts.pop("wrong", 0) == 0
    assert counts.get("right", 0) > 0
    assert set(counts) <= {"right", "checksum-mismatch", "truncated", "bad-manifest", "store-changed"}
