"""Soft targets: a batch as a trainer receives it, with ids, labels and temperature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.errors import TemperatureLockedError, UnknownFieldError
from softlabels.ids import IdArray
from softlabels.softmath import check_temperature, mean_arithmetic, mean_geometric, retemper, soften


@dataclass(frozen=True, kw_only=True)
class MemberMean:
    """How the stored members are averaged: kind of mean, and one weight a member."""

    kind: Literal["arithmetic", "geometric"]
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """Soft targets of B samples, still encoded; row i belongs to `ids[i]`.

    Attributes:
        ids: [B] sample ids, in the order of the request.
        encoded: the encoding's arrays, [B, ...] each.
        encoding: encoding that decodes them.
        temperature: T that `p()` and the loss use.
        captured_temperature: T that the rows already have.
        locked: True when the captured T is the only one available.
        labels: [B], -1 where absent; None when the store has none or none were requested.
        fingerprints: [B, 16] content fingerprints of the samples; None when not requested.
        store_digest: digest of the store version that the rows come from.
        members: how members are averaged, for stores that keep them; None where the store keeps their mean.
        row_offsets: [B + 1] first row of each sample, for sequences: R rows in all instead of one a sample.
        view_parameters: [B, parameters] parameters of each view; None when not requested.
        inputs: [B, ...] the samples themselves, as in the transfer set; None when not requested.
    """

    ids: IdArray
    encoded: Mapping[str, NDArray[Any]]
    encoding: Encoding
    temperature: float
    captured_temperature: float
    locked: bool
    labels: NDArray[np.int64] | None = None
    fingerprints: NDArray[np.uint8] | None = None
    store_digest: str = ""
    members: MemberMean | None = None
    row_offsets: NDArray[np.int64] | None = None
    view_parameters: NDArray[np.float64] | None = None
    inputs: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.encoding.classes

    @cached_property
    def _decoded(self) -> NDArray[np.float32]:
        if self.members is None:
            return self.encoding.decode(self.encoded)
        logits_MBC = np.moveaxis(self.member_logits(), 1, 0)
        if self.locked:
            return mean_arithmetic(logits_MBC, temperature=self.captured_temperature, weights_M=self.members.weights)
        return mean_geometric(logits_MBC, weights_M=self.members.weights)

    def member_logits(self) -> NDArray[np.float32]:
        """Return logits_BMC of every member at T = 1, up to a constant a row and member.

        Raises:
            UnknownFieldError: the store keeps the members' mean only.
        """
        if self.members is None:
            raise UnknownFieldError(
                "this store keeps the ensemble's mean, not its members: precompute with keep = 'members'"
            )
        count = len(self.members.weights)
        flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in self.encoded.items()}
        return self.encoding.decode(flat).reshape(-1, count, self.classes)

    def logits(self) -> NDArray[np.float32]:
        """Return logits_BC as stored: tempered at `captured_temperature`, up to a constant a row."""
        return self._decoded

    def tempered(self, temperature: float | None = None) -> NDArray[np.float32]:
        """Return logits_BC whose softmax is the target at `temperature`; None for the batch's own.

        Raises:
            TemperatureError: not a finite positive number.
            TemperatureLockedError: these rows exist at another temperature only.
        """
        wanted = self.temperature if temperature is None else check_temperature(temperature)
        check_unlocked(wanted, captured=self.captured_temperature, locked=self.locked)
        return retemper(self._decoded, captured=self.captured_temperature, temperature=wanted)

    def p(self, temperature: float | None = None) -> NDArray[np.float32]:
        """Return p_BC, the soft targets: each row sums to 1. Raises as `tempered` does."""
        return soften(self.tempered(temperature), temperature=1.0)


def check_unlocked(wanted: float, *, captured: float, locked: bool) -> None:
    """Raise unless these targets exist at the wanted temperature.

    Raises:
        TemperatureLockedError: the targets are an arithmetic mean, truncated or sampled, and `wanted` is another T.
    """
    if locked and wanted != captured:
        raise TemperatureLockedError(
            f"these targets were captured at temperature {captured:g} and cannot be had at {wanted:g}: an arithmetic "
            "mean of distributions, a truncated or a sampled one does not re-temper exactly; ask for "
            f"{captured:g}, or precompute with the geometric mean or with members kept",
            captured=captured,
            wanted=wanted,
        )
