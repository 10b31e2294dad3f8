"""One batch of soft targets as a trainer gets it: rows, ids, labels, and the temperature that they carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.errors import TemperatureLockedError
from softlabels.ids import IdArray
from softlabels.softmath import check_temperature, retemper, soften


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

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> int:
        """How many classes a row has."""
        return self.encoding.classes

    @cached_property
    def _decoded(self) -> NDArray[np.float32]:
        return self.encoding.decode(self.encoded)

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
        refuse_if_locked(wanted, captured=self.captured_temperature, locked=self.locked)
        return retemper(self._decoded, captured=self.captured_temperature, temperature=wanted)

    def p(self, temperature: float | None = None) -> NDArray[np.float32]:
        """p_BC, the soft targets: each row sums to 1. Raises as `tempered` does."""
        return soften(self.tempered(temperature), temperature=1.0)


def refuse_if_locked(wanted: float, *, captured: float, locked: bool) -> None:
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
