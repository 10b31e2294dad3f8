"""How far kept targets are from exact ones: KL and agreement, streamed row by row and mergeable over shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.softmath import kl_divergence, log_soften

LOWEST_EXPONENT, HIGHEST_EXPONENT = -60, 10
STEPS_PER_OCTAVE = 8
BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * STEPS_PER_OCTAVE + 2
"""Buckets of a histogram in log2(KL) whose width is 1/8 octave: a quantile read from it is right within 9%."""


class Audit:
    """Error statistics of an encoding over the rows that it was shown.

    Args:
        temperatures: what the error is measured at.
    """

    def __init__(self, temperatures: tuple[float, ...] = ()) -> None:
        self.rows = 0
        self.top1_agreements = 0
        self._kl = {temperature: _Distribution() for temperature in temperatures}

    def add(
        self, exact_BC: NDArray[np.floating[Any]], decoded_BC: NDArray[np.floating[Any]], *, captured: float
    ) -> None:
        """Add rows.

        Args:
            exact_BC: logits as they went into the encoding, tempered at `captured`.
            decoded_BC: what comes out of it.
            captured: the temperature that both are tempered at, so that KL at T compares softmax(rows · captured / T).
        """
        self.rows += len(exact_BC)
        self.top1_agreements += int((exact_BC.argmax(axis=1) == decoded_BC.argmax(axis=1)).sum())
        for temperature, distribution in self._kl.items():
            relative = temperature / captured
            exact = log_soften(exact_BC.astype(np.float64), temperature=relative)
            decoded = log_soften(decoded_BC.astype(np.float64), temperature=relative)
            distribution.add(kl_divergence(exact, decoded))

    def merge(self, other: Audit) -> None:
        """Add the rows that `other` has seen."""
        self.rows += other.rows
        self.top1_agreements += other.top1_agreements
        for temperature, distribution in other._kl.items():
            self._kl.setdefault(temperature, _Distribution()).merge(distribution)

    def summary(self) -> dict[str, Any]:
        """Figures for people: KL in nats, mean, p99 (within 9%) and max at each temperature; share of equal top-1."""
        kl = {f"{temperature:g}": distribution.summary(self.rows) for temperature, distribution in self._kl.items()}
        return {"rows": self.rows, "top1_agreement": self.top1_agreements / max(1, self.rows), "kl_nats": kl}

    def to_json(self) -> dict[str, Any]:
        """All that `from_json` needs to go on."""
        kl = {repr(temperature): distribution.to_json() for temperature, distribution in self._kl.items()}
        return {"rows": self.rows, "top1_agreements": self.top1_agreements, "kl": kl}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Audit:
        """The audit that `to_json` described."""
        audit = cls()
        audit.rows = int(document["rows"])
        audit.top1_agreements = int(document["top1_agreements"])
        audit._kl = {float(t): _Distribution.from_json(d) for t, d in document["kl"].items()}
        return audit


class _Distribution:
    """Sum, maximum and a histogram of non-negative figures."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.max = 0.0
        self.counts = np.zeros(BINS, dtype=np.int64)

    def add(self, figures: NDArray[np.float64]) -> None:
        # Rounding may take an exact KL of zero slightly below it.
        clipped = np.maximum(figures, 0.0)
        self.sum += float(clipped.sum())
        self.max = max(self.max, float(clipped.max(initial=0.0)))
        with np.errstate(divide="ignore"):
            position = np.floor((np.log2(clipped) - LOWEST_EXPONENT) * STEPS_PER_OCTAVE) + 1
        np.add.at(self.counts, np.clip(position, 0, BINS - 1).astype(np.int64), 1)

    def merge(self, other: _Distribution) -> None:
        self.sum += other.sum
        self.max = max(self.max, other.max)
        self.counts += other.counts

    def summary(self, rows: int) -> dict[str, float]:
        return {"mean": self.sum / max(1, rows), "p99": self._quantile(0.99), "max": self.max}

    def _quantile(self, share: float) -> float:
        total = int(self.counts.sum())
        if total == 0:
            return 0.0
        bucket = int(np.searchsorted(np.cumsum(self.counts), share * total))
        if bucket == 0:
            return 0.0
        # The bucket's upper edge: an upper bound, never more than the maximum.
        return min(self.max, float(2.0 ** (LOWEST_EXPONENT + bucket / STEPS_PER_OCTAVE)))

    def to_json(self) -> dict[str, Any]:
        filled = np.flatnonzero(self.counts)
        return {"sum": self.sum, "max": self.max, "histogram": {str(b): int(self.counts[b]) for b in filled}}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> _Distribution:
        distribution = cls()
        distribution.sum, distribution.max = float(document["sum"]), float(document["max"])
        for bucket, count in document["histogram"].items():
            distribution.counts[int(bucket)] = int(count)
        return distribution
