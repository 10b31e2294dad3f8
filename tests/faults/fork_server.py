"""Fork server: a process that has imported everything and forks a child per task, hundreds of processes a minute.

Tasks come as lines of JSON on stdin; for each, a line with the child's pid and, when it has ended, one with its exit
code go to stdout. A child that is told to wait stops itself (SIGSTOP) first, so that a tracer can be attached.

It writes stores of many kinds, each deterministic: the same kind and seed give the same bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from softlabels.audit import Audit
from softlabels.encodings import Encoding, make_encoding
from softlabels.encodings.hidden import hidden_encoding
from softlabels.errors import SoftLabelsError
from softlabels.manifest import ArraySpec, IdSpec, Manifest, RowLayout, TemperatureSpec, TransferSetSpec, ViewSpec
from softlabels.store import SampleTable, StoreWriter, plan_store
from softlabels.store.copies import convert_store, merge
from softlabels.store.repair import repair
from softlabels.transfer_set import sample_fingerprints

CLASSES, ROWS_PER_SHARD, ROWS_PER_CHUNK = 6, 32, 8
SAMPLES = 90
REPORTED, CRASHED = 3, 4
"""Exit codes: an error that was reported as one, and anything else."""

KINDS = (
    "zarr",
    "hdf5",
    "zarr-str",
    "hdf5-int",
    "zarr-zstd",
    "hdf5-gzip",
    "zarr-members",
    "zarr-views",
    "zarr-sequences",
)

MORE_KINDS = (
    "zarr-wide",
    "hdf5-wide",
    "zarr-topk",
    "hdf5-topk",
    "zarr-hidden",
    "hdf5-hidden",
    "zarr-blosc",
    "zarr-inputs",
    "hdf5-inputs",
    "hdf5-views",
    "hdf5-sequences",
)
"""Kinds for generated faults: rows of several cache lines, several arrays a row, learnt arrays, kept inputs."""

WIDE, HIDDEN = 160, 4
"""Classes of a wide row, 320 bytes as f16; width of a hidden state."""


class Kind:
    """Contents of a kind of store.

    Args:
        name: container, and what is special about the store.
        seed: random seed of the logits.
        temperature: default temperature; another one makes another plan, as an earlier version of the store has.
    """

    def __init__(self, name: str, seed: int = 0, temperature: float = 4.0) -> None:
        self.name, self.seed, self.temperature = name, seed, temperature
        self.container, _, self.special = name.partition("-")
        self.members = 3 if self.special == "members" else None
        self.views = 3 if self.special == "views" else 1
        self.sequences = self.special == "sequences"
        self.classes = WIDE if self.special == "wide" else CLASSES

    @cached_property
    def encoding(self) -> Encoding:
        """The encoding of its rows."""
        if self.special == "topk":
            return make_encoding("topk", classes=self.classes, params={"k": 3})
        if self.special == "hidden":
            head = np.random.default_rng(3).normal(size=(self.classes, HIDDEN)).astype(np.float16)
            return hidden_encoding(head.astype(np.float32), kept_as="f32")
        return make_encoding("f16", classes=self.classes)

    @cached_property
    def ids(self) -> np.ndarray:
        """Every sample's id."""
        shuffled = np.random.default_rng(1).permutation(SAMPLES) * 7 + 2
        if self.special in ("str", "views"):
            return np.array([f"id-{i:04d}" for i in shuffled])
        return shuffled if self.special in ("int", "sequences") else np.arange(SAMPLES)

    @cached_property
    def table(self) -> SampleTable | None:
        """The samples of a store of sequences: 0 to 2 rows each."""
        if not self.sequences:
            return None
        lengths = np.arange(SAMPLES) % 3
        prints = sample_fingerprints(np.arange(SAMPLES)[:, None])
        return SampleTable(ids=self.ids, lengths=lengths, fingerprints=prints, dense=False)

    @cached_property
    def plan(self) -> Manifest:
        """The plan of the store."""
        spec = {"U": IdSpec(kind="str", width_bytes=7), "i": IdSpec(kind="int")}[self.ids.dtype.kind]
        more: dict[str, Any] = {}
        if self.members:
            more["members"] = self.members
        if self.sequences:
            more["table"] = self.table
        if self.views > 1:
            more["views"] = ViewSpec(transform="m:f", parameters=("angle",))
            more["layout"] = RowLayout(kind="views", samples=SAMPLES, rows=SAMPLES * self.views, views=self.views)
        if self.special == "inputs":
            more["inputs"] = ArraySpec(dtype="<f4", row_shape=(5,))
        plan = plan_store(
            name="t",
            samples=SAMPLES,
            ids=spec if self.special in ("str", "views", "int", "sequences") else IdSpec(kind="int", dense_start=0),
            encoding=self.encoding,
            temperature=TemperatureSpec(default=self.temperature, captured=1.0, locked=False),
            mean="geometric" if self.members else "none",
            teachers=(),
            transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}, labelled=True),
            container=self.container,  # type: ignore[arg-type]
            rows_per_shard=ROWS_PER_SHARD,
            rows_per_chunk=ROWS_PER_CHUNK,
            **more,
        )
        compression = self.special if self.special in ("zstd", "gzip", "blosc") else None
        return replace(plan, shards=replace(plan.shards, compression=compression))

    def logits(self, rows: range) -> np.ndarray:
        """logits of these rows of the store, exact in f16, row maxima 0: [rows, (members,) classes]."""
        axis = (self.members,) if self.members else ()
        found = np.random.default_rng([self.seed, rows.start]).normal(size=(len(rows), *axis, self.classes))
        halves = (found * 4).astype(np.float16)
        return (halves - halves.max(axis=-1, keepdims=True)).astype(np.float32)

    def encoded(self, rows: range) -> dict[str, np.ndarray]:
        """The encoding's arrays of these rows."""
        if self.special == "hidden":
            hidden = np.random.default_rng([self.seed, rows.start]).normal(size=(len(rows), HIDDEN))
            return dict(self.encoding.encode(hidden.astype(np.float32)))
        if self.special == "topk":
            return dict(self.encoding.encode(self.logits(rows)))
        return {"targets": self.logits(rows).astype("<f2")}

    @cached_property
    def inputs(self) -> np.ndarray:
        """Every sample itself, [samples, 5]."""
        return np.random.default_rng(2).normal(size=(SAMPLES, 5)).astype(np.float32)

    def contents(self, rows: range) -> dict[str, Any]:
        """What a claim of these rows is to commit."""
        logits = self.logits(rows)
        positions = np.arange(rows.start, rows.stop) // self.views
        audit = Audit((1.0,))
        flat = logits.reshape(-1, self.classes)
        audit.add(flat, flat, captured=1.0)
        found: dict[str, Any] = {
            "encoded": self.encoded(rows),
            # Most labels are class 0 or none, so that whole chunks are all zeros or all ones: weak sums mix them up.
            "labels": np.where(positions < 40, 0, np.where(positions < 70, -1, positions % self.classes)),
            "audit": audit.to_json(),
        }
        if not self.sequences:
            found["ids"] = self.ids[positions]
            found["fingerprints"] = sample_fingerprints(np.arange(rows.start, rows.stop)[:, None])
        if self.special == "inputs":
            found["inputs"] = self.inputs[positions]
            found["fingerprints"] = sample_fingerprints(found["inputs"])
        if self.views > 1:
            found["view_parameters"] = np.arange(rows.start, rows.stop, dtype=np.float64)[:, None]
        return found

    def writer(self, root: Path) -> StoreWriter:
        """A writer of the store at `root`, created now or before."""
        return StoreWriter.create(root, self.plan, table=self.table, encoding=self.encoding)

    def commit(self, writer: StoreWriter, shard: int) -> None:
        """Write one shard."""
        with writer.claim(shard) as claim:
            claim.commit(**self.contents(claim.rows))

    def race(self, root: Path, shard: int) -> None:
        """Create or continue the store, and write one shard."""
        self.commit(self.writer(root), shard)

    def write(self, root: Path) -> None:
        """Write what is missing of the store at `root`, and publish it."""
        writer = self.writer(root)
        for shard in writer.missing_shards():
            self.commit(writer, shard)
            acknowledge(f"shard/{shard}")
        writer.finish()
        acknowledge("finished")


def acknowledge(what: str) -> None:
    """Say, to whoever traces this process, what it was told is done."""
    os.access(f"/acknowledged/{what}", os.F_OK)


def acknowledged(done: Callable[[], object]) -> None:
    """Do something to its end, and say so."""
    done()
    acknowledge("finished")


def prepared(task: dict[str, Any]) -> Callable[[], object]:
    """A function that runs a task, prepared up to its first change of a store."""
    what, root = task["do"], Path(task.get("root", "."))
    if what in ("write", "race"):
        kind = Kind(task["kind"], seed=task.get("seed", 0))
        assert kind.plan, "made before the tracer looks"
        return partial(kind.write, root) if what == "write" else partial(kind.race, root, task["shard"])
    if what == "repair":
        return partial(acknowledged, partial(repair, root))
    if what == "merge":
        return partial(acknowledged, partial(merge, [Path(source) for source in task["sources"]], root))
    if what == "convert":
        return partial(acknowledged, partial(convert_store, Path(task["source"]), root, container=task["container"]))
    from softlabels.precompute import load_job, precompute

    return partial(precompute, load_job(Path(task["job"])))


def child(task: dict[str, Any]) -> int:
    """Run a task; return the exit code, and write the error to the task's log."""
    do = prepared(task)
    if task.get("wait"):
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        do()
    except (SoftLabelsError, OSError, MemoryError) as error:
        said, code = f"{type(error).__name__}: {error}", REPORTED
    else:
        return 0
    # After the error is handled: until then a tracer may still make calls fail.
    Path(task["log"]).write_text(said)
    return code


def warm_up() -> None:
    """Import everything that a child imports, so that a failing call hits the store's code and not an import."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        # In a child, because zarr starts a thread at work, which would not live on in children forked later.
        with tempfile.TemporaryDirectory() as folder:
            for name in KINDS:
                Kind(name).write(Path(folder) / name)
                repair(Path(folder) / name)
        os.write(writable, "\n".join(sys.modules).encode())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as names:
        for name in names.read().splitlines():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    assert os.waitpid(pid, 0)[1] == 0, "the kinds of stores cannot be written"


def main() -> None:
    """Fork a child for each line, until stdin ends."""
    if "--torch" in sys.argv:
        import torch

        import softlabels.precompute  # noqa: F401

        torch.set_num_threads(1)
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            sys.stdin = open(os.devnull)  # noqa: SIM115
            # What a child prints must not be taken for the fork server's own lines.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = CRASHED
            try:
                code = child(task)
            finally:
                if code == CRASHED:
                    Path(task["log"]).write_text(traceback.format_exc())
                os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    main()
