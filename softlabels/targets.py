"""One batch of soft targets as a trainer gets it: rows, ids, labels, and the temperature that they carry."""

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
    """How members that are kept side by side are averaged: kind of mean, and one weight a member."""

    kind: Literal["arithmetic", "geometric"]
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """Soft targets of B samples, still encoded; row i belongs to `ids[i]`.

    Attributes:
        ids: [B], in the order asked.
        encoded: the encoding's arrays, [B, ...] each.
        encoding: how to decode them.
        temperature: the T that `p()` and the loss use.
        captured_temperature: the T that the rows are tempered with already.
        locked: True when no other T than the captured one can be had.
        labels: [B], -1 where absent; None when the store keeps none or none were asked for.
        fingerprints: [B, 16] of the samples' contents; None when not asked for.
        store_digest: the version of the store that the rows come from.
        members: how the rows of a store that keeps every member are averaged; None where the mean itself is kept.
        row_offsets: [B + 1] where each sample's rows begin, for sequences: R rows in all instead of one a sample.
        view_parameters: [B, parameters] of each view; None when not asked for.
        inputs: [B, ...] the samples themselves, as the teachers' transfer set gave them; None when not asked for.
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
        """How many classes a row has."""
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
        """logits_BMC of every member, untempered, up to a constant a row and member.

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
        """logits_BC as kept: tempered at `captured_temperature`, up to a row constant."""
        return self._decoded

    def tempered(self, temperature: float | None = None) -> NDArray[np.float32]:
        """logits_BC whose softmax is the target at `temperature` (default: the one the batch carries).

        Raises:
            TemperatureError: not a finite positive number.
            TemperatureLockedError: these rows exist at another temperature only.
        """
        wanted = self.temperature if temperature is None else check_temperature(temperature)
        check_unlocked(wanted, captured=self.captured_temperature, locked=self.locked)
        return retemper(self._decoded, captured=self.captured_temperature, temperature=wanted)

    def p(self, temperature: float | None = None) -> NDArray[np.float32]:
        """p_BC, the soft targets: each row sums to 1. Raises as `tempered` does."""
        return soften(self.tempered(temperature), temperature=1.0)


def check_unlocked(wanted: float, *, captured: float, locked: bool) -> None:
    """Let a temperature pass that these targets can be had at.

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
