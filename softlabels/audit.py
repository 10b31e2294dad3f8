"""Errors of encoded targets: KL to the exact rows, top-1 agreement, dropped mass, and the error of a gradient.

Statistics accumulate batch by batch, merge over shards, and have a fixed size whatever the number of classes. The
gradient of the soft loss in a student's logits is (student's p - target)/T, so the error of a target is, up to 1/T, the
error of every student's gradient. Its *variance* is the mean of ‖decoded - exact‖² over rows, its *bias* the norm of
the mean of decoded - exact. Of that mean, a vector of C classes, only the products with `SIGNS` fixed vectors of random
signs are stored; their mean square estimates its squared norm (Johnson and Lindenstrauss 1984). The bias of an unbiased
encoding shrinks as 1/√rows: `bias_ratio` is its square relative to that of pure chance, about 1 for `sampled`, and
proportional to the number of rows for an encoding with a systematic error.
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
"""Number of random-sign vectors: the norm of the mean error is estimated within about 18%."""

LOWEST_EXPONENT, HIGHEST_EXPONENT = -60, 10
STEPS_PER_OCTAVE = 8
BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * STEPS_PER_OCTAVE + 2
"""Bins of a histogram over log2(KL), 1/8 octave wide: a quantile read from it is exact within 9%."""


@dataclass(frozen=True, kw_only=True)
class ErrorSums:
    """Errors summed over some rows, computed on any device.

    Attributes:
        error_C: sum over the rows of decoded p minus exact p.
        kl_nats_B: KL of each row, by temperature.
    """

    rows: int
    top1_agreements: int
    dropped_mass: float
    squared_error: float
    error_C: NDArray[np.float64]
    kl_nats_B: Mapping[float, NDArray[np.float64]]


class Audit:
    """Error statistics of an encoding, accumulated over rows, with KL at each of `temperatures`."""

    def __init__(self, temperatures: tuple[float, ...] = ()) -> None:
        self.rows = 0
        self.top1_agreements = 0
        self.dropped_mass = 0.0
        self.squared_error = 0.0
        self._error_signs = np.zeros(SIGNS)
        self._kl = {temperature: _Histogram() for temperature in temperatures}

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
            exact_BC: logits before encoding, tempered at `captured`.
            decoded_BC: logits after decoding.
            captured: temperature of both; KL at T compares softmax(rows · captured / T).
            dropped_mass_B: truncated probability that the encoding stores (`tail_mass` of topk), B entries of any
                shape; by default the mass of the classes that decode to -inf.
        """
        # In float64: for narrower rows `log_soften` returns float32, whose rounding would count as an error.
        wide, narrow = exact_BC.astype(np.float64), decoded_BC.astype(np.float64)
        p_BC = np.exp(log_soften(wide, temperature=1.0))
        error_BC = np.exp(log_soften(narrow, temperature=1.0)) - p_BC
        dropped = p_BC[np.isneginf(decoded_BC)] if dropped_mass_B is None else dropped_mass_B
        kl_nats_B = {
            temperature: kl_divergence(log_soften(wide, temperature=t), log_soften(narrow, temperature=t))
            for temperature, t in ((temperature, temperature / captured) for temperature in self._kl)
        }
        self.add_sums(
            ErrorSums(
                rows=len(exact_BC),
                top1_agreements=int((exact_BC.argmax(axis=1) == decoded_BC.argmax(axis=1)).sum()),
                dropped_mass=float(dropped.sum(dtype=np.float64)),
                squared_error=float(np.square(error_BC).sum()),
                error_C=error_BC.sum(axis=0),
                kl_nats_B=kl_nats_B,
            )
        )

    def add_sums(self, sums: ErrorSums) -> None:
        """Add rows whose errors were computed elsewhere, for example on the GPU."""
        self._add_scalars(sums)
        self._error_signs += sums.error_C @ _random_signs(len(sums.error_C))
        for temperature, histogram in self._kl.items():
            histogram.add(sums.kl_nats_B[temperature])

    def _add_scalars(self, other: Audit | ErrorSums) -> None:
        self.rows += other.rows
        self.top1_agreements += other.top1_agreements
        self.dropped_mass += other.dropped_mass
        self.squared_error += other.squared_error

    def merge(self, other: Audit) -> None:
        """Add the rows of another audit."""
        self._add_scalars(other)
        self._error_signs += other._error_signs
        for temperature, histogram in other._kl.items():
            self._kl.setdefault(temperature, _Histogram()).merge(histogram)

    def summary(self) -> dict[str, Any]:
        """Return the statistics for manifests and people.

        KL in nats (mean, p99 within 9%, max) at each temperature; share of rows with equal top-1; mean dropped mass;
        `rms_error`, `bias` and `bias_ratio` of a gradient, as defined above. A temperature at which some row's KL is
        infinite (a class with p > 0 decodes to p = 0) is counted in `infinite_kl_rows` instead of `kl_nats`.
        """
        rows = max(1, self.rows)
        finite = {T: histogram for T, histogram in self._kl.items() if not histogram.infinite}
        infinite = {T: histogram for T, histogram in self._kl.items() if histogram.infinite}
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
            "kl_nats": {f"{T:g}": histogram.summary(self.rows) for T, histogram in finite.items()},
            "infinite_kl_rows": {f"{T:g}": histogram.infinite for T, histogram in infinite.items()},
        }

    def to_json(self) -> dict[str, Any]:
        """Return the state, from which `from_json` continues."""
        return {
            "rows": self.rows,
            "top1_agreements": self.top1_agreements,
            "dropped_mass": self.dropped_mass,
            "squared_error": self.squared_error,
            "error_signs": self._error_signs.tolist(),
            # repr, since it reads back as the same float: `merge` finds histograms by temperature.
            "kl": {repr(temperature): histogram.to_json() for temperature, histogram in self._kl.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Audit:
        """Return the audit with this state."""
        audit = cls()
        audit.rows = int(document["rows"])
        audit.top1_agreements = int(document["top1_agreements"])
        # Receipts of older versions do not have the following keys.
        audit.dropped_mass = float(document.get("dropped_mass", 0.0))
        audit.squared_error = float(document.get("squared_error", 0.0))
        audit._error_signs = np.array(document.get("error_signs", [0.0] * SIGNS), dtype=np.float64)
        audit._kl = {float(t): _Histogram.from_json(d) for t, d in document["kl"].items()}
        return audit


@lru_cache(maxsize=4)
def _random_signs(classes: int) -> NDArray[np.float64]:
    """Return ±1, [classes, SIGNS]: bits of a hash of the class number, the same in every run."""
    bits = splitmix64(np.arange(classes, dtype=np.uint64))[:, None] >> np.arange(SIGNS, dtype=np.uint64)
    return 1.0 - 2.0 * (bits & np.uint64(1)).astype(np.float64)


class _Histogram:
    """Sum, maximum and histogram of non-negative values; infinite ones are only counted."""

    def __init__(self) -> None:
        self.infinite = 0
        self.sum = 0.0
        self.max = 0.0
        self.counts = np.zeros(BINS, dtype=np.int64)

    def add(self, values: NDArray[np.float64]) -> None:
        finite = values[np.isfinite(values)]
        self.infinite += len(values) - len(finite)
        clipped = np.maximum(finite, 0.0)  # rounding may leave a KL of 0 slightly below 0
        self.sum += float(clipped.sum())
        self.max = max(self.max, float(clipped.max(initial=0.0)))
        with np.errstate(divide="ignore"):
            # The first bin takes what is below 2^LOWEST_EXPONENT, zeros too (log2 is -inf), the last what is too large.
            position = np.floor((np.log2(clipped) - LOWEST_EXPONENT) * STEPS_PER_OCTAVE) + 1
        # `counts[position] += 1` would count a repeated bin once. Clipped before the cast: -inf is no integer.
        np.add.at(self.counts, np.clip(position, 0, BINS - 1).astype(np.int64), 1)

    def merge(self, other: _Histogram) -> None:
        self.infinite += other.infinite
        self.sum += other.sum
        self.max = max(self.max, other.max)
        self.counts += other.counts

    def summary(self, rows: int) -> dict[str, float]:
        ends = np.cumsum(self.counts)
        bin_ = int(np.searchsorted(ends, 0.99 * ends[-1]))
        # The upper edge of the bin, which bounds the quantile from above, but at most the maximum.
        p99 = min(self.max, float(2.0 ** (LOWEST_EXPONENT + bin_ / STEPS_PER_OCTAVE))) if bin_ else 0.0
        return {"mean": self.sum / max(1, rows), "p99": p99, "max": self.max}

    def to_json(self) -> dict[str, Any]:
        filled = np.flatnonzero(self.counts)
        histogram = {str(b): int(self.counts[b]) for b in filled}
        return {"sum": self.sum, "max": self.max, "infinite": self.infinite, "histogram": histogram}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> _Histogram:
        histogram = cls()
        histogram.sum, histogram.max = float(document["sum"]), float(document["max"])
        histogram.infinite = int(document.get("infinite", 0))
        for bin_, count in document["histogram"].items():
            histogram.counts[int(bin_)] = int(count)
        return histogram
