"""Target stores: one object to read soft targets with, whether the store is a folder or behind a server."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Unpack

import numpy as np
from numpy.typing import NDArray

from softlabels.class_list import check_class_names
from softlabels.encodings import Encoding
from softlabels.errors import (
    EmptyBatchError,
    FingerprintMismatchError,
    RequestError,
    ShapeMismatchError,
    UnknownFieldError,
    UnknownStoreError,
)
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import FINGERPRINTS, IDS, INPUTS, LABELS, ROW_OFFSETS, VIEW_PARAMETERS, Manifest
from softlabels.order import EpochConfig, EpochOptions
from softlabels.softmath import check_mean, check_temperature, check_weights, is_locked
from softlabels.targets import EpochIterator, EpochRows, MemberMean, SoftTargets, check_unlocked

_IDS_AT_ONCE = 1024
"""Ids per frame when all ids are read: below every server's limit of a frame."""


class RowSource(Protocol):
    """Rows by sample id: `softlabels.store.LocalRows`, the client's `HttpRows`, or its cache."""

    @property
    def manifest(self) -> Manifest:
        """The store's manifest."""
        ...

    @property
    def digest(self) -> str:
        """Digest of the store version that `fetch` reads."""
        ...

    @property
    def encoding(self) -> Encoding:
        """The encoding of the rows, with the arrays that it learnt for this store."""
        ...

    def fetch(
        self,
        ids: IdArray,
        fields: tuple[str, ...],
        *,
        views: NDArray[np.int64] | None = None,
        spans: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return the rows of these ids, in this order; ids may repeat.

        Args:
            ids: [B] sample ids.
            fields: names of the arrays to return.
            views: [B] view of each sample, for stores of views.
            spans: [B, 2] first row and end of each range, for sequences; None for whole sequences.
        Returns:
            One array a field, [B, ...]; for sequences the rows of all samples joined, with `row_offsets` [B + 1].
        """
        ...

    def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """Yield the rows of each step of an epoch, from the configuration's cursor on, with the arrays of `fetch`."""
        ...

    def close(self) -> None:
        """Close files and connections."""


class _Tempering(NamedTuple):
    """Mean and temperature of a batch: T of the targets, T of the decoded rows, whether they are locked to it."""

    temperature: float
    captured: float
    locked: bool
    members: MemberMean | None


class TargetStore:
    """A store of soft targets, in a folder or behind a server.

    Args:
        rows: source of the rows.
        where: path or URL that it was opened from, for messages.
    """

    def __init__(self, rows: RowSource, *, where: str) -> None:
        self._rows = rows
        self.where = where
        self._encoding = rows.encoding

    @property
    def manifest(self) -> Manifest:
        """The store's manifest."""
        return self._rows.manifest

    @property
    def digest(self) -> str:
        """Digest of this version of the store: any changed byte changes it."""
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
        mean: Literal["arithmetic", "geometric"] | None = None,
        weights: Sequence[float] | None = None,
        views: int | Iterable[int] | NDArray[np.int64] | None = None,
        spans: Iterable[tuple[int, int]] | NDArray[np.int64] | None = None,
        labels: bool = True,
        fingerprints: bool = False,
        view_parameters: bool = False,
        inputs: bool = False,
    ) -> SoftTargets:
        """Return the soft targets of these samples, in this order; ids may repeat.

        Args:
            ids: [B] sample ids, at least one.
            temperature: temperature of the batch; None for the store's default.
            mean, weights: mean over members and their weights, for stores with members; None for the job's.
            views: view of each sample, [B] or one for all, for stores of views.
            spans: [B, 2] first row and end of each range, for sequences; None for whole sequences.
            labels: return hard labels too, where the store has them.
            fingerprints: return content fingerprints of the samples too.
            view_parameters: return the recorded parameters of each view too.
            inputs: return the samples themselves too, where the store has them.
        Raises:
            EmptyBatchError, BadIdsError, UnknownIdError, TemperatureError, TemperatureLockedError, RequestError,
            RowsNotCommittedError, ChecksumError; from a server also ServerUnreachableError.
        """
        wanted = as_ids(ids)
        if len(wanted) == 0:
            raise EmptyBatchError(
                "a batch needs at least one id: an empty batch usually means a mistake in the sampler"
            )
        tempering = self._tempering(temperature, mean, weights)
        keys: dict[str, NDArray[np.int64]] = {}
        if views is not None:
            keys["views"] = _whole_numbers(np.broadcast_to(np.asarray(views), (len(wanted),)), "views")
        if spans is not None:
            keys["spans"] = _whole_numbers(np.asarray(spans).reshape(len(wanted), 2), "spans")
        arrays = self._rows.fetch(wanted, self._fields(labels, fingerprints, view_parameters, inputs), **keys)
        return self._targets(wanted, arrays, tempering)

    def epoch(
        self,
        config: EpochConfig | None = None,
        *,
        temperature: float | None = None,
        mean: Literal["arithmetic", "geometric"] | None = None,
        weights: Sequence[float] | None = None,
        labels: bool = True,
        fingerprints: bool = False,
        view_parameters: bool = False,
        inputs: bool = False,
        prefetch: int = 0,
        **options: Unpack[EpochOptions],
    ) -> EpochIterator:
        """Return an iterator over one rank's batches of an epoch, whose order follows from store, seed and epoch alone.

        Every sample comes once, whatever the number of ranks, and every rank gets equally many batches. The rest of an
        epoch can be resumed at its `cursor`, also with other ranks or another batch size.

        Args:
            config: samples and batches of this rank. Or its fields as keyword arguments: `seed`, `epoch`, `batch_size`;
                with defaults `rank`, `world_size`, `cursor`, `shuffle`, `block`, `remainder`, `view`.
            temperature, mean, weights, labels, fingerprints, view_parameters, inputs: as in `batch`.
            prefetch: batches that a thread fetches ahead, up to 32 MiB; 0 for none.
        Raises:
            RequestError, TemperatureError, TemperatureLockedError, UnknownFieldError, RowsNotCommittedError; while
            iterating, as `batch`.
        """
        if config is None:
            config = EpochConfig(**options)
        elif options:
            raise RequestError(f"pass {', '.join(options)} as part of the EpochConfig, or no EpochConfig")
        tempering = self._tempering(temperature, mean, weights)
        count = config.batches(self.manifest, self.digest).batch_count
        rows = self._rows.epoch(config, self._fields(labels, fingerprints, view_parameters, inputs))
        if prefetch:
            # Imported by name: the base package must not depend on the client.
            rows = importlib.import_module("softlabels_client.data.prefetch").epoch_ahead(rows, batches=prefetch)

        def wrap(step: EpochRows) -> SoftTargets:
            return self._targets(step.ids, step.arrays, tempering)

        return EpochIterator(rows, wrap, cursor=config.cursor, batch_count=count)

    def ids(self) -> IdArray:
        """Return the id of every sample, [samples], in the store's order.

        Consecutive integer ids follow from the manifest; others are read, which needs a finished store.

        Raises:
            RowsNotCommittedError: the store is unfinished and its ids are not consecutive; and all that `epoch` raises.
        """
        manifest = self.manifest
        if manifest.ids.dense_start is not None:
            return np.arange(manifest.samples, dtype=np.int64) + manifest.ids.dense_start
        config = EpochConfig(seed=0, epoch=0, batch_size=_IDS_AT_ONCE, shuffle=False)
        # Copied, because views would keep the memory of every whole reply.
        pieces: list[Any] = [step.ids.copy() for step in self._rows.epoch(config, (IDS,))]
        joined: IdArray = np.concatenate(pieces)
        return joined

    def _targets(self, ids: IdArray, arrays: Mapping[str, NDArray[Any]], tempering: _Tempering) -> SoftTargets:
        found_labels = arrays.get(LABELS)
        return SoftTargets(
            ids=ids,
            encoded={name: arrays[name] for name in self._encoding.fields},
            encoding=self._encoding,
            temperature=tempering.temperature,
            captured_temperature=tempering.captured,
            locked=tempering.locked,
            labels=None if found_labels is None else found_labels.astype(np.int64),
            fingerprints=arrays.get(FINGERPRINTS),
            store_digest=self.digest,
            members=tempering.members,
            row_offsets=arrays.get(ROW_OFFSETS),
            view_parameters=arrays.get(VIEW_PARAMETERS),
            inputs=arrays.get(INPUTS),
        )

    def _tempering(self, temperature: float | None, mean: str | None, weights: Sequence[float] | None) -> _Tempering:
        """Return the mean and temperature of a batch; raise unless this store can give them."""
        manifest, spec = self.manifest, self.manifest.temperature
        wanted = spec.default if temperature is None else check_temperature(temperature)
        if manifest.members is None:
            if mean not in (None, manifest.mean) or weights is not None:
                stored = "one teacher's rows" if manifest.mean == "none" else f"its teachers' {manifest.mean} mean"
                raise RequestError(
                    f"{manifest.name!r} stores {stored}, not its members: another mean or other weights need a store "
                    "that was precomputed with keep = 'members'"
                )
            check_unlocked(wanted, captured=spec.captured, locked=spec.locked)
            return _Tempering(wanted, spec.captured, spec.locked, None)
        kind = check_mean(manifest.mean if mean is None else mean)
        own = tuple(teacher.weight for teacher in manifest.teachers) or (1.0,) * manifest.members
        chosen = own if weights is None else tuple(float(weight) for weight in weights)
        check_weights(chosen, manifest.members)
        locked = is_locked(kind, manifest.members)
        # Members are stored at T = 1: a geometric mean is a mean of logits, which re-tempers to any T afterwards; an
        # arithmetic mean has to be taken at the wanted T and is locked to it.
        as_mean = MemberMean(kind="arithmetic" if locked else "geometric", weights=chosen)
        return _Tempering(wanted, wanted if locked else 1.0, locked, as_mean)

    def _fields(self, labels: bool, fingerprints: bool, view_parameters: bool, inputs: bool) -> tuple[str, ...]:
        name, arrays = self.manifest.name, self.manifest.arrays
        if view_parameters and VIEW_PARAMETERS not in arrays:
            raise UnknownFieldError(f"store {name!r} records no view parameters", field=VIEW_PARAMETERS)
        if inputs and INPUTS not in arrays:
            raise UnknownFieldError(
                f"store {name!r} keeps no inputs: pass your own, or precompute with `inputs = true` in the job's "
                "[store] table",
                field=INPUTS,
            )
        wanted = (labels and LABELS in arrays, fingerprints, view_parameters, inputs)
        return (*self._encoding.fields, *compress((LABELS, FINGERPRINTS, VIEW_PARAMETERS, INPUTS), wanted))

    def require(
        self, *, transfer_set: str | None = None, classes: int | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        """Raise unless the store fits the trainer; None skips a check.

        Args:
            transfer_set: fingerprint of the trainer's data, see `softlabels.transfer_set.transfer_set_fingerprint`.
            classes: number of the student's classes.
            class_names: the student's classes by name, in the order of its outputs.
        Raises:
            FingerprintMismatchError, ShapeMismatchError: other data; another number of classes.
            ClassListMismatchError: the student has other classes, or another order; the message names the first.
        """
        check_transfer_set(self.manifest, transfer_set)
        if classes is not None and classes != self.manifest.classes:
            raise ShapeMismatchError(
                f"the student has {classes} classes, the targets of {self.manifest.name!r} have "
                f"{self.manifest.classes}",
                student=classes,
                store=self.manifest.classes,
            )
        if class_names is not None:
            check_class_names(self.manifest.class_list, class_names, store=self.manifest.name)

    def close(self) -> None:
        """Close files and connections."""
        self._rows.close()

    def __enter__(self) -> TargetStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _whole_numbers(values: NDArray[Any], what: str) -> NDArray[np.int64]:
    if values.dtype.kind not in "iu":
        raise RequestError(f"{what} must be whole numbers, not {values.dtype}")
    return values.astype(np.int64)


def check_transfer_set(manifest: Manifest, fingerprint: str | None) -> None:
    """Raise FingerprintMismatchError unless the fingerprint is the store's; None skips the check."""
    stored = manifest.transfer_set.fingerprint
    if fingerprint is not None and fingerprint != stored:
        raise FingerprintMismatchError(
            f"the targets of {manifest.name!r} were computed for transfer set {manifest.transfer_set.name!r} with "
            f"fingerprint {stored}, yours has {fingerprint}: row i there is not your row i; load the data that the "
            "store was made from, or precompute targets for this data",
            store=stored,
            yours=fingerprint,
        )


def open_store(
    where: str | Path,
    *,
    token: str | None = None,
    timeout_s: float = 30.0,
    cache: bool | str | Path | None = None,
    cache_bytes: int | None = None,
    cache_read_only: bool = False,
    verify: Literal["first-read", "every-read"] = "first-read",
) -> TargetStore:
    """Open a store of soft targets. Exported as `softlabels.open`.

    Args:
        where: a folder, or `http(s)://host/name` of a store behind `softlabels serve`.
        token: bearer token, for a server that asks for one.
        timeout_s: limit of one request to a server, seconds.
        cache: folder for a server's rows on this machine, so that each is sent once; True for $SOFTLABELS_CACHE or
            ~/.cache/softlabels. Ignored for a local store.
        cache_bytes: size limit of that folder, over all stores in it; None for 16 GiB.
        cache_read_only: use the rows in the cache, but add none.
        verify: how often a local store's rows are compared with what was written. "first-read": each chunk at its first
            read, and again after a program on this machine wrote to its file. "every-read": each row each time, by its
            own checksum, which also notices what a disk, another machine or a write through shared memory changes; a
            batch of 256 × 2 KB then takes twice as long. Rows from a server are compared each time in any case.
    Raises:
        UnknownStoreError: nothing there; MissingExtraError: a compressed store needs `softlabels[store]`;
        RequestError, FormatVersionError, ManifestError, ServerUnreachableError.
    """
    wanted = cache is not None and cache is not False
    if not wanted and (cache_bytes is not None or cache_read_only):
        raise RequestError("cache_bytes and cache_read_only need a cache: pass cache=True")
    text = str(where)
    # Imported by name: the base package must not depend on the client or the store.
    if text.startswith(("http://", "https://")):
        if wanted and os.name != "posix":
            raise RequestError("a cache needs the file locks of a POSIX system: leave out `cache` here")
        rows = importlib.import_module("softlabels_client.http.http_rows").HttpRows(
            text, token=token, timeout_s=timeout_s
        )
        if wanted:
            folder = None if cache is True else cache
            limit = {} if cache_bytes is None else {"most_bytes": cache_bytes}
            cached = importlib.import_module("softlabels_client.cache").CachedRows
            rows = cached(rows, folder=folder, read_only=cache_read_only, **limit)
        return TargetStore(rows, where=text)
    if "://" in text:
        raise UnknownStoreError(f"{text!r}: this softlabels opens folders and http(s) addresses")
    store = importlib.import_module("softlabels.store")
    return TargetStore(store.LocalRows(Path(text), verify=verify), where=text)
