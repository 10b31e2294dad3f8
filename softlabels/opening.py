"""How a trainer gets at targets: `softlabels.open`, one object for a store on disk and for one behind HTTP."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.errors import (
    EmptyBatchError,
    FingerprintMismatchError,
    ShapeMismatchError,
    UnknownFieldError,
    UnknownStoreError,
)
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import Manifest
from softlabels.softmath import check_temperature
from softlabels.targets import SoftTargets, refuse_if_locked

LABELS = "labels"
FINGERPRINTS = "fingerprints"
IDS = "ids"


class RowSource(Protocol):
    """Where rows come from: files on this machine, or a server."""

    @property
    def manifest(self) -> Manifest:
        """What the store says of itself."""
        ...

    @property
    def digest(self) -> str:
        """The version of the store that `fetch` reads."""
        ...

    def fetch(self, ids: IdArray, fields: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Rows of these ids, in the order asked; ids may repeat. One array a field, [B, ...]."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class TargetStore:
    """A store of soft targets, near or far.

    Args:
        rows: where the rows come from.
        where: the path or URL it was opened from, for people.
    """

    def __init__(self, rows: RowSource, *, where: str) -> None:
        self._rows = rows
        self.where = where
        self._encoding: Encoding = rows.manifest.make_encoding()

    @property
    def manifest(self) -> Manifest:
        """What the store says of itself."""
        return self._rows.manifest

    @property
    def digest(self) -> str:
        """The version of the store: changes with any byte of it."""
        return self._rows.digest

    def __len__(self) -> int:
        return self.manifest.samples

    def __repr__(self) -> str:
        m = self.manifest
        return f"<TargetStore {m.name!r} at {self.where}: {m.samples} samples × {m.classes} classes, {m.encoding.name}>"

    def batch(
        self,
        ids: Iterable[Any] | NDArray[Any],
        *,
        temperature: float | None = None,
        labels: bool = True,
        fingerprints: bool = False,
    ) -> SoftTargets:
        """The soft targets of these samples, in the order asked; ids may repeat.

        Args:
            ids: [B] sample ids, at least one.
            temperature: what the batch is to carry; the store's default when left out.
            labels: also return hard labels, where the store keeps them.
            fingerprints: also return the samples' content fingerprints.
        Raises:
            EmptyBatchError, BadIdsError, UnknownIdError, TemperatureError, TemperatureLockedError,
            RowsNotCommittedError, ChecksumError; from a server also ServerUnreachableError.
        """
        wanted = as_ids(ids)
        if len(wanted) == 0:
            raise EmptyBatchError("a batch needs at least one id: an empty one usually means a mistake in the sampler")
        manifest = self.manifest
        spec = manifest.temperature
        carried = spec.default if temperature is None else check_temperature(temperature)
        refuse_if_locked(carried, captured=spec.captured, locked=spec.locked)
        fields = tuple(self._encoding.fields)
        if labels and LABELS in manifest.arrays:
            fields += (LABELS,)
        if fingerprints:
            if FINGERPRINTS not in manifest.arrays:
                raise UnknownFieldError(f"store {manifest.name!r} keeps no fingerprints")
            fields += (FINGERPRINTS,)
        arrays = self._rows.fetch(wanted, fields)
        found_labels = arrays.get(LABELS)
        return SoftTargets(
            ids=wanted,
            encoded={name: arrays[name] for name in self._encoding.fields},
            encoding=self._encoding,
            temperature=carried,
            captured_temperature=spec.captured,
            locked=spec.locked,
            labels=None if found_labels is None else found_labels.astype(np.int64),
            fingerprints=arrays.get(FINGERPRINTS),
            store_digest=self.digest,
        )

    def require(self, *, transfer_set: str | None = None, classes: int | None = None) -> None:
        """Refuse a store that does not fit.

        Args:
            transfer_set: fingerprint of the trainer's own data, see `softlabels.transfer.transfer_set_fingerprint`.
            classes: how many classes the student has.
        Raises:
            FingerprintMismatchError: the targets were computed for other data.
            ShapeMismatchError: the student has another number of classes.
        """
        refuse_other_transfer_set(self.manifest, transfer_set)
        if classes is not None and classes != self.manifest.classes:
            raise ShapeMismatchError(
                f"the student has {classes} classes, the targets of {self.manifest.name!r} have {self.manifest.classes}",
                student=classes,
                store=self.manifest.classes,
            )

    def close(self) -> None:
        """Let go of files and connections."""
        self._rows.close()

    def __enter__(self) -> TargetStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def refuse_other_transfer_set(manifest: Manifest, fingerprint: str | None) -> None:
    """Let a fingerprint pass that is this store's, or None.

    Raises:
        FingerprintMismatchError: it is another's, or the store is unfinished and has none yet.
    """
    own = manifest.transfer_set.fingerprint
    if fingerprint is not None and fingerprint != own:
        raise FingerprintMismatchError(
            f"the targets of {manifest.name!r} were computed for transfer set {manifest.transfer_set.name!r} with "
            f"fingerprint {own}, yours has {fingerprint}: row i there is not your row i; load the data that the store "
            "was made from, or precompute targets for this data",
            store=own,
            yours=fingerprint,
        )


def open_store(where: str | Path, *, token: str | None = None, timeout_s: float = 30.0) -> TargetStore:
    """Open a store of soft targets, wherever it lies. Exported as `softlabels.open`.

    Args:
        where: a folder, or `http(s)://host/name` of a store behind `softlabels serve`.
        token: bearer token for a server that asks for one.
        timeout_s: how long one request to a server may take, seconds.
    Raises:
        UnknownStoreError: nothing there; MissingExtraError: a local store, and `softlabels[store]` is not installed;
        FormatVersionError, ManifestError, ServerUnreachableError.
    """
    text = str(where)
    if text.startswith(("http://", "https://")):
        # By name, not by import statement: the floor must not depend on the rooms above it.
        client = importlib.import_module("softlabels_client.rows")
        return TargetStore(client.HttpRows(text, token=token, timeout_s=timeout_s), where=text)
    if "://" in text:
        raise UnknownStoreError(f"{text!r}: this softlabels opens folders and http(s) addresses")
    store = importlib.import_module("softlabels.store")
    return TargetStore(store.LocalRows(Path(text)), where=text)
