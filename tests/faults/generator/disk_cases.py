"""Faults in the files of a store: chosen, done before a reader looks, after its first read, or under its open files."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from tests.faults.generator.commands import COMMANDS, Commands
from tests.faults.generator.damage import changed
from tests.faults.generator.judging import Questions, Verdict
from tests.faults.generator.layers import BYTE_OPERATIONS, LATE, layer_of
from tests.faults.generator.readers import READERS, Place
from tests.faults.generator.stores import ALL_KINDS, Stores, Tree, write_tree

Rng = np.random.Generator

OBSERVERS = (*READERS, *COMMANDS)

TRAINED = ("zarr", "hdf5", "zarr-str", "hdf5-int", "zarr-zstd", "hdf5-gzip", "zarr-wide", "zarr-topk", "zarr-hidden")
TRAINED_TOO = ("hdf5-wide", "hdf5-topk", "hdf5-hidden", "zarr-blosc", "zarr-inputs", "hdf5-inputs")
"""Kinds of one row a sample, which a student is trained on here."""

Damage = Callable[[], None]


class Shelf:
    """The stores of every kind, written once and shared by all cases."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Stores] = {}

    def stores(self, kind: str) -> Stores:
        """Return the stores of a kind."""
        if kind not in self._made:
            self._made[kind] = Stores.make(kind, self._folder)
        return self._made[kind]

    def make_all(self) -> None:
        """Write every kind now, so that processes forked later share them."""
        for kind in ALL_KINDS:
            self.stores(kind)

    @cached_property
    def kinds_with(self) -> dict[str, list[str]]:
        """Kinds that have a file in each layer of the disk; raises where a file is in no layer."""
        found: dict[str, list[str]] = {}
        for kind in ALL_KINDS:
            for path in self.stores(kind).trees["current"]:
                layer = layer_of(path)
                assert layer is not None, f"{path} of a {kind} store is in no layer of the table: add it to layers.py"
                if kind not in found.setdefault(layer, []):
                    found[layer].append(kind)
        return found


class DiskFault:
    """One fault in the files of a store.

    Args:
        rng: random numbers of the case.
        stores: the store in its versions.
        root: where the store lies.
        layer, operation: the pair to try.
    """

    def __init__(self, rng: Rng, stores: Stores, root: Path, layer: str, operation: str) -> None:
        self.rng, self.stores, self.root, self.layer, self.operation = rng, stores, root, layer, operation
        self.base: Tree = stores.trees["current"]
        self.unites = self.silent = False
        self.told = ""

    def tree_after(self, operation: str) -> Tree:
        """Return the store's files after an operation; of what is done, `told` says more."""
        tree = dict(self.base)
        files = [path for path in tree if layer_of(path) == self.layer]
        path = files[int(self.rng.integers(len(files)))]
        if operation in BYTE_OPERATIONS:
            row_bytes = self._row_bytes(path)
            for _ in range(4):  # an exchange of equal bytes changes nothing: draw again
                tree[path] = changed(self.rng, operation, self.base[path], row_bytes)
                if tree[path] != self.base[path]:
                    break
            self.told = f"{operation} in {path}"
        elif operation == "exchange files":
            others = [other for other in files if other != path and self.base[other] != self.base[path]]
            if not others or self.rng.random() < 0.1:
                others = [other for other in tree if other != path]
            other = others[int(self.rng.integers(len(others)))]
            tree[path], tree[other] = tree[other], tree[path]
            self.told = f"{path} and {other} change places"
        else:
            version = "older" if operation == "replay an older version" else "rival"
            replaced = self._scope(path, version)
            for name in replaced:
                tree[name] = self.stores.trees[version][name]
            self.told = f"{sorted(replaced)} of the {version} version"
        return tree

    def before(self) -> bool:
        """Do the fault before anybody looks; return whether anything changed."""
        tree = self.tree_after(self.operation)
        write_tree(self.root, tree)
        return tree != self.base

    def late(self) -> Damage:
        """Return the fault to do after the first read, in place, or under open files."""
        if self.operation == "change after the first read":
            primary = str(self.rng.choice([*BYTE_OPERATIONS, "replay an older version", "replace by another run's"]))
            return self._in_place(self.tree_after(primary))
        whole = self.rng.random() < 0.5
        # Another run of the same plan is as good a source of shards, to a command that unites or adds to them.
        version = "older" if self.unites and whole else str(self.rng.choice(["older", "rival"]))
        if whole:
            # An unfinished store is replaced by one that is at the same point.
            theirs = self.stores.trees[version]
            tree, scope = {path: theirs[path] for path in self.base if path in theirs}, "the whole store"
        else:
            tree = dict(self.base)
            names = [path for path in tree if layer_of(path) == self.layer and path in self.stores.trees[version]]
            tree |= {path: self.stores.trees[version][path] for path in names}
            scope = f"every {self.layer}"
        how = str(self.rng.choice(["folder renamed", "files renamed", "files overwritten"]))
        self.told = f"{scope} replaced by the {version} version: {how}"
        if how == "folder renamed":
            return lambda: self._swap_folder(tree)
        return self._rename_over(tree) if how == "files renamed" else self._in_place(tree)

    def _row_bytes(self, path: str) -> int:
        if "/" not in path or path.startswith(("ledger/", "index/")):
            return 16
        name = path.split("/")[0]
        arrays = self.stores.kind.plan.arrays
        if name in arrays:
            return arrays[name].row_bytes
        return arrays[str(self.rng.choice(list(arrays)))].row_bytes

    def _scope(self, path: str, version: str) -> list[str]:
        """Return which files are taken over: one, with its receipt, or all of its layer."""
        theirs = self.stores.trees[version]
        names = [path]
        shard = _shard_of(path)
        choice = int(self.rng.integers(3))
        # A shard together with its receipt is another run's only to a manifest that says so.
        if choice == 1 and shard is not None and ("manifest.json" in self.base or version == "older"):
            names = [other for other in self.base if _shard_of(other) == shard]
        elif choice == 2:
            names = [other for other in self.base if layer_of(other) == self.layer]
        return [name for name in names if name in theirs]

    def _in_place(self, tree: Tree) -> Damage:
        # As a disk does it, or a network file system: without a write of this machine that anybody could be told of.
        self.silent = self.rng.random() < 0.5 and all(len(raw) == len(self.base[path]) for path, raw in tree.items())
        self.told += ", in silence" if self.silent else ""

        def do() -> None:
            for path, raw in tree.items():
                if raw == self.base[path]:
                    continue
                with open(self.root / path, "r+b") as file:
                    if self.silent:
                        with mmap.mmap(file.fileno(), 0) as pages:
                            pages[:] = raw
                    else:
                        file.write(raw)
                        file.truncate(len(raw))

        return do

    def _rename_over(self, tree: Tree) -> Damage:
        def do() -> None:
            for path, raw in tree.items():
                if raw != self.base.get(path):
                    temporary = self.root / f"{path}.new"
                    temporary.write_bytes(raw)
                    os.replace(temporary, self.root / path)

        return do

    def _swap_folder(self, tree: Tree) -> None:
        fresh = write_tree(self.root.with_name(self.root.name + "-new"), tree)
        gone = self.root.with_name(self.root.name + "-gone")
        os.rename(self.root, gone)
        os.rename(fresh, self.root)
        shutil.rmtree(gone)


def _shard_of(path: str) -> int | None:
    parts = path.split("/")
    if parts[0] in ("shards", "ledger", "sums"):
        return int(parts[1].split(".")[0])
    return int(parts[2]) if len(parts) > 2 and parts[1] == "c" else None


def kinds_for(shelf: Shelf, layer: str, observer: str) -> list[str]:
    """Return the kinds of stores that a case of this layer and observer may take."""
    kinds = shelf.kinds_with.get(layer, [])
    return [kind for kind in kinds if observer != "distill" or kind in (*TRAINED, *TRAINED_TOO)]


def run_disk_case(
    shelf: Shelf, place: Place, rng: Rng, layer: str, operation: str, observer: str, verdict: Verdict
) -> str:
    """Run one case; return what was done, in words."""
    kinds = kinds_for(shelf, layer, observer)
    kind = str(rng.choice(kinds))
    stores = shelf.stores(kind)
    fault = DiskFault(rng, stores, place.root, layer, operation)
    questions = Questions(rng, stores.models[stores.digests["current"]])
    fault.unites = observer in ("merge", "resume", "repair", "verify")
    if observer == "resume":
        # A shard is still to be computed.
        fault.base = {path: raw for path, raw in stores.trees["begun"].items() if layer_of(path) in shelf.kinds_with}
        if not any(layer_of(path) == layer for path in fault.base):
            fault.base = {path: raw for path, raw in fault.stores.trees["current"].items() if path != "manifest.json"}
        if not any(layer_of(path) == layer for path in fault.base):
            fault.base = stores.trees["current"]
    if operation in LATE:
        late = fault.late()
        place.every_read = fault.silent
        write_tree(place.root, fault.base)
        _look_late(place, stores, questions, observer, late, verdict)
    else:
        if not fault.before():
            verdict.void = "the bytes were equal before"
            return f"{kind}: {fault.told}"
        _look(place, stores, questions, observer, verdict)
    if verdict.rows == 0 and not verdict.codes and not verdict.harmless and observer not in ("verify",):
        verdict.wrong += [] if verdict.wrong else ["nothing was read and nothing was refused"]
    return f"{kind}: {fault.told}"


def _look(place: Place, stores: Stores, questions: Questions, observer: str, verdict: Verdict) -> None:
    if observer in COMMANDS:
        COMMANDS[observer](Commands(place, stores, questions, None), verdict)
        return
    reader = READERS[observer](place, stores, questions)  # type: ignore[call-arg]
    try:
        reader.open(verdict)
        reader.read(verdict)
    finally:
        reader.close()


def _look_late(
    place: Place, stores: Stores, questions: Questions, observer: str, late: Damage, verdict: Verdict
) -> None:
    if observer in COMMANDS:
        COMMANDS[observer](Commands(place, stores, questions, late), verdict)
        return
    reader = READERS[observer](place, stores, questions)  # type: ignore[call-arg]
    try:
        reader.open(verdict)
        reader.read(verdict)
        assert not verdict.codes, f"the undamaged store was refused: {verdict.codes}"
        late()
        reader.read(verdict)
    finally:
        reader.close()
