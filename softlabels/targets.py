"""Soft targets as a trainer receives them: one batch, and the iterator over the batches of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    """Raise TemperatureLockedError if targets are locked to the captured temperature and another one is wanted."""
    if locked and wanted != captured:
        raise TemperatureLockedError(
            f"these targets were captured at temperature {captured:g} and cannot be had at {wanted:g}: an arithmetic "
            "mean of distributions, a truncated or a sampled one does not re-temper exactly; ask for "
            f"{captured:g}, or precompute with the geometric mean or with members kept",
            captured=captured,
            wanted=wanted,
        )


@dataclass(frozen=True, kw_only=True)
class EpochRows:
    """Rows of one step of one rank, as a row source returns them.

    Attributes:
        ids: [B].
        arrays: one per field, [B, ...]; for sequences the concatenated rows, with `row_offsets` [B + 1].
        repeated: how many samples, at the end, were already taken in this epoch.
        cursor_after: cursor of the epoch once every rank has taken this step.
    """

    ids: IdArray
    arrays: Mapping[str, NDArray[Any]]
    repeated: int
    cursor_after: int


class EpochIterator:
    """Iterator over the batches of an epoch, as `SoftTargets`.

    Args:
        rows: rows of each step; closed together with this iterator.
        wrap: makes a batch of targets from the rows of a step.
        cursor: where in the epoch the iterator begins.
        batch_count: steps from there to the end.
    Attributes:
        cursor: where the rest of the epoch begins, after the batches returned so far.
        repeated: samples at the end of the last batch that only pad it, so that all ranks take equally many.
    """

    def __init__(
        self, rows: Iterator[EpochRows], wrap: Callable[[EpochRows], SoftTargets], *, cursor: int, batch_count: int
    ) -> None:
        self._rows, self._wrap, self._batch_count = rows, wrap, batch_count
        self.cursor = cursor
        self.repeated = 0

    def __len__(self) -> int:
        """Number of batches of the whole iterator, the same on every rank."""
        return self._batch_count

    def __iter__(self) -> EpochIterator:
        return self

    def __next__(self) -> SoftTargets:
        rows = next(self._rows)
        targets = self._wrap(rows)
        # Only now: a checkpoint that is written after a failed batch must begin with that batch.
        self.cursor, self.repeated = rows.cursor_after, rows.repeated
        return targets

    def close(self) -> None:
        """Stop background fetching; not needed after reading to the end."""
        close = getattr(self._rows, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> EpochIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
