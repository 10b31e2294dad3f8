"""How a trainer gets at targets: one object for a store on disk and for one behind HTTP."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from softlabels.class_list import check_class_names
from softlabels.encodings import Encoding
from softlabels.epochs import EpochConfig, EpochIterator, EpochRows
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
from softlabels.order import Remainder
from softlabels.softmath import check_mean, check_temperature, check_weights, is_locked
from softlabels.targets import MemberMean, SoftTargets, check_unlocked

_IDS_AT_ONCE = 1024
"""Ids a frame, where all are read: what any server sends at once."""


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

    @property
    def encoding(self) -> Encoding:
        """How its rows are decoded, with what the encoding learnt for this store."""
        ...

    def fetch(
        self,
        ids: IdArray,
        fields: tuple[str, ...],
        *,
        views: NDArray[np.int64] | None = None,
        spans: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Rows of these ids, in the order asked; ids may repeat. One array a field, [B, ...].

        `views` [B] where the store keeps views; `spans` [B, 2] ranges of sequences, None for whole ones, whose rows
        come joined, with `row_offsets` [B + 1].
        """
        ...

    def epoch(self, plan: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """The rows of each step of an epoch, from the plan's cursor on, with what `fetch` gives for each."""
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
        self._encoding = rows.encoding

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
        mean: Literal["arithmetic", "geometric"] | None = None,
        weights: Sequence[float] | None = None,
        views: int | Iterable[int] | NDArray[np.int64] | None = None,
        spans: Iterable[tuple[int, int]] | NDArray[np.int64] | None = None,
        labels: bool = True,
        fingerprints: bool = False,
        view_parameters: bool = False,
        inputs: bool = False,
    ) -> SoftTargets:
        """The soft targets of these samples, in the order asked; ids may repeat.

        Args:
            ids: [B] sample ids, at least one.
            temperature: what the batch is to carry; the store's default when left out.
            mean, weights: over the members, where the store keeps them; the job's own when left out.
            views: which view of each sample, [B] or one for all, where the store keeps views.
            spans: [B, 2] first row and the one after the last of each sample, for sequences; whole ones when left out.
            labels: also return hard labels, where the store keeps them.
            fingerprints: also return the samples' content fingerprints.
            view_parameters: also return the recorded parameters of each view.
            inputs: also return the samples themselves, where the store keeps them.
        Raises:
            EmptyBatchError, BadIdsError, UnknownIdError, TemperatureError, TemperatureLockedError, RequestError,
            RowsNotCommittedError, ChecksumError; from a server also ServerUnreachableError.
        """
        wanted = as_ids(ids)
        if len(wanted) == 0:
            raise EmptyBatchError("a batch needs at least one id: an empty one usually means a mistake in the sampler")
        spec = self.manifest.temperature
        carried = spec.default if temperature is None else check_temperature(temperature)
        members, captured, locked = self._mean_of(mean, weights, carried)
        check_unlocked(carried, captured=captured, locked=locked)
        keys: dict[str, NDArray[np.int64]] = {}
        if views is not None:
            keys["views"] = _whole_numbers(np.broadcast_to(np.asarray(views), (len(wanted),)), "views")
        if spans is not None:
            keys["spans"] = _whole_numbers(np.asarray(spans).reshape(len(wanted), 2), "spans")
        arrays = self._rows.fetch(wanted, self._fields(labels, fingerprints, view_parameters, inputs), **keys)
        return self._targets(wanted, arrays, members, (carried, captured, locked))

    def epoch(
        self,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        cursor: int = 0,
        shuffle: bool = True,
        block: int | None = None,
        remainder: Remainder = "split",
        view: int | None = None,
        temperature: float | None = None,
        mean: Literal["arithmetic", "geometric"] | None = None,
        weights: Sequence[float] | None = None,
        labels: bool = True,
        fingerprints: bool = False,
        view_parameters: bool = False,
        inputs: bool = False,
        prefetch: int = 0,
    ) -> EpochIterator:
        """The batches of an epoch in an order that follows from the store, the seed and the epoch's number alone.

        Every sample comes once, whatever the number of ranks, and each rank has as many batches as any other. What is
        left of it can be begun at its `cursor`, also with other ranks or another batch size.

        Args:
            seed: of the training run.
            epoch: its number, from 0.
            batch_size: samples in each of this rank's batches.
            rank, world_size: which of how many ranks this is.
            cursor: where to go on, as `EpochIterator.cursor` said.
            shuffle: False takes the samples in the store's order.
            block: shuffle blocks of so many consecutive samples, then within a few of them, for slow disks.
            remainder: "split" shares out what fills no last step, "drop" leaves it out, "pad" repeats some.
            view: which view of every sample, where the store keeps views; `epoch` modulo their number if left out.
            temperature, mean, weights, labels, fingerprints, view_parameters, inputs: as `batch` takes them.
            prefetch: batches that a thread fetches before they are asked for, 32 MiB at most; 0 for none.
        Raises:
            RequestError, TemperatureError, TemperatureLockedError, UnknownFieldError, RowsNotCommittedError; and
            while it is read what `batch` raises.
        """
        spec = self.manifest.temperature
        carried = spec.default if temperature is None else check_temperature(temperature)
        members, captured, locked = self._mean_of(mean, weights, carried)
        check_unlocked(carried, captured=captured, locked=locked)
        plan = EpochConfig(
            seed=seed,
            epoch=epoch,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            cursor=cursor,
            shuffle=shuffle,
            block=block,
            remainder=remainder,
            view=view,
        )
        count = plan.batches(self.manifest, self.digest).batch_count
        rows = self._rows.epoch(plan, self._fields(labels, fingerprints, view_parameters, inputs))
        if prefetch:
            # By name, not by import statement: the floor must not depend on the rooms above it.
            rows = importlib.import_module("softlabels_client.data.prefetch").epoch_ahead(rows, batches=prefetch)
        heat = (carried, captured, locked)
        return EpochIterator(
            rows, lambda step: self._targets(step.ids, step.arrays, members, heat), plan=plan, batch_count=count
        )

    def ids(self) -> IdArray:
        """The id of every sample, [samples], in the store's order.

        Where ids count up by one this is arithmetic; else they are all read, which only a finished store allows.

        Raises:
            RowsNotCommittedError: the store is unfinished and its ids do not count up; and all that an epoch raises.
        """
        manifest = self.manifest
        if manifest.ids.dense_start is not None:
            return np.arange(manifest.samples, dtype=np.int64) + manifest.ids.dense_start
        plan = EpochConfig(seed=0, epoch=0, batch_size=_IDS_AT_ONCE, shuffle=False)
        # Copied: rows of a reply lie in its memory, which a list of views would keep whole.
        pieces: list[Any] = [step.ids.copy() for step in self._rows.epoch(plan, (IDS,))]
        joined: IdArray = np.concatenate(pieces)
        return joined

    def _targets(
        self,
        ids: IdArray,
        arrays: Mapping[str, NDArray[Any]],
        members: MemberMean | None,
        heat: tuple[float, float, bool],
    ) -> SoftTargets:
        """Rows as they came, with all that decoding them takes; `heat` is the T carried, the T captured, and locked."""
        found_labels = arrays.get(LABELS)
        return SoftTargets(
            ids=ids,
            encoded={name: arrays[name] for name in self._encoding.fields},
            encoding=self._encoding,
            temperature=heat[0],
            captured_temperature=heat[1],
            locked=heat[2],
            labels=None if found_labels is None else found_labels.astype(np.int64),
            fingerprints=arrays.get(FINGERPRINTS),
            store_digest=self.digest,
            members=members,
            row_offsets=arrays.get(ROW_OFFSETS),
            view_parameters=arrays.get(VIEW_PARAMETERS),
            inputs=arrays.get(INPUTS),
        )

    def _mean_of(
        self, mean: str | None, weights: Sequence[float] | None, carried: float
    ) -> tuple[MemberMean | None, float, bool]:
        """How members are averaged, what the result is tempered with, and whether it is locked to that."""
        manifest, spec = self.manifest, self.manifest.temperature
        if manifest.members is None:
            if mean not in (None, manifest.mean) or weights is not None:
                raise RequestError(
                    f"{manifest.name!r} keeps {_kept(manifest.mean)}, not its members: another mean or other weights "
                    "need a store that was precomputed with keep = 'members'"
                )
            return None, spec.captured, spec.locked
        kind = check_mean(manifest.mean if mean is None else mean)
        own = tuple(teacher.weight for teacher in manifest.teachers) or (1.0,) * manifest.members
        chosen = own if weights is None else tuple(float(weight) for weight in weights)
        check_weights(chosen, manifest.members)
        locked = is_locked(kind, manifest.members)
        as_mean: Literal["arithmetic", "geometric"] = "arithmetic" if locked else "geometric"
        return MemberMean(kind=as_mean, weights=chosen), carried if locked else 1.0, locked

    def _fields(self, labels: bool, fingerprints: bool, view_parameters: bool, inputs: bool) -> tuple[str, ...]:
        manifest = self.manifest
        fields = tuple(self._encoding.fields)
        if labels and LABELS in manifest.arrays:
            fields += (LABELS,)
        if fingerprints:
            fields += (FINGERPRINTS,)
        if view_parameters:
            if VIEW_PARAMETERS not in manifest.arrays:
                raise UnknownFieldError(f"store {manifest.name!r} records no view parameters")
            fields += (VIEW_PARAMETERS,)
        if inputs:
            if INPUTS not in manifest.arrays:
                raise UnknownFieldError(
                    f"store {manifest.name!r} keeps no inputs: bring them yourself, or precompute with `inputs = true` "
                    "in the job's [store] table",
                    field=INPUTS,
                )
            fields += (INPUTS,)
        return fields

    def require(
        self,
        *,
        transfer_set: str | None = None,
        classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Refuse a store that does not fit.

        Args:
            transfer_set: fingerprint of the trainer's own data, see `softlabels.transfer_set.transfer_set_fingerprint`.
            classes: how many classes the student has.
            class_names: the student's classes by name, in the order of its outputs.
        Raises:
            FingerprintMismatchError: the targets were computed for other data.
            ShapeMismatchError: the student has another number of classes.
            ClassListMismatchError: the student's classes are others, or in another order; the first is named.
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
        """Let go of files and connections."""
        self._rows.close()

    def __enter__(self) -> TargetStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _kept(mean: str) -> str:
    return "one teacher's rows" if mean == "none" else f"the {mean} mean of its teachers"


def _whole_numbers(values: NDArray[Any], what: str) -> NDArray[np.int64]:
    if values.dtype.kind not in "iu":
        raise RequestError(f"{what} must be whole numbers, not {values.dtype}")
    return values.astype(np.int64)


def check_transfer_set(manifest: Manifest, fingerprint: str | None) -> None:
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


def open_store(
    where: str | Path,
    *,
    token: str | None = None,
    timeout_s: float = 30.0,
    cache: bool | str | Path | None = None,
    cache_bytes: int | None = None,
    cache_read_only: bool = False,
) -> TargetStore:
    """Open a store of soft targets, wherever it lies. Exported as `softlabels.open`.

    Args:
        where: a folder, or `http(s)://host/name` of a store behind `softlabels serve`.
        token: bearer token for a server that asks for one.
        timeout_s: how long one request to a server may take, seconds.
        cache: keep what a server sends on this machine, so that every row is sent once: in this folder, or, with True,
            in the one that SOFTLABELS_CACHE names, else ~/.cache/softlabels. A store in a folder is near already.
        cache_bytes: most that the cache's folder may take, of all stores together; 16 GiB when left out.
        cache_read_only: use what the cache holds and add nothing.
    Raises:
        UnknownStoreError: nothing there; MissingExtraError: a local store, and `softlabels[store]` is not installed;
        RequestError, FormatVersionError, ManifestError, ServerUnreachableError.
    """
    wanted = cache is not None and cache is not False
    if not wanted and (cache_bytes is not None or cache_read_only):
        raise RequestError("cache_bytes and cache_read_only are of a cache, and none was asked for: pass cache=True")
    text = str(where)
    # By name, not by import statement: the floor must not depend on the rooms above it.
    if text.startswith(("http://", "https://")):
        far = importlib.import_module("softlabels_client.http.http_rows").HttpRows(
            text, token=token, timeout_s=timeout_s
        )
        rows = _cached(far, cache, cache_bytes, read_only=cache_read_only) if wanted else far
        return TargetStore(rows, where=text)
    if "://" in text:
        raise UnknownStoreError(f"{text!r}: this softlabels opens folders and http(s) addresses")
    store = importlib.import_module("softlabels.store")
    return TargetStore(store.LocalRows(Path(text)), where=text)


def _cached(far: RowSource, cache: bool | str | Path | None, most_bytes: int | None, *, read_only: bool) -> RowSource:
    if os.name != "posix":
        raise RequestError("a cache needs the file locks of a POSIX system: leave `cache` out here")
    bound: dict[str, Any] = {} if most_bytes is None else {"most_bytes": most_bytes}
    kept = importlib.import_module("softlabels_client.cache")
    rows: RowSource = kept.CachedRows(far, folder=None if cache is True else cache, read_only=read_only, **bound)
    return rows
