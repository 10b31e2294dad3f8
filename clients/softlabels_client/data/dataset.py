"""Datasets for torch's DataLoader that pair inputs, or replayed views, with soft targets by id, a request per batch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import FingerprintMismatchError, RequestError, UnknownFieldError
from softlabels.extras import needs_extra
from softlabels.ids import IdArray, as_ids
from softlabels.losses import SoftTargetBatch
from softlabels.manifest import FINGERPRINTS, INPUTS
from softlabels.order import Remainder
from softlabels.softmath import check_temperature
from softlabels.target_store import TargetStore
from softlabels.targets import SoftTargets, check_unlocked
from softlabels.transfer_set import (
    ArrayTransferSet,
    MapStyleDataset,
    Samples,
    SequenceTransferSet,
    TransferSet,
    sample_fingerprints,
)
from softlabels.views import ViewReplay, ViewTransform, as_view_transform, load_view_transform
from softlabels_client.data.loader import DistillationBatch, StatefulLoader, stateful_loader
from softlabels_client.data.sampler import EpochSampler

with needs_extra("torch", "training a student"):
    import torch
    from torch.utils.data import Dataset

Check = Literal["first", "always", "never"]

_NAMED_AT_MOST = 5

_PROBES = 64
"""Samples whose ids represent all of a transfer set that has no array of ids."""


class SoftTargetDataset(Dataset[DistillationBatch]):
    """Inputs paired with soft targets by sample id, never by position.

    A DataLoader reads a batch at a time (`__getitems__`), which is one request; pass `collate_batches` as its
    `collate_fn`, or use `data_loader`. Pickles, and works in workers under fork, spawn and forkserver. Labels are the
    inputs' own if they have any, else the store's.

    Args:
        inputs: a transfer set, or a sequence, array or map-style torch data set together with `ids`; None takes the
            store's own, if it has them.
        store: store of the targets, from `softlabels.open`.
        ids: [N] sample ids of `inputs`, unless it is a transfer set.
        temperature: temperature of the targets; the store's default when left out.
        check: when to compare an input's fingerprint with that of the teacher's input: the "first" time that a process
            loads it, "always", or "never".
    Raises:
        TemperatureError, TemperatureLockedError: the store has no targets of this temperature.
        UnknownFieldError: the store has no fingerprints to check, or no inputs where none were given.
        RequestError: an unknown `check`, ids missing, or a store of sequences.
    """

    def __init__(
        self,
        inputs: TransferSet | MapStyleDataset | None,
        store: TargetStore,
        *,
        ids: Iterable[Any] | NDArray[Any] | None = None,
        temperature: float | None = None,
        check: Check = "first",
    ) -> None:
        if check not in ("first", "always", "never"):
            raise RequestError(f"check is {check!r}; choose 'first', 'always' or 'never'")
        spec = store.manifest.temperature
        wanted = spec.default if temperature is None else check_temperature(temperature)
        if store.manifest.members is None:  # with members kept, every temperature is available
            check_unlocked(wanted, captured=spec.captured, locked=spec.locked)
        if store.manifest.layout.kind == "sequences":
            raise RequestError(
                f"{store.manifest.name!r} has sequences, one row per position: fetch ranges of them by "
                "`store.batch(ids, spans=…)`, as clients/examples/tokens.py does"
            )
        if check != "never" and FINGERPRINTS not in store.manifest.arrays:
            raise UnknownFieldError(
                f"{store.manifest.name!r} has no fingerprints, so inputs cannot be compared with those that the "
                "teacher saw; pass check='never' if you are certain that ids agree"
            )
        self.samples = StoreInputs(store, ids) if inputs is None else as_transfer_set(inputs, ids)
        self.store = store
        self.temperature = wanted
        self.check: Check = check
        self._seen = np.zeros(len(self.samples), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> DistillationBatch:
        """Return one sample as a batch of one row, by a request of its own; loaders read whole batches instead."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> DistillationBatch:
        """Return the samples, or their current views, at these positions as one batch, by one request.

        Raises:
            FingerprintMismatchError: an input is not the one that the targets of its id were computed for.
            UnknownIdError: the store has no targets for a sample. ViewReplayError: a view cannot be replayed here.
        """
        wanted = np.asarray(positions, dtype=np.int64)
        # Without any, on some ranks at the last step, if fewer samples than ranks are left.
        return self._fetched(wanted) if len(wanted) else self[0].first(0)

    def _fetched(self, positions: NDArray[np.int64]) -> DistillationBatch:
        checked = self.checks(positions)
        if isinstance(self.samples, StoreInputs):
            ids = self.samples.ids[positions]
            targets = self.store.batch(ids, temperature=self.temperature, inputs=True, fingerprints=checked)
            return self.pair(samples_in(targets), targets, positions)
        samples = self.samples.take(positions)
        targets = self.store.batch(
            samples.ids, temperature=self.temperature, labels=samples.labels is None, fingerprints=checked
        )
        return self.pair(samples, targets, positions)

    def checks(self, positions: NDArray[np.int64] | None = None) -> bool:
        """Return whether samples at these positions, or at any, still have to be compared with their fingerprints."""
        seen = self._seen if positions is None else self._seen[positions]
        return self.check == "always" or (self.check == "first" and not seen.all())

    def pair(self, samples: Samples, targets: SoftTargets, positions: NDArray[np.int64]) -> DistillationBatch:
        """Return a batch of the samples at these positions, [B], and their targets, in the same order.

        The targets have fingerprints if `checks` requires them.

        Raises:
            FingerprintMismatchError: an input is not the one that the targets of its id were computed for.
        """
        if targets.fingerprints is not None:
            rows = slice(None) if self.check == "always" else np.flatnonzero(~self._seen[positions])
            # Inputs from the store itself are checked too: one that differs was damaged in the store or on the way.
            self._check_inputs(samples.inputs[rows], samples.ids[rows], targets.fingerprints[rows])
            self._seen[positions] = True
        if samples.labels is not None:
            targets = dataclasses.replace(targets, labels=samples.labels)
        return DistillationBatch(
            inputs=_tensor(samples.inputs), targets=SoftTargetBatch.from_soft_targets(targets), ids=samples.ids
        )

    def _check_inputs(self, inputs: NDArray[Any], ids: IdArray, expected: NDArray[np.uint8]) -> None:
        differs = (sample_fingerprints(inputs) != expected).any(axis=1)
        if not differs.any():
            return
        wrong = ids[differs][:_NAMED_AT_MOST].tolist()
        manifest = self.store.manifest
        raise FingerprintMismatchError(
            f"{int(differs.sum())} of {len(ids)} inputs are not those that the targets of {manifest.name!r} were "
            f"computed for, for example ids {', '.join(map(repr, wrong))}; a sample here is {inputs.dtype}"
            f"{list(inputs.shape[1:])}. Order, ids, dtype or preprocessing differ from transfer set "
            f"{manifest.transfer_set.name!r}, so the student would learn the targets of other samples: load the data "
            "as the teacher's job did",
            ids=wrong,
            mismatched=int(differs.sum()),
        )


class ViewDataset(SoftTargetDataset):
    """As `SoftTargetDataset`, for a store of views: epoch e shows view e modulo their number of every sample.

    Views are replayed from the parameters, or the seed, that the store has for each.

    Args:
        inputs: the samples before augmentation.
        store: a store of views.
        transform: transform of the views; when left out, the manifest's reference is loaded.
        ids, temperature: as in `SoftTargetDataset`.
        check: as in `SoftTargetDataset`, for replayed views. "always" accepts other library versions, since every view
            that differs is found.
        base: folder that a file reference to the transform is relative to.
    Raises:
        RequestError: the store has no views. ViewReplayError: another transform or other library versions than in the
        manifest. ReferenceLoadError: the reference cannot be loaded here. And as `SoftTargetDataset`.
    """

    def __init__(
        self,
        inputs: TransferSet | MapStyleDataset | None,
        store: TargetStore,
        *,
        transform: ViewTransform | Any = None,
        ids: Iterable[Any] | NDArray[Any] | None = None,
        temperature: float | None = None,
        check: Check = "first",
        base: Path | None = None,
    ) -> None:
        if inputs is None:
            raise RequestError(f"{store.manifest.name!r} has views of samples, not the samples: pass your inputs")
        super().__init__(inputs, store, ids=ids, temperature=temperature, check=check)
        spec = store.manifest.views
        if store.manifest.layout.kind != "views" or spec is None:
            raise RequestError(f"{store.manifest.name!r} has no views to replay: use SoftTargetDataset")
        if transform is None:
            made = load_view_transform(spec.transform, arguments=spec.arguments, base=base)
        else:
            made = as_view_transform(transform, arguments=spec.arguments)
        self._replay = ViewReplay(store.manifest, made, other_versions=check == "always")
        # In shared memory: persistent workers of a loader have a copy of everything else, made before the first epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def show_epoch(self, epoch: int) -> None:
        """Switch to the view of this epoch; loaders call this."""
        self._epoch.fill_(epoch)

    @property
    def view(self) -> int:
        """View of every sample in the current epoch."""
        return int(self._epoch) % self.store.manifest.layout.views

    def _fetched(self, positions: NDArray[np.int64]) -> DistillationBatch:
        samples = self.samples.take(positions)
        views = np.full(len(positions), self.view, dtype=np.int64)
        targets = self.store.batch(
            samples.ids,
            temperature=self.temperature,
            views=views,
            labels=samples.labels is None,
            fingerprints=self.checks(positions),
            view_parameters=bool(self._replay.parameters),
        )
        made = self._replay.views(samples.inputs, samples.ids, views, targets.view_parameters)
        return self.pair(Samples(ids=samples.ids, inputs=made, labels=samples.labels), targets, positions)


def data_loader(
    dataset: SoftTargetDataset,
    *,
    batch_size: int,
    shuffle: bool = True,
    seed: int = 0,
    workers: int = 0,
    remainder: Remainder = "split",
    rank: int | None = None,
    world_size: int | None = None,
    start_method: Literal["fork", "spawn", "forkserver"] | None = None,
    ahead: bool = False,
) -> StatefulLoader:
    """Return a loader whose order follows from store, seed and epoch alone, whatever the ranks and workers.

    Args:
        dataset: the samples.
        batch_size: samples per step and rank, fetched by one request.
        shuffle: a new order each epoch.
        seed: training-run seed.
        workers: worker processes; 0 fetches in this process.
        remainder: "split", "drop" or "pad", as in `EpochConfig`.
        rank, world_size: torch.distributed's when left out, or (0, 1) without a process group.
        start_method: how workers are started; torch's default when None.
        ahead: without workers, fetch the next batches ahead in a thread.
    Raises:
        RequestError: a number outside its range.
    """
    order = EpochSampler(
        len(dataset),
        digest=dataset.store.digest,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        rank=rank,
        world_size=world_size,
        remainder=remainder,
        data=data_identity(dataset.samples),
    )
    return stateful_loader(dataset, order, workers=workers, start_method=start_method, ahead=ahead, batch_sampler=order)


def samples_in(targets: SoftTargets) -> Samples:
    """Return the samples that came with their targets, from a store that has both."""
    assert targets.inputs is not None
    return Samples(ids=targets.ids, inputs=targets.inputs, labels=targets.labels)


def _tensor(inputs: NDArray[Any]) -> torch.Tensor:
    # torch has no read-only tensors, so memory-mapped arrays and views of a reply are copied.
    return torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())


class StoreInputs:
    """The samples that a store has beside its targets, those of these ids or all, as a transfer set.

    Raises:
        UnknownFieldError: the store has no inputs.
    """

    def __init__(self, store: TargetStore, ids: Iterable[Any] | NDArray[Any] | None = None) -> None:
        if INPUTS not in store.manifest.arrays:
            raise UnknownFieldError(
                f"{store.manifest.name!r} has no inputs, so a student cannot be trained from it alone: pass the "
                "inputs, or precompute with `inputs = true` in the job's [store] table",
                field=INPUTS,
            )
        self._store = store
        self.ids = store.ids() if ids is None else as_ids(ids)
        self.name = store.manifest.transfer_set.name

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at these positions, in this order, by one request; positions may repeat."""
        return samples_in(self._store.batch(self.ids[positions], inputs=True))


def as_transfer_set(inputs: TransferSet | MapStyleDataset, ids: Iterable[Any] | NDArray[Any] | None) -> TransferSet:
    """Return the trainer's data as a transfer set. Raises RequestError: ids are missing, or given twice."""
    # Arrays and tensors have a `take` too, but no name.
    if hasattr(inputs, "take") and isinstance(getattr(inputs, "name", None), str):
        if ids is not None:
            raise RequestError("a transfer set brings its own ids: leave `ids` out, or pass the bare inputs with `ids`")
        return cast(TransferSet, inputs)
    if ids is None:
        raise RequestError(
            "these inputs have no sample ids: pass `ids`, those that their targets were computed for; a position in a "
            "shuffled or filtered data set is not an id, and targets would silently go to other samples"
        )
    if isinstance(inputs, np.ndarray):
        return ArrayTransferSet("inputs", inputs, ids=as_ids(ids))
    return SequenceTransferSet(cast(MapStyleDataset, inputs), ids=ids, name=type(inputs).__name__)


def data_identity(samples: TransferSet) -> str:
    """Return a digest of the ids of these samples in this order: of all in memory, else of 64 spread over the set."""
    ids = getattr(samples, "ids", None)
    if ids is None:
        ids = samples.take(np.unique(np.linspace(0, len(samples) - 1, _PROBES).astype(np.int64))).ids
    known = np.asarray(ids)
    return hashlib.blake2b(known.dtype.str.encode() + known.tobytes(), digest_size=16).hexdigest()
