"""Iterating over an epoch's batches: the rows of each step, and the iterator of soft targets that trainers get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from softlabels.ids import IdArray

if TYPE_CHECKING:
    from softlabels.targets import SoftTargets

END_FORMAT = "softlabels-end/1"
"""Format name in the metadata of a stream's last frame; see docs/http.md."""


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
    """Iterator over the batches of an epoch, as `SoftTargets`, that tracks its cursor.

    Args:
        rows: rows of each step; closed together with this iterator.
        wrap: makes a batch of targets from the rows of a step.
        cursor: where in the epoch the iterator begins.
        batch_count: steps from there to the end.
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
        """Return the next batch.

        Afterwards `cursor` is where the rest of the epoch begins, and `repeated` the number of samples at the batch's
        end that are padding.
        """
        rows = next(self._rows)
        targets = self._wrap(rows)
        self.cursor, self.repeated = rows.cursor_after, rows.repeated
        return targets

    def close(self) -> None:
        """Stop background fetching; not needed after reading to the end."""
        close = getattr(self._rows, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> EpochIterator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
