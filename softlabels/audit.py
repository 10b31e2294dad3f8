"""How far kept targets are from exact ones: KL, agreement, what was dropped, and what that does to a gradient.

All of it is streamed row by row, mergeable over shards and of a fixed size whatever the class count. The gradient of
the soft loss in a student's logits is (student's p - target)/T, so the error of a target is, up to 1/T, the error of
every student's gradient: its *variance* is the mean of ‖kept - exact‖² over rows, its *bias* the norm of the mean of
kept - exact. That mean is a vector of C classes; what is kept of it are its products with `SIGNS` fixed vectors of
random signs, whose mean square estimates its norm squared (Johnson and Lindenstrauss 1984). For an unbiased encoding
the bias shrinks as 1/√rows: `bias_ratio` is its square over what pure chance would leave, about 1 for `sampled` and in
proportion to the number of rows for an encoding that errs to one side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.softmath import kl_divergence, log_soften
from softlabels.splitmix64 import splitmix64

SIGNS = 16
"""Vectors of random signs that the mean error is multiplied by: its norm is then known within about 18%."""

LOWEST_EXPONENT, HIGHEST_EXPONENT = -60, 10
STEPS_PER_OCTAVE = 8
BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * STEPS_PER_OCTAVE + 2
"""Buckets of a histogram in log2(KL) whose width is 1/8 octave: a quantile read from it is right within 9%."""


@dataclass(frozen=True, kw_only=True)
class ErrorSums:
    """What an audit needs of some rows, wherever it was computed.

    Attributes:
        rows, top1_agreements: counts. dropped_mass, squared_error: sums over the rows.
        error_C: sum over the rows of kept p minus exact p, float64.
        kl_nats_B: KL of each row, by temperature.
    """

    rows: int
    top1_agreements: int
    dropped_mass: float
    squared_error: float
    error_C: NDArray[np.float64]
    kl_nats_B: Mapping[float, NDArray[np.float64]]


class Audit:
    """Error statistics of an encoding over the rows that it was shown.

    Args:
        temperatures: what the error is measured at.
    """

    def __init__(self, temperatures: tuple[float, ...] = ()) -> None:
        self.rows = 0
        self.top1_agreements = 0
        self.dropped_mass = 0.0
        self.squared_error = 0.0
        self._error_signs = np.zeros(SIGNS)
        self._kl = {temperature: _Distribution() for temperature in temperatures}

    def add(
        self,
        exact_BC: NDArray[np.floating[Any]],
        decoded_BC: NDArray[np.floating[Any]],
        *,
        captured: float,
        dropped_mass_B: NDArray[np.floating[Any]] | None = None,
    ) -> None:
        """Add rows.

        Args:
            exact_BC: logits as they went into the encoding, tempered at `captured`.
            decoded_BC: what comes out of it.
            captured: the temperature that both are tempered at, so that KL at T compares softmax(rows · captured / T).
            dropped_mass_B: probability that the encoding cut off and knows of (`tail_mass` of topk), any shape of B
                entries; left out, it is the mass of the classes that came back as -inf.
        """
        wide, narrow = exact_BC.astype(np.float64), decoded_BC.astype(np.float64)
        p_BC = np.exp(log_soften(wide, temperature=1.0))
        error_BC = np.exp(log_soften(narrow, temperature=1.0)) - p_BC
        dropped = p_BC[np.isneginf(decoded_BC)] if dropped_mass_B is None else dropped_mass_B
        relative = {temperature: temperature / captured for temperature in self._kl}
        self.add_sums(
            ErrorSums(
                rows=len(exact_BC),
                top1_agreements=int((exact_BC.argmax(axis=1) == decoded_BC.argmax(axis=1)).sum()),
                dropped_mass=float(dropped.sum(dtype=np.float64)),
                squared_error=float(np.square(error_BC).sum()),
                error_C=error_BC.sum(axis=0),
                kl_nats_B={
                    temperature: kl_divergence(log_soften(wide, temperature=t), log_soften(narrow, temperature=t))
                    for temperature, t in relative.items()
                },
            )
        )

    @property
    def temperatures(self) -> tuple[float, ...]:
        """What the error is measured at."""
        return tuple(self._kl)

    def add_sums(self, figures: ErrorSums) -> None:
        """Add rows whose figures were computed elsewhere, on the device that holds them."""
        self.rows += figures.rows
        self.top1_agreements += figures.top1_agreements
        self.dropped_mass += figures.dropped_mass
        self.squared_error += figures.squared_error
        self._error_signs += figures.error_C @ _signs(len(figures.error_C))
        for temperature, distribution in self._kl.items():
            distribution.add(figures.kl_nats_B[temperature])

    def merge(self, other: Audit) -> None:
        """Add the rows that `other` has seen."""
        self.rows += other.rows
        self.top1_agreements += other.top1_agreements
        self.dropped_mass += other.dropped_mass
        self.squared_error += other.squared_error
        self._error_signs += other._error_signs
        for temperature, distribution in other._kl.items():
            self._kl.setdefault(temperature, _Distribution()).merge(distribution)

    def summary(self) -> dict[str, Any]:
        """Figures for people.

        KL in nats, mean, p99 (within 9%) and max at each temperature; share of equal top-1; mean mass dropped;
        `rms_error`, `bias` and `bias_ratio` of a gradient (see the file's first lines). A temperature at which some
        row's KL is infinite (a class with p > 0 came back as impossible) is left out of `kl_nats` and counted in
        `infinite_kl_rows`.
        """
        rows = max(1, self.rows)
        finite = {T: distribution for T, distribution in self._kl.items() if not distribution.infinite}
        infinite = {T: distribution for T, distribution in self._kl.items() if distribution.infinite}
        bias_squared = float(np.square(self._error_signs / rows).mean())
        by_chance = self.squared_error / rows**2
        return {
            "rows": self.rows,
            "top1_agreement": self.top1_agreements / rows,
            "dropped_mass": self.dropped_mass / rows,
            "gradient": {
                "rms_error": (self.squared_error / rows) ** 0.5,
                "bias": bias_squared**0.5,
                "bias_ratio": bias_squared / by_chance if by_chance else 0.0,
            },
            "kl_nats": {f"{T:g}": distribution.summary(self.rows) for T, distribution in finite.items()},
            "infinite_kl_rows": {f"{T:g}": distribution.infinite for T, distribution in infinite.items()},
        }

    def to_json(self) -> dict[str, Any]:
        """All that `from_json` needs to go on."""
        kl = {repr(temperature): distribution.to_json() for temperature, distribution in self._kl.items()}
        return {
            "rows": self.rows,
            "top1_agreements": self.top1_agreements,
            "dropped_mass": self.dropped_mass,
            "squared_error": self.squared_error,
            "error_signs": self._error_signs.tolist(),
            "kl": kl,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Audit:
        """The audit that `to_json` described."""
        audit = cls()
        audit.rows = int(document["rows"])
        audit.top1_agreements = int(document["top1_agreements"])
        # Receipts written before these figures existed have none of them.
        audit.dropped_mass = float(document.get("dropped_mass", 0.0))
        audit.squared_error = float(document.get("squared_error", 0.0))
        audit._error_signs = np.array(document.get("error_signs", [0.0] * SIGNS), dtype=np.float64)
        audit._kl = {float(t): _Distribution.from_json(d) for t, d in document["kl"].items()}
        return audit


@lru_cache(maxsize=4)
def _signs(classes: int) -> NDArray[np.float64]:
    """±1, [classes, SIGNS]: bits of a hash of the class number, the same in every run."""
    bits = splitmix64(np.arange(classes, dtype=np.uint64))[:, None] >> np.arange(SIGNS, dtype=np.uint64)
    return 1.0 - 2.0 * (bits & np.uint64(1)).astype(np.float64)


class _Distribution:
    """Sum, maximum and a histogram of non-negative figures; infinite ones are only counted."""

    def __init__(self) -> None:
        self.infinite = 0
        self.sum = 0.0
        self.max = 0.0
        self.counts = np.zeros(BINS, dtype=np.int64)

    def add(self, figures: NDArray[np.float64]) -> None:
        # Rounding may take an exact KL of zero slightly below it.
        finite = figures[np.isfinite(figures)]
        self.infinite += len(figures) - len(finite)
        clipped = np.maximum(finite, 0.0)
        self.sum += float(clipped.sum())
        self.max = max(self.max, float(clipped.max(initial=0.0)))
        with np.errstate(divide="ignore"):
            position = np.floor((np.log2(clipped) - LOWEST_EXPONENT) * STEPS_PER_OCTAVE) + 1
        np.add.at(self.counts, np.clip(position, 0, BINS - 1).astype(np.int64), 1)

    def merge(self, other: _Distribution) -> None:
        self.infinite += other.infinite
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
        histogram = {str(b): int(self.counts[b]) for b in filled}
        return {"sum": self.sum, "max": self.max, "infinite": self.infinite, "histogram": histogram}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> _Distribution:
        distribution = cls()
        distribution.sum, distribution.max = float(document["sum"]), float(document["max"])
        distribution.infinite = int(document.get("infinite", 0))
        for bucket, count in document["histogram"].items():
            distribution.counts[int(bucket)] = int(count)
        return distribution
