"""Faults on the trainer's own disk: its cache of rows and its checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from softlabels.store.store_reader import LocalRows
from softlabels.target_store import TargetStore
from softlabels_client.cache import CachedRows
from softlabels_client.training.checkpoint import CheckpointFolder
from tests.faults.generator.damage import changed
from tests.faults.generator.disk_cases import Shelf
from tests.faults.generator.judging import Questions, Verdict, WrongError
from tests.faults.generator.layers import BYTE_OPERATIONS, LATE, LOCKS, layer_of
from tests.faults.generator.readers import Place, expected_weights, trained
from tests.faults.generator.stores import VERSIONS, Stores, Tree, write_tree

Rng = np.random.Generator

CACHED = ("zarr", "hdf5-int", "zarr-str", "zarr-views", "zarr-wide", "zarr-inputs", "zarr-hidden", "zarr-members")
WITH_IDS = ("hdf5-int", "zarr-str", "zarr-views")
"""Kinds whose cache has a file of ids."""

NOT_TRAINED = ("zarr-views", "zarr-members")
"""Kinds that the student here cannot be trained on."""

CHECKPOINTED = ("zarr", "hdf5-int")

CACHE_OBSERVERS = ("cache", "distill")
CHECKPOINT_OBSERVERS = ("distill",)


class TrainersDisk:
    """Filled caches and checkpoints of every version of the stores, made when they are first needed."""

    def __init__(self, folder: Path, shelf: Shelf) -> None:
        self._folder, self._shelf = folder, shelf
        self._made: dict[tuple[str, str, str], Tree] = {}

    def cache(self, kind: str, version: str) -> Tree:
        """Return the files of a cache that holds every row of a store, under the names of the current version's."""
        return self._tree("cache", kind, version)

    def checkpoints(self, kind: str, version: str) -> Tree:
        """Return the checkpoints of a training on a store that was ended before its last steps."""
        return self._tree("checkpoints", kind, version)

    def _tree(self, what: str, kind: str, version: str) -> Tree:
        key = what, kind, version
        if key not in self._made:
            stores = self._shelf.stores(kind)
            root = write_tree(self._folder / "source", stores.trees[version])
            target = self._folder / "made"
            with contextlib.closing(LocalRows(root)) as rows:
                tree = _fill_cache(rows, target) if what == "cache" else _train(stores, rows, target)
            mine, theirs = stores.digests["current"], stores.digests[version]
            self._made[key] = {path.replace(theirs, mine): raw for path, raw in tree.items()}
        return self._made[key]


def _read_files(folder: Path) -> Tree:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _fill_cache(rows: LocalRows, target: Path) -> Tree:
    write_tree(target, {})
    store = TargetStore(CachedRows(rows, folder=target), where="fill")
    arrays = store.manifest.arrays
    wanted: dict[str, Any] = {
        "fingerprints": True,
        "inputs": "inputs" in arrays,
        "view_parameters": "view_parameters" in arrays,
    }
    for epoch in range(store.manifest.layout.views):
        for _ in store.epoch(seed=1, epoch=epoch, batch_size=32, **wanted):
            pass
    store.close()
    return _read_files(target)


def _train(stores: Stores, rows: LocalRows, target: Path) -> Tree:
    write_tree(target, {})
    trained(stores, TargetStore(rows, where="train"), checkpoints=CheckpointFolder(target, every=2))
    tree = _read_files(target)
    del tree[max(tree)]  # the last one, written at the end: now there is something left to train
    return tree


class _Fault:
    """An operation on the files of a cache or the checkpoints of a training."""

    def __init__(self, rng: Rng, layer: str, trees: Callable[[str], Tree]) -> None:
        self.rng, self.layer, self.trees = rng, layer, trees
        self.base = trees("current")
        self.told = ""

    def tree_after(self, operation: str) -> Tree:
        """Return the files after an operation."""
        tree = dict(self.base)
        files = [path for path in tree if not LOCKS.fullmatch(path)]
        mine = [path for path in files if layer_of(path) == self.layer] or files
        path = mine[-1] if self.rng.random() < 0.8 else mine[int(self.rng.integers(len(mine)))]
        if operation in LATE:
            operation = str(self.rng.choice([*BYTE_OPERATIONS, "replace by another run's"]))
        if operation in BYTE_OPERATIONS:
            for _ in range(4):
                tree[path] = changed(self.rng, operation, self.base[path], int(self.rng.choice([16, 24, 40, 48])))
                if tree[path] != self.base[path]:
                    break
            self.told = f"{operation} in {path[-30:]}"
        elif operation == "exchange files":
            other = str(self.rng.choice([name for name in files if name != path]))
            tree[path], tree[other] = tree[other], tree[path]
            self.told = f"{path[-30:]} and {other[-30:]} change places"
        else:
            version = "older" if operation == "replay an older version" else "rival"
            names = [path] if self.rng.random() < 0.5 else files
            theirs = self.trees(version)
            tree |= {name: theirs[name] for name in names if name in theirs}
            if version == "older" and len(mine) > 1 and self.rng.random() < 0.5:
                tree[path] = self.base[mine[0]]
            self.told = f"{[name[-30:] for name in names]} of the {version} version"
        return tree


def run_cache_case(
    shelf: Shelf,
    disk: TrainersDisk,
    place: Place,
    rng: Rng,
    layer: str,
    operation: str,
    observer: str,
    verdict: Verdict,
) -> str:
    """Run one case of a damaged cache: rows are right, and none is refused; it only saves requests."""
    kinds = WITH_IDS if layer == "cached ids" else CACHED
    kind = str(rng.choice([name for name in kinds if observer != "distill" or name not in NOT_TRAINED]))
    stores = shelf.stores(kind)
    fault = _Fault(rng, layer, lambda version: disk.cache(kind, version))
    tree = fault.tree_after(operation)
    if tree == fault.base:
        verdict.void = "the bytes were equal before"
        return f"{kind}: {fault.told}"
    questions = Questions(rng, stores.models[stores.digests["current"]])
    write_tree(place.root, stores.trees["current"])
    late = operation in LATE
    write_tree(place.cache, fault.base if late else tree)
    store = TargetStore(CachedRows(LocalRows(place.root), folder=place.cache), where="cached")
    with contextlib.closing(store):
        if late:
            _read(stores, store, questions, observer, verdict)
            _overwrite(place.cache, fault.base, tree, renamed=operation == LATE[1] and rng.random() < 0.5)
        _read(stores, store, questions, observer, verdict)
        _read(stores, store, questions, observer, verdict)
    return f"{kind}: {fault.told}"


def _read(stores: Stores, store: TargetStore, questions: Questions, observer: str, verdict: Verdict) -> None:
    if observer == "cache":
        questions.everything(store, stores.models, verdict)
        return
    with verdict.part("distill"):
        if trained(stores, store) != expected_weights(stores, store.digest):
            raise WrongError("the student learned something else")
        verdict.rows += len(store)


def run_checkpoint_case(
    shelf: Shelf, disk: TrainersDisk, place: Place, rng: Rng, operation: str, verdict: Verdict
) -> str:
    """Run one case of damaged checkpoints: the resumed student is the undisturbed one, or resuming is refused."""
    kind = str(rng.choice(CHECKPOINTED))
    stores = shelf.stores(kind)
    fault = _Fault(rng, "checkpoint", lambda version: disk.checkpoints(kind, version))
    tree = fault.tree_after(operation)
    if tree == fault.base:
        verdict.void = "the bytes were equal before"
        return f"{kind}: {fault.told}"
    write_tree(place.root, stores.trees["current"])
    late = operation in LATE
    write_tree(place.cache, fault.base if late else tree)
    pending = iter([lambda: _overwrite(place.cache, fault.base, tree, renamed=operation == LATE[1])] if late else [])

    def evaluate(net: Any) -> float:
        for damage in pending:
            damage()
        return 0.0

    with contextlib.closing(TargetStore(LocalRows(place.root), where="here")) as store:
        # Twice: the second resumes from what the first wrote, or from what was damaged while it ran.
        for _ in range(2):
            with verdict.part("resume"):
                found = trained(
                    stores, store, checkpoints=CheckpointFolder(place.cache, every=2, resume=True), evaluate=evaluate
                )
                if found != expected_weights(stores, store.digest):
                    raise WrongError("the student is another one")
                verdict.rows += len(store)
    return f"{kind}: {fault.told}"


def _overwrite(folder: Path, base: Tree, tree: Tree, *, renamed: bool) -> None:
    for path, raw in tree.items():
        if raw == base[path]:
            continue
        if renamed:
            (folder / f"{path}.new").write_bytes(raw)
            os.replace(folder / f"{path}.new", folder / path)
        elif (folder / path).exists():
            with open(folder / path, "r+b") as file:
                file.write(raw)
                file.truncate(len(raw))


def unlisted(disk: TrainersDisk) -> Iterator[str]:
    """Yield files of a cache that are in no layer."""
    for kind in CACHED:
        for path in disk.cache(kind, "current"):
            if not LOCKS.fullmatch(path) and layer_of(path) is None:
                yield path


assert set(VERSIONS) == {"current", "rival", "older"}
