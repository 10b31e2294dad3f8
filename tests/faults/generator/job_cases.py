"""Faults between two runs of one job: its data, its teacher's weights, and the store that the second run continues.

The data keep their size and time, as a copy that preserves times leaves them. Rows are judged by the arithmetic that
the teacher is: whole numbers, exact in half precision.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from softlabels.progress import silent
from softlabels.store.store_reader import LocalRows
from softlabels.transfer_set import sample_fingerprints
from tests.faults.generator.damage import changed
from tests.faults.generator.judging import Verdict, WrongError
from tests.faults.generator.layers import BYTE_OPERATIONS, JOB_LAYERS, LATE, layer_of
from tests.faults.generator.stores import Tree, read_tree, write_tree

Rng = np.random.Generator

SAMPLES, FEATURES, CLASSES = 96, 6, 5
TIME_NS = 1_700_000_000_000_000_000

MODULE = """
from pathlib import Path

import numpy as np
import torch

def teacher():
    return torch.nn.Linear(6, 5, bias=False)

def loaded(path):
    net = teacher()
    with torch.no_grad():
        raw = (Path(__file__).parent / path).read_bytes()
        net.weight.copy_(torch.from_numpy(np.frombuffer(raw[:120].ljust(120, b"?"), "<f4").reshape(5, 6).copy()))
    return net
"""

JOB = """
[store]
path = "store"
name = "job"
format = "{container}"
rows_per_shard = 32
rows_per_chunk = 8

[transfer_set]
source = "npy"
arguments = {{ inputs = "inputs.npy" }}

[targets]
temperature = {temperature}

[[teachers]]
{teacher}

[run]
batch_size = 16
device = "cpu"
"""

TEACHERS = {
    "weights": 'model = "parts.py:teacher"\nweights = "weights.safetensors"',
    "file": 'model = "parts.py:loaded"\narguments = {{ path = "net.bin" }}'.replace("{{", "{").replace("}}", "}"),
}
"""A teacher whose weights softlabels loads, and one that loads a file of its own that an argument names."""

VERSIONS = {"current": (0, 4.0), "rival": (1, 4.0), "older": (2, 2.0)}
"""Seed of data and weights, and default temperature."""


def data_of(seed: int) -> Any:
    """Return the samples, whole numbers from 0 to 7: [samples, features]."""
    return np.random.default_rng([seed, 1]).integers(0, 8, size=(SAMPLES, FEATURES)).astype(np.float32)


def weights_of(seed: int) -> Any:
    """Return the teacher's weights, whole numbers from −2 to 2: [classes, features]."""
    return np.random.default_rng([seed, 2]).integers(-2, 3, size=(CLASSES, FEATURES)).astype(np.float32)


class JobShelf:
    """Jobs that were interrupted before their last shard, with their data, in every version; made when needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, str, str], Tree] = {}

    def tree(self, container: str, teacher: str, version: str) -> Tree:
        """Return every file of a job's folder; the store is in `store/`."""
        key = container, teacher, version
        if key not in self._made:
            self._made[key] = self._run(container, TEACHERS[teacher], *VERSIONS[version])
        return self._made[key]

    def _run(self, container: str, teacher: str, seed: int, temperature: float) -> Tree:
        root = write_tree(self._folder / "job", {})
        np.save(root / "inputs.npy", data_of(seed))
        save_file({"weight": weights_of(seed)}, root / "weights.safetensors")
        (root / "parts.py").write_text(MODULE)
        (root / "net.bin").write_bytes(weights_of(seed).astype("<f4").tobytes())
        (root / "job.toml").write_text(JOB.format(container=container, temperature=temperature, teacher=teacher))
        keep_time(root)
        run_job(root)
        tree = read_tree(root)
        last = "00000002"
        left = {"store/manifest.json", f"store/ledger/{last}.json", "store/store.h5", "store/index/receipts.npy"}
        return {path: raw for path, raw in tree.items() if path not in left and "/locks/" not in path}


def keep_time(root: Path) -> None:
    """Give the data the time that they had."""
    os.utime(root / "inputs.npy", ns=(TIME_NS, TIME_NS))


def run_job(root: Path) -> None:
    """Run or continue a job."""
    from softlabels.precompute import load_job, precompute

    torch.set_num_threads(1)
    precompute(load_job(root / "job.toml"), show=silent_run)


def silent_run(total: int, description: str, unit: str, **more: Any) -> Any:
    """Show no progress."""
    return silent(total, description, unit)


def run_job_case(shelf: JobShelf, root: Path, rng: Rng, layer: str, operation: str, verdict: Verdict) -> str:
    """Run one case: the job is continued; a store that it finishes holds no row of other data or another teacher."""
    container = "hdf5" if layer.startswith("hdf5") else "zarr" if layer.startswith("zarr") else ""
    container = container or str(rng.choice(["zarr", "hdf5"]))
    teacher = "file" if layer == "teacher file" else "weights"
    base = shelf.tree(container, teacher, "current")
    files = [path for path in base if job_layer_of(path) == layer]
    path = files[int(rng.integers(len(files)))]
    tree, told = dict(base), operation
    primary = str(rng.choice([*BYTE_OPERATIONS, "replace by another run's"])) if operation in LATE else operation
    if primary in BYTE_OPERATIONS:
        tree[path] = changed(rng, primary, base[path], 24)
        told = f"{primary} in {path}"
    elif primary == "exchange files":
        other = str(rng.choice([name for name in base if name != path and name.startswith("store/")]))
        tree[path], tree[other] = tree[other], tree[path]
        told = f"{path} and {other} change places"
    else:
        version = "older" if primary == "replay an older version" else "rival"
        theirs = shelf.tree(container, teacher, version)
        # Data and weights are replaced whole; of the store one file, as a receipt's shard belongs to its own data.
        tree[path] = theirs[path]
        told = f"{path} of the {version} version"
    if tree == base:
        verdict.void = "the bytes were equal before"
        return told
    write_tree(root, base if operation in LATE else tree)
    keep_time(root)
    if operation in LATE:
        _continue_with_damage(root, path, tree[path], verdict)
    else:
        with verdict.part("resume job"):
            run_job(root)
    if (root / "store" / "manifest.json").exists() or (root / "store" / "plan.json").exists():
        with verdict.part("read"):
            verdict.rows += judge_store(root / "store", verdict, whole=primary not in BYTE_OPERATIONS)
    return f"{container}: {told}"


def _continue_with_damage(root: Path, path: str, raw: bytes, verdict: Verdict) -> None:
    """Continue the job, and do the damage while its last shard is computed; then continue again."""
    from softlabels.precompute import load_job, precompute

    @contextlib.contextmanager
    def show(*arguments: Any, **more: Any) -> Any:
        target = root / path
        if target.exists():
            with target.open("r+b") as file:
                file.write(raw)
                file.truncate(len(raw))
            keep_time(root)
        with silent(1, "", "") as progress:
            yield progress

    for _ in range(2):
        with verdict.part("resume job"):
            precompute(load_job(root / "job.toml"), show=show)


def job_layer_of(path: str) -> str | None:
    """Return the layer of a file of a job's folder."""
    for layer, name in JOB_LAYERS.items():
        if path == name:
            return layer
    return layer_of(path.removeprefix("store/")) if path.startswith("store/") else None


def judge_store(root: Path, verdict: Verdict, *, whole: bool) -> int:
    """Return the rows of a store that are the teacher's of the samples as they were; raise WrongError for others.

    A row of another input passes where its fingerprint says so and only single bytes of the data were changed: a
    trainer that has the sample as it was is refused.
    """
    rows, count = LocalRows(root), 0
    inputs, weights = data_of(0), weights_of(0)
    logits = inputs @ weights.T
    logits -= logits.max(axis=1, keepdims=True)
    prints = sample_fingerprints(inputs)
    for begin in range(0, SAMPLES, 32):
        with verdict.part(f"shard {begin // 32}"):
            ids = np.arange(begin, begin + 32)
            found = rows.fetch(ids, ("targets", "fingerprints"))
            same = np.all(found["targets"] == logits[ids].astype(np.float16), axis=1)
            told = np.any(found["fingerprints"] != prints[ids], axis=1)
            if not whole and np.all(same | told):
                verdict.harmless = "the fingerprint of the changed sample says so to every trainer"
            elif not np.all(same):
                raise WrongError(f"{int((~same).sum())} rows are of other data or another teacher")
            count += 32
    rows.close()
    return count
