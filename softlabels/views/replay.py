"""How is a stored view made again? From its seed or its recorded parameters, by the same transform, or not at all."""

from __future__ import annotations

import importlib.metadata
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softlabels.errors import RequestError, ViewReplayError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest, ViewSpec
from softlabels.views.transforms import RecordedTransform, ViewTransform, view_seeds


class ViewReplay:
    """Makes the views that a store's targets were computed for.

    Args:
        manifest: of a store that keeps views.
        transform: what made them; see `as_view_transform` and `load_view_transform`.
        other_versions: go on although libraries have other versions by now. Only for who compares every view with its
            fingerprint: one that differs by a bit is another input, and nobody else would notice.
    Raises:
        RequestError: the store keeps no views. ViewReplayError: another transform, or other versions of its libraries.
    """

    def __init__(self, manifest: Manifest, transform: ViewTransform, *, other_versions: bool = False) -> None:
        spec = manifest.views
        if spec is None:
            raise RequestError(f"{manifest.name!r} does not say how views were made: there is none to make again")
        self._name, self._spec, self._transform = manifest.name, spec, transform
        if spec.transform_sha256 is not None and spec.transform_sha256 != transform.identity:
            raise ViewReplayError(
                f"the views of {manifest.name!r} were made by {spec.transform} with {dict(spec.arguments or {})}, and "
                f"this transform differs in code or settings (its digest is {transform.identity[:12]}, the store's "
                f"{spec.transform_sha256[:12]}): its views would not be those that the teacher saw; use the same file "
                "and arguments",
                store=spec.transform_sha256,
                yours=transform.identity,
            )
        if not other_versions:
            _refuse_other_versions(manifest.name, spec)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what the store recorded of each view; empty where views follow from seeds."""
        return self._spec.parameters

    @property
    def draws_in_main_thread(self) -> bool:
        """Whether making a view draws from generators of the whole process, which nobody may use meanwhile."""
        return self._transform.needs_main_thread

    def views(
        self,
        inputs: NDArray[Any],
        ids: IdArray,
        views_B: NDArray[np.int64],
        parameters_BP: NDArray[np.float64] | None = None,
    ) -> NDArray[Any]:
        """The views of these samples.

        Args:
            inputs: [B, ...] samples as the transfer set keeps them.
            ids: [B].
            views_B: [B] the views' numbers, from 0.
            parameters_BP: [B, parameters], as the store recorded them; None where views follow from seeds.
        Returns:
            [B, ...], as the teachers took them.
        Raises:
            ViewReplayError: the parameters are not those that this transform draws; or it draws from generators of the
                whole process and this is not the main thread, where a student's dropout draws from them, too.
        """
        if self.draws_in_main_thread and threading.current_thread() is not threading.main_thread():
            raise ViewReplayError(
                "this transform draws from torch's global generator, and so does whatever trains beside this thread: "
                "its views would come out as others now and then; let it take `generator`, or fetch in worker "
                "processes (workers=1 or more)"
            )
        key = self._spec.seed_key or self._name
        seeds = view_seeds(key, ids, views_B)
        samples = torch.from_numpy(np.ascontiguousarray(inputs))
        given_BP = self._given(parameters_BP, samples)
        made = [
            self._transform.view(sample, seed=int(seed), parameters=given)
            for sample, seed, given in zip(samples, seeds, given_BP, strict=True)
        ]
        return torch.stack(made).numpy()

    def _given(self, parameters_BP: NDArray[np.float64] | None, samples: torch.Tensor) -> NDArray[np.float64]:
        recorded = self._spec.parameters
        if isinstance(self._transform, RecordedTransform) and len(samples):
            self._transform.probe(samples[0])
        own = self._transform.parameters
        if own != recorded:
            differing = sorted(set(own) ^ set(recorded))[:5] or ["their order"]
            raise ViewReplayError(
                f"the views of {self._name!r} were recorded with {len(recorded)} parameters, this transform takes "
                f"{len(own)}: {', '.join(differing)} differ; use the transform that {self._spec.transform} was, and "
                "samples of the same size"
            )
        if parameters_BP is None:
            if recorded:
                raise ViewReplayError("these views were recorded: fetch their targets with view_parameters=True")
            return np.empty((len(samples), 0), dtype=np.float64)
        return parameters_BP


def _refuse_other_versions(name: str, spec: ViewSpec) -> None:
    differing = []
    for package, recorded in sorted(spec.libraries.items()):
        try:
            here = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            here = "not installed"
        if here != recorded:
            differing.append(f"{package} {recorded} there, {here} here")
    if differing:
        raise ViewReplayError(
            f"the views of {name!r} were made with other versions: {'; '.join(differing)}. Another version may draw or "
            "compute otherwise, and the student would see inputs that its targets do not belong to: install those "
            "versions, or have every view compared with its fingerprint (check='always')",
            differing=differing,
        )
