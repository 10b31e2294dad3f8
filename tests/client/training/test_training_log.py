"""What a training writes down: figures as CSV and for TensorBoard, and files that are taken up where they stand."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from softlabels.errors import MissingExtraError
from softlabels_client import CsvLog, TensorBoardLog
from softlabels_client.training.training_log import LogRow, ResumableCsv


def figures(step: int, errors: float | None = None) -> LogRow:
    """A row."""
    return LogRow(
        step=step,
        epoch=1 + step // 10,
        samples=32 * step,
        learning_rate=0.1 / 3,
        loss=1.5,
        divergence=0.25,
        errors=errors,
        seconds=2.5,
        accuracy=50.0,
        test_accuracy=None if errors is None else 100.0 - errors,
        samples_per_second=1000.0,
    )


class TestCsvLog:
    def test_a_column_each_and_floats_to_the_bit(self, tmp_path: Path) -> None:
        """Nothing where nothing was evaluated."""
        log = CsvLog(tmp_path / "log.csv")
        log.begin(0)
        log.add(figures(5))
        log.add(figures(10, errors=7))
        log.sync()
        log.close()
        rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
        assert [row["step"] for row in rows] == ["5", "10"]
        assert [row["errors"] for row in rows] == ["", "7"]
        assert float(rows[0]["learning_rate"]) == 0.1 / 3

    def test_a_new_training_begins_a_new_file(self, tmp_path: Path) -> None:
        """Rows of the one before are gone."""
        for step in (5, 6):
            log = CsvLog(tmp_path / "log.csv")
            log.begin(0)
            log.add(figures(step))
            log.close()
        assert [line.partition(",")[0] for line in (tmp_path / "log.csv").read_text().splitlines()] == ["step", "6"]


class TestResumableCsv:
    @pytest.mark.parametrize(
        ("before", "step", "kept"),
        [
            ("step,x\n1,a\n2,b\n3,c\n", 2, "step,x\n1,a\n2,b\n"),
            ("step,x\n1,a\n2,b", 2, "step,x\n1,a\n"),
            ("step,x\n1,a\n2,b\n3", 3, "step,x\n1,a\n2,b\n"),
            ("step,y\n1,a\n", 1, "step,x\n"),
            ("1,a\n", 1, "step,x\n"),
            ("", 1, "step,x\n"),
            ("step,x\nx,a\n", 1, "step,x\n"),
            ("step,x\n1,a\n", 0, "step,x\n"),
        ],
    )
    def test_what_a_checkpoint_does_not_know_is_cut_off(
        self, tmp_path: Path, before: str, step: int, kept: str
    ) -> None:
        """Later steps, half lines and other files' contents; then the training goes on."""
        path = tmp_path / "x.csv"
        path.write_text(before)
        file = ResumableCsv(path, ("step", "x"))
        file.begin(step)
        file.write((9, "z"))
        file.close()
        assert path.read_text() == kept + "9,z\n"


class TestTensorBoardLog:
    def test_scalars_by_step(self, tmp_path: Path) -> None:
        """As TensorBoard itself reads them; a resumed training hides what came after its checkpoint."""
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no TensorBoard")
        first, again = TensorBoardLog(tmp_path), TensorBoardLog(tmp_path)
        first.begin(0)
        for step in (5, 10, 15):
            first.add(figures(step, errors=step))
        first.sync()
        first.close()
        again.begin(10)
        again.add(figures(20, errors=20))
        again.close()
        read = events.EventAccumulator(str(tmp_path))
        read.Reload()
        assert {"distill/loss", "distill/divergence", "distill/errors", "distill/accuracy"} <= set(
            read.Tags()["scalars"]
        )
        assert [(entry.step, entry.value) for entry in read.Scalars("distill/errors")] == [(5, 5), (10, 10), (20, 20)]

    def test_without_tensorboard_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before anything is trained."""
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(MissingExtraError, match=r"softlabels\[tensorboard\]"):
            TensorBoardLog(tmp_path)
