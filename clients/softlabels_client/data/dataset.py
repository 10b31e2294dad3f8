"""How does a torch DataLoader get soft targets? A map-style data set that pairs by sample id, one request a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import FingerprintMismatchError, MissingExtraError, RequestError, UnknownFieldError

try:
    import torch
    from torch.utils.data import DataLoader, Dataset
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from typing import cast

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
from softlabels_client.data.distillation_batch import DistillationBatch, collate_batches
from softlabels_client.data.loader import StatefulLoader
from softlabels_client.data.sampler import EpochSampler, data_identity

Check = Literal["first", "always", "never"]

_NAMED_AT_MOST = 5


class SoftTargetDataset(Dataset[DistillationBatch]):
    """Inputs paired with soft targets by sample id, never by position.

    A DataLoader asks for a batch at a time (`__getitems__`), which is one request; pass `collate_batches` as its
    `collate_fn`, or use `data_loader`. Pickles, and works in workers under fork, spawn and forkserver.

    Args:
        inputs: a transfer set, or a sequence, an array or a map-style torch data set together with `ids`; None takes
            the store's own, where it keeps them.
        store: what `softlabels.open` returned.
        ids: [N] sample ids of `inputs`, where it is no transfer set.
        temperature: what the targets are tempered with; the store's default when left out.
        check: whether an input is the one that the teacher saw, by its fingerprint: the "first" time that a process
            sees it, "always", or "never".
    Raises:
        TemperatureError, TemperatureLockedError: targets of this temperature cannot be had.
        UnknownFieldError: the store keeps no fingerprints to check by, or no inputs where none were given.
        RequestError: an unknown `check`, ids missing, or a store of sequences.

    Labels are the inputs' own where they have any, else the store's.
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
        if store.manifest.members is None:  # where members are kept, every temperature can still be had
            check_unlocked(wanted, captured=spec.captured, locked=spec.locked)
        if store.manifest.layout.kind == "sequences":
            raise RequestError(
                f"{store.manifest.name!r} keeps sequences, a row a position: fetch ranges of them by "
                "`store.batch(ids, spans=…)`, as clients/examples/tokens.py does"
            )
        if check != "never" and FINGERPRINTS not in store.manifest.arrays:
            raise UnknownFieldError(
                f"{store.manifest.name!r} keeps no fingerprints, so nobody can tell whether an input is the one that "
                "the teacher saw; pass check='never' if you are certain that ids agree"
            )
        self.samples = StoreInputs(store, ids) if inputs is None else as_transfer_set(inputs, ids)
        self.store = store
        self.temperature = wanted
        self.check = check
        self._seen = np.zeros(len(self.samples), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> DistillationBatch:
        """One sample as a batch of one row. A request of its own: loaders ask for whole batches instead."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> DistillationBatch:
        """The samples at these positions, as one batch by one request.

        Raises:
            FingerprintMismatchError: an input is not the one that the targets of its id were computed for.
            UnknownIdError: the store has no targets for a sample.
        """
        wanted = np.asarray(positions, dtype=np.int64)
        if not len(wanted):  # what some ranks take at the last step, where fewer samples are left than ranks
            return self[0].first(0)
        checked = self.checks(wanted)
        if isinstance(self.samples, StoreInputs):
            ids = self.samples.ids[wanted]
            targets = self.store.batch(ids, temperature=self.temperature, inputs=True, fingerprints=checked)
            return self.pair(samples_in(targets), targets, wanted)
        samples = self.samples.take(wanted)
        targets = self.store.batch(
            samples.ids, temperature=self.temperature, labels=samples.labels is None, fingerprints=checked
        )
        return self.pair(samples, targets, wanted)

    def checks(self, positions: NDArray[np.int64] | None = None) -> bool:
        """Whether the samples at these positions, or any of all, have yet to be compared with their fingerprints."""
        seen = self._seen if positions is None else self._seen[positions]
        return self.check == "always" or (self.check == "first" and not seen.all())

    def pair(self, samples: Samples, targets: SoftTargets, positions: NDArray[np.int64]) -> DistillationBatch:
        """One batch of samples and the targets that were fetched for their ids, in this order.

        Args:
            samples: at these positions of the data set.
            targets: with fingerprints, where `checks` asks for them.
            positions: [B].
        Raises:
            FingerprintMismatchError: an input is not the one that the targets of its id were computed for.
        """
        if targets.fingerprints is not None:
            rows = slice(None) if self.check == "always" else np.flatnonzero(~self._seen[positions])
            # An input that comes from the store and fails was damaged on its way, or there.
            self._refuse_other_inputs(samples.inputs[rows], samples.ids[rows], targets.fingerprints[rows])
            self._seen[positions] = True
        if samples.labels is not None:
            targets = dataclasses.replace(targets, labels=samples.labels)
        return DistillationBatch(
            inputs=_tensor(samples.inputs), targets=SoftTargetBatch.from_soft_targets(targets), ids=samples.ids
        )

    def _refuse_other_inputs(self, inputs: NDArray[Any], ids: IdArray, expected: NDArray[np.uint8]) -> None:
        differs = (sample_fingerprints(inputs) != expected).any(axis=1)
        if not differs.any():
            return
        wrong = ids[differs][:_NAMED_AT_MOST].tolist()
        manifest = self.store.manifest
        raise FingerprintMismatchError(
            f"{int(differs.sum())} of {len(ids)} inputs are not those that the targets of {manifest.name!r} were "
            f"computed for, ids {', '.join(map(repr, wrong))} among them; here a sample is {inputs.dtype}"
            f"{list(inputs.shape[1:])}. Order, ids, type or preprocessing differ from transfer set "
            f"{manifest.transfer_set.name!r}, and the student would learn other samples' targets: load the data as the "
            "teacher's job did",
            ids=wrong,
            mismatched=int(differs.sum()),
        )


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
    """Batches of the data set in an order that follows from store, seed and epoch alone, whatever ranks and workers.

    Args:
        dataset: the samples.
        batch_size: rows a batch, and so a request.
        shuffle: a new order each epoch.
        seed: of the orders.
        workers: processes that fetch; 0 fetches in this one.
        remainder: "split" shares what fills no last step among the ranks, "drop" leaves it out, "pad" repeats samples.
        rank, world_size: which of how many ranks; torch.distributed's when left out, or one alone.
        start_method: how workers start; torch's default when None.
        ahead: without workers, a thread fetches the next batch while this one is used.
    Raises:
        RequestError: a number that cannot be.
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
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        # Of its own: else every loader would draw from torch's global generator, and dropout with it would change.
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        collate_fn=collate_batches,
        multiprocessing_context=start_method if workers else None,
        # Kept from epoch to epoch: a fresh worker connects again and checks every fingerprint again.
        persistent_workers=workers > 0,
    )
    return StatefulLoader(loader, order, ahead=ahead)


def samples_in(targets: SoftTargets) -> Samples:
    """The samples that came with their targets, from a store that keeps both."""
    assert targets.inputs is not None
    return Samples(ids=targets.ids, inputs=targets.inputs, labels=targets.labels)


def _tensor(inputs: NDArray[Any]) -> torch.Tensor:
    # torch has no read-only tensors; what is mapped or lies in a reply is copied.
    return torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())


class StoreInputs:
    """The samples that a store keeps beside its targets, near or far, as a transfer set of their own.

    Args:
        store: what `softlabels.open` returned.
        ids: [N] of the samples to take; all of the store's when None.
    Raises:
        UnknownFieldError: the store keeps no inputs.
    """

    def __init__(self, store: TargetStore, ids: Iterable[Any] | NDArray[Any] | None = None) -> None:
        if INPUTS not in store.manifest.arrays:
            raise UnknownFieldError(
                f"{store.manifest.name!r} keeps no inputs, so a student cannot be trained from it alone: pass the "
                "inputs, or precompute with `inputs = true` in the job's [store] table",
                field=INPUTS,
            )
        self._store = store
        self.ids = store.ids() if ids is None else as_ids(ids)

    @property
    def name(self) -> str:
        """The name of the transfer set that the targets were computed for."""
        return self._store.manifest.transfer_set.name

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at these positions, in this order; positions may repeat. One request."""
        targets = self._store.batch(self.ids[positions], inputs=True)
        assert targets.inputs is not None
        return Samples(ids=targets.ids, inputs=targets.inputs, labels=targets.labels)


def as_transfer_set(inputs: TransferSet | MapStyleDataset, ids: Iterable[Any] | NDArray[Any] | None) -> TransferSet:
    """The trainer's data as a transfer set.

    Args:
        inputs: a transfer set, which knows its ids, or a sequence, an array or a map-style torch data set.
        ids: for the latter; None for a transfer set.
    Raises:
        RequestError: ids are missing, or given twice.
    """
    # Arrays and tensors can `take` too, but have no name.
    if hasattr(inputs, "take") and isinstance(getattr(inputs, "name", None), str):
        if ids is not None:
            raise RequestError("a transfer set brings its own ids: leave `ids` out, or pass the bare inputs with `ids`")
        return cast(TransferSet, inputs)
    if ids is None:
        raise RequestError(
            "these inputs have no sample ids: pass `ids`, the ids that their targets were computed under; a position "
            "in a shuffled or filtered data set is no id, and targets would go to other samples without a sign"
        )
    if isinstance(inputs, np.ndarray):
        return ArrayTransferSet("inputs", inputs, ids=as_ids(ids))
    return SequenceTransferSet(cast(MapStyleDataset, inputs), ids=ids, name=type(inputs).__name__)
