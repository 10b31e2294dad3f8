"""How does one rank go through an epoch of a store, near or far? The same batches, and the same place to go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from softlabels.errors import RequestError, RowsNotCommittedError
from softlabels.ids import IdArray
from softlabels.order import EpochOrder, RankBatches, Remainder

if TYPE_CHECKING:
    from softlabels.manifest import Manifest
    from softlabels.targets import SoftTargets

END_FORMAT = "softlabels-end/1"
"""What the metadata of a stream's last frame call its form; docs/http.md describes it."""


@dataclass(frozen=True, kw_only=True)
class EpochConfig:
    """Which samples one rank takes in one epoch; `softlabels.order` says what each number means.

    Attributes:
        seed: of the training run.
        epoch: its number.
        batch_size: samples a rank takes at a step.
        rank, world_size: which of how many ranks.
        cursor: how many samples of the epoch all ranks together have taken already.
        shuffle: False takes the samples in the store's order.
        block: consecutive samples that stay near each other, for stores whose rows are dear to fetch one by one.
        remainder: what becomes of the samples that do not fill a last step.
        view: which view of every sample, where the store keeps views; None takes another one each epoch in turn.
    """

    seed: int
    epoch: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    cursor: int = 0
    shuffle: bool = True
    block: int | None = None
    remainder: Remainder = "split"
    view: int | None = None

    def batches(self, manifest: Manifest, digest: str) -> RankBatches:
        """The steps of this rank through a store.

        Raises:
            RequestError: a number out of range, or a view that the store does not keep.
            RowsNotCommittedError: the store is unfinished: an epoch of it would be a short one.
        """
        if not manifest.finished:
            raise RowsNotCommittedError(
                f"{manifest.name!r} is unfinished: an epoch goes through every sample; run `softlabels resume` first"
            )
        self.view_of(manifest)
        order = EpochOrder(
            digest, manifest.samples, seed=self.seed, epoch=self.epoch, block=self.block, shuffle=self.shuffle
        )
        return RankBatches(
            order=order,
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            cursor=self.cursor,
            remainder=self.remainder,
        )

    def view_of(self, manifest: Manifest) -> int | None:
        """The view that this epoch shows of every sample; None where the store keeps no views."""
        layout = manifest.layout
        if layout.kind != "views":
            if self.view is not None:
                raise RequestError(f"{manifest.name!r} keeps no views: it has no view {self.view} to ask for")
            return None
        view = self.epoch % layout.views if self.view is None else self.view
        if not 0 <= view < layout.views:
            raise RequestError(f"{manifest.name!r} keeps views 0 to {layout.views - 1}, not {view}")
        return view

    def resumed_at(self, cursor: int) -> EpochConfig:
        """The rest of the epoch from a cursor on."""
        return replace(self, cursor=cursor)


@dataclass(frozen=True, kw_only=True)
class EpochRows:
    """One step's rows of one rank, as a row source gives them.

    Attributes:
        ids: [B].
        arrays: one a field, [B, ...]; of sequences the rows joined, with `row_offsets` [B + 1].
        repeated: how many samples, at the end, were taken before in this epoch.
        cursor_after: the epoch's cursor once every rank has taken this step.
    """

    ids: IdArray
    arrays: Mapping[str, NDArray[Any]]
    repeated: int
    cursor_after: int


class EpochIterator:
    """The batches of an epoch, one at a time: an iterator of `SoftTargets` that knows where it stands.

    Args:
        rows: the steps' rows; closed when this is.
        wrap: makes a batch of targets of a step's rows.
        plan: whose cursor the epoch begins at.
        batch_count: steps from there to the end.
    """

    def __init__(
        self,
        rows: Iterator[EpochRows],
        wrap: Callable[[EpochRows], SoftTargets],
        *,
        plan: EpochConfig,
        batch_count: int,
    ) -> None:
        self._rows, self._wrap, self._batch_count = rows, wrap, batch_count
        self.cursor = plan.cursor
        self.repeated = 0

    def __len__(self) -> int:
        """Batches from the beginning of this iterator to its end, the same on every rank."""
        return self._batch_count

    def __iter__(self) -> EpochIterator:
        return self

    def __next__(self) -> SoftTargets:
        """The next batch.

        From then on `cursor` is where to begin the rest of the epoch; `repeated` counts the samples at the batch's end
        that are padding.
        """
        rows = next(self._rows)
        targets = self._wrap(rows)
        self.cursor, self.repeated = rows.cursor_after, rows.repeated
        return targets

    def close(self) -> None:
        """Let go of what fetches ahead; an iterator read to its end has done so."""
        close = getattr(self._rows, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> EpochIterator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
