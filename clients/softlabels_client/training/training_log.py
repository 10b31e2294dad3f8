"""Logs of a training: metrics as CSV or for TensorBoard, and a record of the (sample, target) pairs trained on.

Every log can be resumed: rows of steps after the checkpoint, which were lost with the process that wrote them, are
removed and written again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

from softlabels.extras import needs_extra
from softlabels_client.data.loader import DistillationBatch


@dataclass(frozen=True, kw_only=True)
class LogRow:
    """One row of a training's log.

    Attributes:
        step, epoch, samples: optimizer steps done; epoch, from 1; samples trained on, over all epochs.
        learning_rate: rate of the last step, of the optimizer's first parameter group.
        loss: mean training loss since the row before.
        divergence: mean KL(target, student) at T since the row before, in nats.
        errors: result of the evaluation at this step; None without one.
        seconds: duration of the training so far, over all its processes.
        accuracy: percent of labelled training samples since the row before that the student predicted correctly, in
            training mode; None without labels.
        test_accuracy: percent of labelled test samples predicted correctly; None unless the evaluation counted errors.
        samples_per_second: training rate since the row before, evaluation and checkpoints included.
    """

    step: int
    epoch: int
    samples: int
    learning_rate: float
    loss: float
    divergence: float
    errors: float | None
    seconds: float
    accuracy: float | None
    test_accuracy: float | None
    samples_per_second: float


class TrainingLog(Protocol):
    """Destination of a training's metrics."""

    def begin(self, step: int) -> None:
        """Open the log to continue after this step; rows of later steps are removed."""

    def add(self, row: LogRow) -> None:
        """Append a row."""

    def sync(self) -> None:
        """Make all rows durable, before a checkpoint is written."""

    def close(self) -> None:
        """Close the log."""


class ResumableCsv:
    """A CSV file in an existing folder; its first column is the step, and it can be truncated after a given step."""

    def __init__(self, path: str | Path, columns: tuple[str, ...]) -> None:
        self._path, self._columns = Path(path), columns
        self._file: io.TextIOWrapper | None = None

    def begin(self, step: int) -> None:
        """Open the file and remove rows of later steps than this. Raises OSError: it cannot be written."""
        self.close()
        size_bytes = self._bytes_up_to(step)
        self._file = self._path.open("r+" if size_bytes else "w", encoding="utf-8", newline="")
        self._file.seek(size_bytes)
        self._file.truncate()
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not size_bytes:
            self._writer.writerow(self._columns)

    def write(self, *rows: tuple[object, ...]) -> None:
        """Append rows and hand them to the operating system."""
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

    def _bytes_up_to(self, step: int) -> int:
        """Return the size of the leading whole lines, under this very header, of steps up to `step`."""
        size_bytes = 0
        if step == 0 or not self._path.exists():
            return 0
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines):
                first = line.partition(b",")[0]
                if number == 0 and line != (",".join(self._columns) + "\n").encode():
                    break
                # A line without a line feed was cut off when the process was killed.
                if number and not (line.endswith(b"\n") and first.isdigit() and int(first) <= step):
                    break
                size_bytes += len(line)
        return size_bytes


class CsvLog(ResumableCsv):
    """Metrics as a CSV file with the columns of `LogRow`; a new training replaces it."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, tuple(field.name for field in fields(LogRow)))

    def add(self, row: LogRow) -> None:
        """Append a row; floats are written so that they are read back to the bit."""
        self.write(tuple("" if value is None else repr(value) for value in asdict(row).values()))


class TensorBoardLog:
    """Metrics as TensorBoard scalars by step, in a log folder. Raises MissingExtraError without TensorBoard."""

    def __init__(self, folder: str | Path) -> None:
        with needs_extra("tensorboard", "a TensorBoard log"):
            from torch.utils.tensorboard import SummaryWriter
        self._make, self._folder = SummaryWriter, str(folder)
        self._writer: SummaryWriter | None = None

    def begin(self, step: int) -> None:
        """Open the log; TensorBoard hides events of later steps than this."""
        self._writer = self._make(self._folder, purge_step=step + 1 if step else None)

    def add(self, row: LogRow) -> None:
        """Append a row."""
        assert self._writer is not None, "begin comes first"
        for name, value in asdict(row).items():
            if name not in ("step", "samples") and value is not None:
                self._writer.add_scalar(f"distill/{name}", value, row.step)

    def sync(self) -> None:
        """Write all events to the file."""
        assert self._writer is not None, "begin comes first"
        self._writer.flush()

    def close(self) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()


class PairRecord(ResumableCsv):
    """A CSV file with a row for each sample of each epoch: evidence that it was trained on with its own target.

    The columns are the step, the epoch, the sample's id, and a BLAKE2b digest of its target as the loss sees it. A new
    training replaces the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, ("step", "epoch", "id", "target"))

    def add(self, step: int, epoch: int, batch: DistillationBatch) -> None:
        """Append a batch of this step and epoch, both from 1; its targets must still be on the host."""
        rows = zip(batch.ids.tolist(), batch.targets.logits_BC.numpy(), strict=True)
        self.write(*((step, epoch, key, target_digest(row.tobytes())) for key, row in rows))


def target_digest(row: bytes) -> str:
    """Return the digest that a `PairRecord` holds of a target's float32 logits: 16 hex digits."""
    return hashlib.blake2b(row, digest_size=8).hexdigest()
