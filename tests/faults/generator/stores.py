"""Stores that faults are done to, held in memory, and a plain model of what each of them must return.

Every kind of store exists three times: `current`; `rival`, another run of the same plan with other contents; and
`older`, an earlier version with another plan. A reader is judged by the digest that it claims: what it returns must be
what the store of that digest was made of.
"""

from __future__ import annotations

import gzip
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from softlabels.documents import seal
from softlabels.manifest import store_digest
from softlabels.store.store_documents import load_manifest, load_plan
from softlabels.transfer_set import ArrayTransferSet
from tests.faults.fork_server import KINDS, MORE_KINDS, SAMPLES, Kind

ALL_KINDS = (*KINDS, *MORE_KINDS)
NOT_CONTENTS = ("locks", "staging", "damaged")

Tree = dict[str, bytes]
"""The files of a store, contents by path."""

VERSIONS = {"current": (0, 4.0), "rival": (1, 4.0), "older": (2, 2.0)}
"""Random seed and default temperature of each version; the seed alone does not change the plan."""


WITH_JOB = ("zarr", "hdf5", "zarr-str")
"""Kinds that also have what a job leaves beside a store."""


def job_files(seed: int) -> Tree:
    """Return a job and a list of files as `precompute` writes them; what commands on a store do not read."""
    facts = "".join(f"image-{number:04d}.png\t{number} {number + seed}\n" for number in range(50))
    return {
        "job.json": seal({"base": "/data", "store": {"path": "s"}, "run": {"seed": seed}}),
        "transfer_set.tsv.gz": gzip.compress(facts.encode(), mtime=0),
    }


def read_tree(root: Path) -> Tree:
    """Return the files of a store, without what is not part of its contents."""
    found = {}
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        if inner.parts[0] not in NOT_CONTENTS and path.is_file() and not path.is_symlink():
            found[inner.as_posix()] = path.read_bytes()
    return found


def write_tree(root: Path, tree: Tree) -> Path:
    """Write these files into a folder that holds nothing else."""
    if root.exists():
        shutil.rmtree(root)
    folders = {os.path.dirname(f"{root}/{path}") for path in tree} | {str(root)}
    for folder in sorted(folders):
        os.makedirs(folder, exist_ok=True)
    for path, raw in tree.items():
        with open(f"{root}/{path}", "wb") as file:
            file.write(raw)
    return root


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a store must return, in plain Python: rows by sample, as they were handed to the writer.

    Attributes:
        ids: every sample's id, in the store's order.
        rows: by array, the rows of each sample (of sequences a list of rows, of views one a view).
        temperature: default temperature.
        kind: what the store was made of.
    """

    ids: list[Any]
    rows: dict[str, list[Any]]
    temperature: float
    kind: Kind

    @cached_property
    def positions(self) -> dict[Any, int]:
        """Position of each id."""
        return {name: number for number, name in enumerate(self.ids)}

    @classmethod
    def of(cls, kind: Kind) -> Model:
        """Return the model of a kind of store, made from the same contents as its writer gets."""
        per_shard, arrays = kind.plan.shards.rows_per_shard, {}
        for start in range(0, kind.plan.rows, per_shard):
            contents = kind.contents(range(start, min(start + per_shard, kind.plan.rows)))
            for name, array in {**contents.pop("encoded"), **contents}.items():
                if isinstance(array, np.ndarray):
                    arrays.setdefault(name, []).append(array)
        whole = {name: np.concatenate(parts) for name, parts in arrays.items()}
        rows: dict[str, list[Any]] = {name: list(array) for name, array in whole.items() if name != "ids"}
        if kind.sequences:
            assert kind.table is not None
            ends = np.cumsum(kind.table.lengths)
            rows = {
                name: [found[end - length : end] for end, length in zip(ends, kind.table.lengths, strict=True)]
                for name, found in rows.items()
            }
            rows["fingerprints"] = list(kind.table.fingerprints)
        elif kind.views > 1:
            rows = {
                name: [found[i : i + kind.views] for i in range(0, len(found), kind.views)]
                for name, found in rows.items()
            }
        return cls(ids=kind.ids.tolist(), rows=rows, temperature=kind.temperature, kind=kind)

    def expected(self, name: str, ids: list[Any], views: list[int] | None) -> Any:
        """Return the rows of an array for these samples, as one array; of sequences all rows, joined."""
        taken = [self.rows[name][self.positions[sample]] for sample in ids]
        if self.kind.views > 1:
            assert views is not None
            taken = [rows[view] for rows, view in zip(taken, views, strict=True)]
        elif self.kind.sequences and name != "fingerprints":
            taken = [row for rows in taken for row in rows]
        return taken

    def decoded(self, ids: list[Any], views: list[int] | None) -> Any:
        """Return log-probabilities at T = 1 up to a constant, decoded by the encoding as it was when it was made."""
        fields = self.kind.encoding.fields
        encoded = {name: np.array(self.expected(name, ids, views)) for name in fields}
        return self.kind.encoding.decode(encoded)


@dataclass(kw_only=True)
class Stores:
    """The versions of one kind of store.

    Attributes:
        name: name of the kind.
        trees: files by version; `begun` is `current` before its last shard.
        models: models by store digest.
        digests: store digest by version.
    """

    name: str
    trees: dict[str, Tree] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What the current version is made of."""
        return self.models[self.digests["current"]].kind

    @cached_property
    def inputs(self) -> ArrayTransferSet:
        """The samples that the targets are for, as a trainer has them."""
        kind = self.kind
        samples = kind.inputs if kind.special == "inputs" else np.arange(SAMPLES)[:, None]
        return ArrayTransferSet("x", samples, ids=kind.ids)

    @classmethod
    def make(cls, name: str, folder: Path) -> Stores:
        """Write every version of a kind of store with the real writer."""
        made = cls(name=name)
        for version, (seed, temperature) in VERSIONS.items():
            kind = Kind(name, seed=seed, temperature=temperature)
            root = folder / name / version
            kind.write(root)
            made._add(version, root, kind)
            # An unfinished store has the digest of its plan, which two runs of one plan share: the first one's counts.
            made.models.setdefault(store_digest(load_plan(root)), Model.of(kind))
            if name in WITH_JOB:
                made.trees[version] |= job_files(seed)
        begun, kind = folder / name / "begun", Kind(name)
        writer = kind.writer(begun)
        for shard in range(kind.plan.shards.count - 1):
            kind.commit(writer, shard)
        made._add("begun", begun, kind)
        if name in WITH_JOB:
            made.trees["begun"] |= job_files(0)
        shutil.rmtree(folder / name)
        return made

    def _add(self, version: str, root: Path, kind: Kind) -> None:
        self.trees[version] = read_tree(root)
        self.digests[version] = store_digest(load_manifest(root))
        self.models[self.digests[version]] = Model.of(kind)
