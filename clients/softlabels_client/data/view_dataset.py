"""How does a student see the views that the teacher saw? Each is made again and compared with its fingerprint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import MissingExtraError, RequestError

try:
    import torch
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from softlabels.target_store import TargetStore
from softlabels.targets import SoftTargets
from softlabels.transfer_set import MapStyleDataset, Samples, TransferSet
from softlabels.views import ViewReplay, ViewTransform, as_view_transform, load_view_transform
from softlabels_client.data.dataset import Check, SoftTargetDataset
from softlabels_client.data.distillation_batch import DistillationBatch


class ViewDataset(SoftTargetDataset):
    """As `SoftTargetDataset`, for a store of views: epoch e shows view e modulo their number of every sample.

    The view's parameters, or its seed, come with its target; the input is made again from them.

    Args:
        inputs: the samples as they were before any view was made of them; see `SoftTargetDataset`.
        store: one that keeps views.
        transform: what made the views. Left out, the manifest's own reference is loaded, with `base` as the folder that
            a file reference starts from.
        ids, temperature: as `SoftTargetDataset` takes them.
        check: of the view made again with the fingerprint of the one that the teacher saw: the "first" time that a
            process shows a sample, "always", or "never". With "always" other versions of libraries are let pass, since
            no view that differs can.
        base: see `transform`.
    Raises:
        RequestError: the store keeps no views. ViewReplayError: another transform or other libraries than the store
        says; ReferenceLoadError: the reference leads nowhere here. And as `SoftTargetDataset`.
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
            raise RequestError(f"{store.manifest.name!r} keeps views of samples, not the samples: pass your inputs")
        super().__init__(inputs, store, ids=ids, temperature=temperature, check=check)
        spec = store.manifest.views
        if store.manifest.layout.kind != "views" or spec is None:
            raise RequestError(
                f"{store.manifest.name!r} keeps no views that could be made again: use SoftTargetDataset"
            )
        made = (
            load_view_transform(spec.transform, arguments=spec.arguments, base=base)
            if transform is None
            else as_view_transform(transform, arguments=spec.arguments)
        )
        self._replay = ViewReplay(store.manifest, made, other_versions=check == "always")
        # Shared with the workers of a loader, which live on from epoch to epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def show_epoch(self, epoch: int) -> None:
        """Which epoch begins, and with it which view is shown; loaders call this."""
        self._epoch.fill_(epoch)

    @property
    def view(self) -> int:
        """The view of every sample that is shown now."""
        return int(self._epoch) % self.store.manifest.layout.views

    def __getitems__(self, positions: Sequence[int]) -> DistillationBatch:
        """The current view of the samples at these positions, as one batch by one request.

        Raises:
            FingerprintMismatchError: a view made again is not the one that the teacher saw.
            ViewReplayError: it cannot be made again here.
        """
        wanted = np.asarray(positions, dtype=np.int64)
        if not len(wanted):
            return self[0].first(0)
        samples = self.samples.take(wanted)
        views = np.full(len(wanted), self.view, dtype=np.int64)
        targets: SoftTargets = self.store.batch(
            samples.ids,
            temperature=self.temperature,
            views=views,
            labels=samples.labels is None,
            fingerprints=self.checks(wanted),
            view_parameters=bool(self._replay.parameters),
        )
        made = self._replay.views(samples.inputs, samples.ids, views, targets.view_parameters)
        return self.pair(Samples(ids=samples.ids, inputs=made, labels=samples.labels), targets, wanted)
