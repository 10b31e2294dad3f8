"""ViewDataset: replays the augmented views that the teacher saw, checked by fingerprint, with their targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import RequestError
from softlabels.extras import needs_extra
from softlabels.target_store import TargetStore
from softlabels.targets import SoftTargets
from softlabels.transfer_set import MapStyleDataset, Samples, TransferSet
from softlabels.views import ViewReplay, ViewTransform, as_view_transform, load_view_transform
from softlabels_client.data.dataset import Check, SoftTargetDataset
from softlabels_client.data.distillation_batch import DistillationBatch

with needs_extra("torch", "training a student"):
    import torch


class ViewDataset(SoftTargetDataset):
    """As `SoftTargetDataset`, for a store of views: epoch e shows view e modulo their number of every sample.

    A view's parameters, or its seed, come with its target; the input is replayed from them.

    Args:
        inputs: the samples before augmentation; see `SoftTargetDataset`.
        store: one that keeps views.
        transform: transform of the views; when left out, the manifest's reference is loaded.
        ids, temperature: as in `SoftTargetDataset`.
        check: when to compare a replayed view's fingerprint with that of the teacher's view: the "first" time that a
            process shows a sample, "always", or "never". "always" accepts other library versions, since every view that
            differs is found.
        base: folder that a file reference to the transform is relative to.
    Raises:
        RequestError: the store keeps no views. ViewReplayError: another transform or other library versions than in the
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
        # In shared memory, since persistent workers of a loader keep their own copy of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def show_epoch(self, epoch: int) -> None:
        """Switch to the view of this epoch; loaders call this."""
        self._epoch.fill_(epoch)

    @property
    def view(self) -> int:
        """View of every sample that is shown now."""
        return int(self._epoch) % self.store.manifest.layout.views

    def __getitems__(self, positions: Sequence[int]) -> DistillationBatch:
        """Return the current view of the samples at these positions as one batch, by one request.

        Raises:
            FingerprintMismatchError: a replayed view is not the one that the teacher saw.
            ViewReplayError: it cannot be replayed here.
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
