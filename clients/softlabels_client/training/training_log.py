"""What does a training leave behind for people? Figures as CSV or for TensorBoard, and which pairs it learnt from.

Every log can be taken up again: whatever it holds of steps after a checkpoint was lost with the process that wrote it,
and is written anew.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

from softlabels.errors import MissingExtraError
from softlabels_client.data.distillation_batch import DistillationBatch

_DIGEST_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row of a training's log.

    Attributes:
        step: optimiser's steps done.
        epoch: counted from 1.
        samples: learnt from, in all epochs together.
        learning_rate: of the last step, of the optimiser's first group.
        loss, divergence: means over the rows since the log's row before; the whole loss, and KL(target, student) at T.
        errors: what the evaluation at this step returned; None where there was none.
        seconds: of the training so far, over all its processes.
    """

    step: int
    epoch: int
    samples: int
    learning_rate: float
    loss: float
    divergence: float
    errors: float | None
    seconds: float


class TrainingLog(Protocol):
    """Where figures go."""

    def begin(self, step: int) -> None:
        """Be ready for what comes after this step; forget what is there of later ones."""
        ...

    def add(self, figures: Figures) -> None:
        """One more row."""
        ...

    def sync(self) -> None:
        """Make durable what was added: a checkpoint is about to be written."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class SteppedCsv:
    """A CSV file whose first column is the step, and which can be cut after one.

    Args:
        path: made where it is missing; its folder must be there.
        columns: of the header; the first is `step`.
    """

    def __init__(self, path: str | Path, columns: tuple[str, ...]) -> None:
        self._path, self._columns = Path(path), columns
        self._file: io.TextIOWrapper | None = None

    def begin(self, step: int) -> None:
        """Open the file, with nothing in it of later steps than this.

        Raises:
            OSError: it cannot be written.
        """
        self.close()
        kept = self._kept_bytes(step)
        self._file = self._path.open("r+" if kept else "w", encoding="utf-8", newline="")
        self._file.seek(kept)
        self._file.truncate()
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not kept:
            self._writer.writerow(self._columns)

    def write(self, *rows: tuple[object, ...]) -> None:
        """Add rows; they are with the operating system when this returns."""
        assert self._file is not None, "begin comes first"
        self._writer.writerows(rows)
        self._file.flush()

    def sync(self) -> None:
        """Make the rows durable."""
        assert self._file is not None, "begin comes first"
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _kept_bytes(self, step: int) -> int:
        """How much of the file is of steps up to this one: whole lines under this very header."""
        kept = 0
        if step == 0 or not self._path.exists():
            return kept
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines):
                first = line.partition(b",")[0]
                if number == 0 and line != (",".join(self._columns) + "\n").encode():
                    break
                if number and not (line.endswith(b"\n") and first.isdigit() and int(first) <= step):
                    break
                kept += len(line)
        return kept


class CsvLog:
    """The figures as a CSV file, a column each.

    Args:
        path: the file; a new training replaces it.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = SteppedCsv(path, tuple(field.name for field in fields(Figures)))

    def begin(self, step: int) -> None:
        """See `TrainingLog`."""
        self._file.begin(step)

    def add(self, figures: Figures) -> None:
        """See `TrainingLog`."""
        self._file.write(tuple("" if value is None else repr(value) for value in asdict(figures).values()))

    def sync(self) -> None:
        """See `TrainingLog`."""
        self._file.sync()

    def close(self) -> None:
        """See `TrainingLog`."""
        self._file.close()


class TensorBoardLog:
    """The figures as scalars for TensorBoard, by step.

    Args:
        folder: where its files go.
    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "a log for TensorBoard needs tensorboard, which is not installed: `pip install "
                "softlabels[tensorboard]`; a CSV log needs nothing",
                extra="tensorboard",
            ) from error
        self._make, self._folder = SummaryWriter, str(folder)
        self._writer: SummaryWriter | None = None

    def begin(self, step: int) -> None:
        """See `TrainingLog`; TensorBoard is told to hide what is there of later steps."""
        self._writer = self._make(self._folder, purge_step=step + 1 if step else None)

    def add(self, figures: Figures) -> None:
        """See `TrainingLog`."""
        assert self._writer is not None, "begin comes first"
        for name, value in asdict(figures).items():
            if name not in ("step", "samples") and value is not None:
                self._writer.add_scalar(f"distill/{name}", value, figures.step)

    def sync(self) -> None:
        """See `TrainingLog`."""
        assert self._writer is not None, "begin comes first"
        self._writer.flush()

    def close(self) -> None:
        """See `TrainingLog`."""
        if self._writer is not None:
            self._writer.close()


class PairRecord:
    """Which target each sample was learnt with: a CSV file with a row for each sample of each epoch.

    The columns are the step, the epoch, the sample's id and a BLAKE2b digest of its target's row as the loss sees it:
    proof, for whoever needs it, that every sample was seen once an epoch with its own target.

    Args:
        path: the file; a new training replaces it.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = SteppedCsv(path, ("step", "epoch", "id", "target"))

    def begin(self, step: int) -> None:
        """Be ready for what comes after this step; forget what is there of later ones."""
        self._file.begin(step)

    def add(self, step: int, epoch: int, batch: DistillationBatch) -> None:
        """A batch that goes into this step of this epoch, both counted from 1; its targets still with the host."""
        rows = batch.targets.logits_BC.numpy()
        self._file.write(
            *(
                (step, epoch, key, target_digest(row.tobytes()))
                for key, row in zip(batch.ids.tolist(), rows, strict=True)
            )
        )

    def sync(self) -> None:
        """Make it durable."""
        self._file.sync()

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()


def target_digest(row: bytes) -> str:
    """The digest that a `PairRecord` has of a target's row of float32 logits: 16 hex digits."""
    return hashlib.blake2b(row, digest_size=_DIGEST_BYTES).hexdigest()


class Logbook:
    """All that one training leaves behind, opened, made durable and closed together.

    Args:
        logs: where figures go.
        record: where pairs go, if anywhere.
    """

    def __init__(self, logs: Sequence[TrainingLog], record: PairRecord | None) -> None:
        self._logs, self._record = (*logs,), record

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Ready for what comes after this step, and closed in the end."""
        try:
            for log in self._all:
                log.begin(step)
            yield
        finally:
            for log in self._all:
                log.close()

    def add(self, figures: Figures) -> None:
        """A row for every log."""
        for log in self._logs:
            log.add(figures)

    def add_pairs(self, step: int, epoch: int, batch: DistillationBatch) -> None:
        """The pairs of a batch, see `PairRecord.add`."""
        if self._record is not None:
            self._record.add(step, epoch, batch)

    def sync(self) -> None:
        """Make all of it durable."""
        for log in self._all:
            log.sync()

    @property
    def _all(self) -> list[TrainingLog | PairRecord]:
        return [*self._logs, *([] if self._record is None else [self._record])]
