"""Store writer: shards are committed one by one in any order, and the manifest is published last.

A commit writes the shard's files, makes each durable, and then writes its receipt (`softlabels.store.ledger`): a reader
sees either no shard or a whole one, and a writer that dies loses only the shards that it had not committed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from softlabels.atomic_files import TEMPORARY, make_folder, sync_folder, write_atomically
from softlabels.documents import seal
from softlabels.encodings import Encoding
from softlabels.errors import (
    ChecksumError,
    ManifestError,
    ShapeMismatchError,
    ShardClaimedError,
    ShardConflictError,
    TruncatedError,
)
from softlabels.ids import IdArray, to_fixed_bytes
from softlabels.manifest import Manifest
from softlabels.store.chunks import ShardFile, masked, salt_of, shard_rows, sums_of_shard, sums_path
from softlabels.store.commit_checks import check_publishable, check_readable, check_same_contents, check_values
from softlabels.store.containers import container_of
from softlabels.store.ledger import (
    LEDGER_FOLDER,
    STAGING_FOLDER,
    FileRecord,
    Ledger,
    Receipt,
    receipts_file,
    summarize,
)
from softlabels.store.sample_index import SampleTable, index_files
from softlabels.store.shard_checks import Report, ShardChecks
from softlabels.store.store_documents import (
    JOB,
    MANIFEST,
    RECEIPTS,
    constant_files,
    load_document,
    load_manifest,
    load_plan,
)
from softlabels.store.store_plan import has_file, initialize_store
from softlabels.store.store_reader import LocalRows
from softlabels.transfer_set import UNLABELLED, FingerprintSum


class StoreWriter:
    """Writer of one store, from `create` or `resume`; several, in one process or many, may write different shards."""

    def __init__(self, root: Path, plan: Manifest) -> None:
        self.root = root
        self.plan = plan
        self.ledger = Ledger(root, plan)
        self._container = container_of(plan)
        make_folder(root / STAGING_FOLDER)
        self._purge()

    @classmethod
    def create(
        cls, root: Path, plan: Manifest, *, table: SampleTable | None = None, encoding: Encoding | None = None
    ) -> StoreWriter:
        """Create a store, or open one of the very same plan to continue it.

        Args:
            table: samples, for a layout of sequences.
            encoding: the encoding with its learnt arrays, for one that learns.
        Raises:
            ManifestError: the plan was made with another table or encoding than these.
            StoreExistsError: the folder holds a store of another plan, or files that are not a store.
        """
        files = ({} if encoding is None else constant_files(encoding)) | ({} if table is None else table.files())
        return cls.create_with_files(Path(root), plan, files)

    @classmethod
    def create_with_files(cls, root: Path, plan: Manifest, files: Mapping[str, bytes]) -> StoreWriter:
        """Do as `create`, with the contents by path of the metadata files that the plan lists."""
        if {path: hashlib.sha256(contents).hexdigest() for path, contents in files.items()} != plan.metadata_sha256:
            raise ManifestError("the plan was made with another sample table or encoding: pass the same to `create`")
        return cls(root, initialize_store(root, plan, files))

    @classmethod
    def resume(cls, root: Path) -> StoreWriter:
        """Open the unfinished store at `root` to continue it.

        Raises:
            UnknownStoreError: there is no store. ManifestError: its plan is missing or damaged.
        """
        # First, for UnknownStoreError where there is no store: `load_plan` would only report a missing plan.
        load_manifest(Path(root))
        return cls(Path(root), load_plan(Path(root)))

    @property
    def finished(self) -> bool:
        """Whether the manifest is published."""
        return (self.root / MANIFEST).exists()

    def missing_shards(self) -> list[int]:
        """Return the numbers of the shards that are not committed, in order."""
        return sorted(set(range(self.plan.shards.count)) - set(self.ledger.committed()))

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[ShardClaim]:
        """Hold a shard exclusively inside this context, to write it; ShardClaimedError if another writer holds it."""
        with self.ledger.claim(shard):
            yield ShardClaim(self, shard)

    def keep_job(self, document: Mapping[str, Any]) -> None:
        """Write the job beside the plan, for `softlabels resume`."""
        # Exclusively: several processes may run one job at the same time, and share the temporary file's name.
        with self.ledger.exclusive():
            write_atomically(self.root / JOB, [seal(document)])

    def finish(self) -> Manifest:
        """Publish the manifest: from now on the store is complete and never changes. Idempotent.

        Raises:
            TruncatedError: a shard is missing. BadIdsError: a sample id is repeated.
            ManifestError: a metadata file is missing or damaged, or the store was published with other shards.
        """
        plan = self.plan
        with self.ledger.exclusive():
            # Under the lock: of several processes that finish a store, one publishes it and the others return here.
            if self.finished:
                return self._published()
            missing = self.missing_shards()
            if missing:
                raise TruncatedError(
                    f"{len(missing)} of {plan.shards.count} shards of {self.root} are not committed (the first is "
                    f"shard {missing[0]}): run `softlabels resume`",
                    shards=missing[:100],
                )
            for path, digest in plan.metadata_sha256.items():
                if not has_file(self.root / path, digest):
                    raise ManifestError(
                        f"{self.root / path} is not what the plan says, so the store cannot be published: run "
                        "`softlabels repair`, then `softlabels resume`"
                    )
            # A commit may have failed at its very last step, the fsync of this folder: the receipt is visible then, but
            # not durable.
            sync_folder(self.root / LEDGER_FOLDER)
            summary = summarize(self.ledger.receipts(range(plan.shards.count)))
            if len(summary.digests) < plan.shards.count * hashlib.sha256().digest_size:
                raise TruncatedError(f"a receipt of {self.root} was removed meanwhile: run `softlabels resume`")
            files = self._container.metadata(plan)
            if plan.ids.dense_start is None and plan.layout.kind != "sequences":
                files |= index_files(stored_ids(self.root, plan))
            if plan.format_version >= 2:
                files[RECEIPTS] = receipts_file(summary)
            written = {path: write_atomically(self.root / path, [contents])[1] for path, contents in files.items()}
            manifest = plan.finish(
                ledger=summary.sha256,
                fingerprint=plan.transfer_set.fingerprint or summary.fingerprint,
                audit=summary.audit,
                metadata_sha256=written | dict(plan.metadata_sha256),
            )
            raw = seal(manifest.to_json())
            check_publishable(self.root, manifest, raw)
            # Last of all: where the manifest exists, everything that it covers is durable.
            write_atomically(self.root / MANIFEST, [raw])
            return manifest

    def _published(self) -> Manifest:
        """Return the manifest; raise ManifestError where it is of another plan, or of other shards than are there."""
        manifest = load_document(self.root, MANIFEST)
        if manifest.plan_sha256 != self.ledger.plan_sha256:
            raise ManifestError(
                f"{self.root / MANIFEST} belongs to another plan than the shards beside it: run `softlabels repair`, "
                "then `softlabels resume`"
            )
        for _ in Ledger(self.root, manifest).receipts(range(manifest.shards.count)):
            pass  # which compares each of them with what was published
        return manifest

    def commit(
        self,
        shard: int,
        arrays: Mapping[str, NDArray[Any]],
        *,
        fingerprint: str,
        audit: dict[str, Any],
        salt: int | None = None,
    ) -> Receipt:
        """Write and commit a shard whose claim the caller holds; see `ShardClaim.commit`.

        Args:
            salt: salt that the rows must have, where they are copied from a store that has one.
        """
        files, rows = self._container.shard_files(self.plan, shard, arrays), shard_rows(self.plan, shard)
        expected, salt = salt, None
        if self.plan.row_sum_names:
            # Of the arrays in memory, before anything is written: what is read later is compared with these.
            sums_RA = sums_of_shard(self.plan, arrays)
            salt = salt_of(sums_RA)
            if expected not in (None, salt):
                raise ChecksumError(f"shard {shard}: the rows are not those whose sums were kept when they were made")
            stored = masked(sums_RA, np.asarray(rows), salt).astype("<u4", copy=False)
            files.append(ShardFile(path=sums_path(shard), buffers=[stored.tobytes()], parts={}))
        receipt = Receipt(
            shard=shard,
            plan_sha256=self.ledger.plan_sha256,
            rows=(rows.start, rows.stop),
            files={file.path: FileRecord(size=file.size_bytes, sha256="0" * 64) for file in files},
            parts={name: part for file in files for name, part in file.parts.items()},
            fingerprint=fingerprint,
            audit=audit,
            salt=salt,
        )
        check_readable(receipt, self.plan)
        # Another process may have committed the shard after it was listed as missing and before it was claimed here.
        existing = self.ledger.read(shard)
        if existing is not None:
            check_same_contents(self.root, existing, files)
            return existing
        records = {}
        for file in files:
            staging = self.ledger.staging(shard, file.path)
            size, sha256 = write_atomically(self.root / file.path, file.buffers, staging=staging)
            records[file.path] = FileRecord(size=size, sha256=sha256)
        receipt = replace(receipt, files=records)
        self.add(receipt, files)
        return receipt

    def add(self, receipt: Receipt, written: Sequence[ShardFile] = ()) -> None:
        """Read a shard's files back as a reader would, and write its receipt: from now on its rows exist.

        Args:
            written: what was written, where it is in memory.
        Raises:
            ChecksumError: a file is not what was written. ShardConflictError: the store is published with other rows.
        """
        shard = receipt.shard
        checks = ShardChecks(self.root, self.plan, None, index=None, report=Report(root=str(self.root)))
        for fault in checks.read_back(receipt, written):
            raise ChecksumError(
                f"shard {shard} of {self.root} was not committed: what was read back is not what was written "
                f"({fault}); check the disk and the memory of this machine, then run `softlabels resume`",
                shard=shard,
            )
        if self.finished:
            published = Ledger(self.root, load_manifest(self.root)).published_sha256(shard)
            if published not in (None, receipt.sha256):
                raise ShardConflictError(
                    f"{self.root} is published with another shard {shard} than this one: run `softlabels repair`, "
                    "which unpublishes it, then `softlabels resume`",
                    shard=shard,
                )
        # After the files: a receipt must never list bytes that a power failure could take away.
        self.ledger.write(receipt)

    def _purge(self) -> None:
        """Remove the temporary files of writers that died."""
        for path in sorted((self.root / STAGING_FOLDER).glob("*" + TEMPORARY)):
            if path.name[:8].isdigit():
                # Under the claim of its shard, which the writer of the file holds as long as it lives.
                with contextlib.suppress(ShardClaimedError), self.ledger.claim(int(path.name[:8])):
                    path.unlink(missing_ok=True)


class ShardClaim:
    """One shard, held exclusively by this writer inside its `claim` context; `rows` are its row numbers."""

    def __init__(self, writer: StoreWriter, shard: int) -> None:
        self._writer = writer
        self.shard = shard
        self.rows = shard_rows(writer.plan, shard)

    def commit(
        self,
        *,
        encoded: Mapping[str, NDArray[Any]],
        ids: IdArray | None = None,
        fingerprints: NDArray[np.uint8] | None = None,
        labels: NDArray[np.int64] | None = None,
        view_parameters: NDArray[np.float64] | None = None,
        inputs: NDArray[Any] | None = None,
        audit: dict[str, Any],
    ) -> Receipt:
        """Write the shard's files and, once all of them are durable, its receipt.

        Committing the same contents again changes nothing and returns the existing receipt.

        Args:
            encoded: arrays of the encoding by name, [rows of the shard, ...] or, with members, [rows, members, ...].
            ids, fingerprints: [rows] sample ids and [rows, 16] of their contents; None for sequences.
            labels: [rows] hard labels; None where no row has one.
            view_parameters: [rows, parameters], where the store records them.
            inputs: [rows, ...] samples, where the store keeps them; ignored where it does not.
            audit: `Audit.to_json()` of these rows.
        Raises:
            ShapeMismatchError: arrays of another shape or dtype than planned, or other ids than planned.
            NonFiniteLogitsError: targets with NaN. RequestError: labels that are no classes.
            ShardConflictError: the shard is committed with other contents.
        """
        plan = self._writer.plan
        arrays: dict[str, NDArray[Any]] = dict(encoded)
        total = FingerprintSum()
        if ids is not None and fingerprints is not None:
            self._check_dense_ids(ids)
            as_strings = plan.ids.kind == "str"
            arrays["ids"] = to_fixed_bytes(ids, width_bytes=plan.ids.width_bytes) if as_strings else ids
            arrays["fingerprints"] = fingerprints
            total.add(ids, fingerprints)
        if view_parameters is not None:
            arrays["view_parameters"] = view_parameters
        if inputs is not None and "inputs" in plan.arrays:
            arrays["inputs"] = inputs
        if "labels" in plan.arrays:
            found = np.full(len(self.rows), UNLABELLED, dtype=np.int64) if labels is None else labels
            arrays["labels"] = found.astype(plan.arrays["labels"].dtype)
        if set(arrays) != set(plan.arrays):
            raise ShapeMismatchError(f"a shard needs the arrays {sorted(plan.arrays)}, not {sorted(arrays)}")
        for name, spec in plan.arrays.items():
            expected = (len(self.rows), *spec.row_shape)
            if arrays[name].shape != expected or arrays[name].dtype != np.dtype(spec.dtype):
                raise ShapeMismatchError(
                    f"array {name!r} of shard {self.shard} is {arrays[name].dtype}{list(arrays[name].shape)}, the plan "
                    f"says {spec.dtype}{list(expected)}"
                )
        check_values(arrays, plan, self.rows)
        return self._writer.commit(self.shard, arrays, fingerprint=total.hexdigest(), audit=audit)

    def _check_dense_ids(self, ids: IdArray) -> None:
        plan = self._writer.plan
        if plan.ids.dense_start is None:
            return
        planned = plan.ids.dense_start + np.asarray(self.rows) // plan.layout.views
        if not np.array_equal(ids, planned):
            raise ShapeMismatchError(
                f"the ids of shard {self.shard} are not {planned[0]} … {planned[-1]} as the plan says: the transfer "
                "set changed, or it was planned as dense by mistake"
            )


def stored_ids(root: Path, manifest: Manifest) -> IdArray:
    """Return the id of every sample, in the order of the store, read from its shards.

    Raises:
        RowsNotCommittedError, ChecksumError, TruncatedError: a shard is missing or damaged.
    """
    # By row number, since the id index may be what is missing; a shard at a time, since row numbers and addresses of
    # the whole store would take more memory than its ids.
    rows = LocalRows(root, manifest=manifest, verify="every-read")
    shards = (np.asarray(shard_rows(manifest, shard)) for shard in range(manifest.shards.count))
    joined: IdArray = np.concatenate([rows.fetch_rows(numbers, ("ids",))["ids"] for numbers in shards])
    # With views an id is repeated once per view; the index is of samples.
    return joined[:: manifest.layout.views]
