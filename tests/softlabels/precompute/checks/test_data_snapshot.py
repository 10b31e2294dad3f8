"""Data-set snapshot: a change is found when the job is resumed, and before its store is published."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import softlabels
from softlabels.errors import ManifestError, SoftLabelsError, TransferSetChangedError, UnreadableSampleError
from softlabels.precompute import load_job, precompute, resume
from softlabels.precompute.checks.data_snapshot import SNAPSHOT
from softlabels.store.verify import verify

MODULE = """
from pathlib import Path
import torch


class Net(torch.nn.Module):
    def __init__(self, folder):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.folder = torch.nn.Linear(48, 3), Path(folder)

    def forward(self, pictures):
        if (self.folder / "stop").exists() and len(pictures) == 8 and self.calls():
            raise RuntimeError("stopped by hand")
        if (self.folder / "touch").exists() and self.calls():
            (self.folder / (self.folder / "touch").read_text()).touch()
        return self.layer(pictures.flatten(1).float() / 255)

    def calls(self):
        count = self.folder / "calls"
        count.write_text(str(int(count.read_text() if count.exists() else 0) + 1))
        return int(count.read_text()) > 3
"""

JOB = """
[store]
path = "store"
rows_per_shard = 8
rows_per_chunk = 4

[transfer_set]
source = "image_folder"
arguments = {{ path = "pictures", threads = 1 }}

[targets]
temperature = 1

[[teachers]]
model = "parts.py:Net"
arguments = {{ folder = "{folder}" }}

[run]
batch_size = 8
device = "cpu"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job over 24 pictures in two folders, in three shards."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    rng = np.random.default_rng(0)
    for number in range(24):
        place = tmp_path / "pictures" / ("left" if number % 2 else "right") / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(place)
    (tmp_path / "parts.py").write_text(MODULE)
    (tmp_path / "job.toml").write_text(JOB.format(folder=tmp_path))
    return tmp_path


@pytest.fixture
def stopped(folder: Path) -> Path:
    """The same job, stopped after some of its shards."""
    (folder / "stop").touch()
    with pytest.raises(SoftLabelsError, match="stopped by hand"):
        precompute(load_job(folder / "job.toml"))
    (folder / "stop").unlink()
    assert (folder / "store" / SNAPSHOT).is_file()
    return folder


def rewritten(folder: Path) -> None:
    """A picture saved again with other contents."""
    (folder / "pictures/left/05.png").write_bytes((folder / "pictures/left/07.png").read_bytes())


class TestResume:
    def test_unchanged_data_resume(self, stopped: Path) -> None:
        """The note that was made when the job began is what the folder still looks like."""
        assert resume(stopped / "store").finished
        assert verify(stopped / "store").sound

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (rewritten, r"'left/05\.png' was .* bytes.* and is now"),
            (lambda folder: os.utime(folder / "pictures/right/04.png"), r"'right/04\.png' was"),
            (lambda folder: (folder / "pictures/left/11.png").unlink(), r"'left/11\.png' is gone"),
            (lambda folder: (folder / "pictures/right/22.png").unlink(), r"'right/22\.png' is gone"),
            (
                lambda folder: (folder / "pictures/a.png").write_bytes((folder / "pictures/left/01.png").read_bytes()),
                r"'a\.png' was not there",
            ),
            (
                lambda folder: (folder / "pictures/z.png").write_bytes((folder / "pictures/left/01.png").read_bytes()),
                r"'z\.png' was not there",
            ),
            (
                lambda folder: (folder / "pictures/left/03.png").rename(folder / "pictures/left/03\tgröße.png"),
                r"'left/03\\tgröße\.png' was not there",
            ),
        ],
    )
    def test_the_first_file_that_differs_is_named(
        self, stopped: Path, change: Callable[[Path], None], words: str
    ) -> None:
        """A picture that was saved again, touched, removed or added: the job is not resumed, and the error says why."""
        before = (stopped / "store" / "plan.json").read_bytes()
        change(stopped)
        with pytest.raises(TransferSetChangedError, match=words):
            resume(stopped / "store")
        assert (stopped / "store" / "plan.json").read_bytes() == before

    def test_without_the_note_it_goes_on(self, stopped: Path) -> None:
        """Whoever is certain that only the times differ deletes the note, as the message says; a new one is made."""
        for path in (stopped / "pictures").rglob("*.png"):
            os.utime(path, ns=(1, 1))
        with pytest.raises(TransferSetChangedError, match=SNAPSHOT):
            resume(stopped / "store")
        (stopped / "store" / SNAPSHOT).unlink()
        assert resume(stopped / "store").finished
        assert (stopped / "store" / SNAPSHOT).is_file()


class TestFinish:
    def test_a_change_during_the_run_is_found_before_the_store_is_published(self, folder: Path) -> None:
        """A file that is written while the teachers compute: no manifest, and the file is named."""
        (folder / "touch").write_text("pictures/left/09.png")
        with pytest.raises(TransferSetChangedError, match=r"left/09\.png"):
            precompute(load_job(folder / "job.toml"))
        assert not (folder / "store" / "manifest.json").exists()

    def test_a_finished_store_asks_no_more(self, folder: Path) -> None:
        """Once the store is published the data may change; running the job again changes nothing."""
        digest = precompute(load_job(folder / "job.toml")).digest
        rewritten(folder)
        assert precompute(load_job(folder / "job.toml")).digest == digest

    @pytest.mark.parametrize(
        "damage", [lambda raw: raw[:-9], lambda raw: b"x" + raw, lambda raw: raw[:40] + b"\xff" * 40]
    )
    def test_a_damaged_note_is_refused_by_name(self, stopped: Path, damage: Callable[[bytes], bytes]) -> None:
        """With what to do; without it the job goes on, and the digest in the plan is compared."""
        note = stopped / "store" / SNAPSHOT
        note.write_bytes(damage(note.read_bytes()))
        with pytest.raises(ManifestError, match="is damaged"):
            resume(stopped / "store")
        note.unlink()
        assert resume(stopped / "store").finished

    def test_the_note_is_no_part_of_the_store(self, folder: Path) -> None:
        """`verify` passes with it, without it, and with another one."""
        precompute(load_job(folder / "job.toml"))
        for damage in (lambda path: None, lambda path: path.write_bytes(b"x"), lambda path: path.unlink()):
            damage(folder / "store" / SNAPSHOT)
            assert verify(folder / "store").sound


class TestSamples:
    def test_a_corrupt_picture_is_named(self, folder: Path) -> None:
        """The error names the file; shards before it are kept, and the job resumes once the file is restored."""
        broken = folder / "pictures" / "right" / "22.png"
        whole = broken.read_bytes()
        state = broken.stat()
        broken.write_bytes(b"\0" * len(whole))
        os.utime(broken, ns=(state.st_atime_ns, state.st_mtime_ns))
        with pytest.raises(UnreadableSampleError, match=r"right/22\.png"):
            precompute(load_job(folder / "job.toml"))
        broken.write_bytes(whole)
        os.utime(broken, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert precompute(load_job(folder / "job.toml")).finished
        with softlabels.open(folder / "store") as store:
            assert store.batch(["right/22.png", "left/01.png"]).labels.tolist() == [1, 0]  # type: ignore[union-attr]
