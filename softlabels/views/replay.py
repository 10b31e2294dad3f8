"""Replay of stored views, from seeds or recorded parameters, by the same transform and library versions."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softlabels.errors import RequestError, ViewReplayError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.views.transforms import RecordedTransform, ViewTransform, versions_of, view_seeds


class ViewReplay:
    """The views that a store's targets were computed for, made again.

    Args:
        manifest: manifest of a store with views.
        transform: the transform that made them; see `as_view_transform` and `load_view_transform`.
        other_versions: accept other versions of the libraries. Only safe if every view is compared with its
            fingerprint, since a view that differs by a bit is another input.
    Attributes:
        parameters: names of the numbers that the store recorded for each view; empty if seeds determine the views.
    Raises:
        RequestError: the store keeps no views.
        ViewReplayError: another transform, or other versions of its libraries.
    """

    def __init__(self, manifest: Manifest, transform: ViewTransform, *, other_versions: bool = False) -> None:
        spec = manifest.views
        if spec is None:
            raise RequestError(f"{manifest.name!r} has no views: there is nothing to replay")
        self._name, self._spec, self._transform = manifest.name, spec, transform
        self.parameters = spec.parameters
        if spec.transform_sha256 is not None and spec.transform_sha256 != transform.identity:
            raise ViewReplayError(
                f"the views of {manifest.name!r} were made by {spec.transform} with {dict(spec.arguments or {})}, and "
                f"this transform differs in code or settings (its digest is {transform.identity[:12]}, the store's "
                f"{spec.transform_sha256[:12]}): its views would not be the teacher's inputs; use the same file and "
                "arguments",
                store=spec.transform_sha256,
                yours=transform.identity,
            )
        here = versions_of(spec.libraries)
        differing = [
            f"{package} {recorded} there, {here.get(package, 'not installed')} here"
            for package, recorded in sorted(spec.libraries.items())
            if here.get(package) != recorded
        ]
        if differing and not other_versions:
            raise ViewReplayError(
                f"the views of {manifest.name!r} were made with other versions: {'; '.join(differing)}. They may draw "
                "or compute other values, and the student would get inputs that its targets do not belong to: install "
                "those versions, or compare every view with its fingerprint (check='always')",
                differing=differing,
            )

    def views(
        self,
        inputs: NDArray[Any],
        ids: IdArray,
        views_B: NDArray[np.int64],
        parameters_BP: NDArray[np.float64] | None = None,
    ) -> NDArray[Any]:
        """Return the views of these samples.

        Args:
            inputs: samples as in the transfer set, shape [B, ...].
            ids: sample ids, shape [B].
            views_B: view numbers from 0, shape [B].
            parameters_BP: recorded numbers, shape [B, parameters]; None if seeds determine the views.
        Returns:
            The teachers' inputs, shape [B, ...].
        Raises:
            ViewReplayError: the parameters do not belong to this transform; or it draws from generators of the whole
                process outside the main thread, where training (dropout, for example) draws from them at the same time.
        """
        if self._transform.needs_main_thread and threading.current_thread() is not threading.main_thread():
            raise ViewReplayError(
                "this transform draws from torch's global generator, which training uses at the same time: its views "
                "would sometimes differ; give it a `generator` argument, or fetch in workers (workers=1 or more)"
            )
        seeds = view_seeds(self._spec.seed_key or self._name, ids, views_B)
        samples = torch.from_numpy(np.ascontiguousarray(inputs))
        given_BP = self._given(parameters_BP, samples)
        made = [
            self._transform.view(sample, seed=int(seed), parameters=given)
            for sample, seed, given in zip(samples, seeds, given_BP, strict=True)
        ]
        return torch.stack(made).numpy()

    def _given(self, parameters_BP: NDArray[np.float64] | None, samples: torch.Tensor) -> NDArray[np.float64]:
        recorded = self.parameters
        if isinstance(self._transform, RecordedTransform) and len(samples):
            self._transform.probe(samples[0])
        own = self._transform.parameters
        if own != recorded:
            differing = sorted(set(own) ^ set(recorded))[:5] or ["their order"]
            raise ViewReplayError(
                f"the views of {self._name!r} were recorded with {len(recorded)} parameters, this transform takes "
                f"{len(own)}: {', '.join(differing)} differ; use the same transform, {self._spec.transform}, and "
                "samples of the same size"
            )
        if parameters_BP is None:
            if recorded:
                raise ViewReplayError("these views were recorded: fetch their targets with view_parameters=True")
            return np.empty((len(samples), 0), dtype=np.float64)
        return parameters_BP
