"""A store is replaced by another run of its plan during an epoch: no stream ends well with rows of both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.errors import SoftLabelsError, StoreChangedError
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import LocalRows, StoreWriter, plan_store
from softlabels.target_store import TargetStore
from softlabels_client.cache import CachedRows
from softlabels_client.http.http_rows import HttpRows
from tests.faults.trainer_machine import FixedServer

SAMPLES, CLASSES = 10_000, 1_000
"""20 MB: more than the sockets' buffers hold, so that most of it is read after the store was replaced."""


def write(root: Path, seed: int) -> None:
    """One run of the plan; the seed decides the contents alone."""
    encoding = make_encoding("f16", classes=CLASSES)
    plan = plan_store(
        name="s",
        samples=SAMPLES,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=2.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="noise", source="m:g", arguments={}),
        rows_per_shard=2_500,
    )
    writer = StoreWriter.create(root, plan)
    rng = np.random.default_rng(seed)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            rows = len(claim.rows)
            logits_BC = -rng.random((rows, CLASSES), dtype=np.float32)
            logits_BC[:, 0] = 0
            claim.commit(
                ids=np.arange(claim.rows.start, claim.rows.stop),
                encoded=encoding.encode(logits_BC),
                fingerprints=np.zeros((rows, 16), np.uint8),
                audit=Audit().to_json(),
            )
    writer.finish()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of one plan."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("mine", 0), ("theirs", 1)):
        write(folder / name, seed)
    return {name: folder / name for name in ("mine", "theirs")}


def rename(new: Path, root: Path) -> None:
    """Put one folder in the place of the other."""
    shutil.copytree(new, root.with_name(".new"))
    os.rename(root, root.with_name(".old"))
    os.rename(root.with_name(".new"), root)


def replace_files(new: Path, root: Path) -> None:
    """Replace file after file by another one of its name, as rsync does."""
    for path in sorted(path for path in new.rglob("*") if path.is_file()):
        partial = root / path.relative_to(new).with_suffix(".partial")
        shutil.copyfile(path, partial)
        os.replace(partial, root / path.relative_to(new))


def write_over(new: Path, root: Path) -> None:
    """Write over every file where it is, as `cp -r new/. root/` does."""
    for path in sorted(path for path in new.rglob("*") if path.is_file()):
        shutil.copyfile(path, root / path.relative_to(new))


@pytest.fixture
def place(runs: dict[str, Path], tmp_path: Path) -> Iterator[tuple[Path, FixedServer]]:
    """A server over the first run."""
    root = tmp_path / "served" / "s"
    shutil.copytree(runs["mine"], root)
    server = FixedServer(root.parent, tmp_path / "log")
    yield root, server
    server.kill()


@pytest.mark.parametrize("replace", [rename, replace_files, write_over])
@pytest.mark.parametrize("reader", ["client", "cache", "killed server", "folder"])
def test_an_epoch(
    replace: Callable[[Path, Path], None],
    reader: str,
    runs: dict[str, Path],
    place: tuple[Path, FixedServer],
    tmp_path: Path,
) -> None:
    """It ends with the rows of the run that was opened, or is refused; what was yielded is of that run."""
    root, server = place
    rows: Any = LocalRows(root) if reader == "folder" else HttpRows(f"http://127.0.0.1:{server.port}/s")
    store = TargetStore(CachedRows(rows, folder=tmp_path / "cache") if reader == "cache" else rows, where="here")
    with store, TargetStore(LocalRows(runs["mine"]), where="mine") as mine:
        seen = 0
        try:
            for number, step in enumerate(store.epoch(seed=1, epoch=0, batch_size=100)):
                expected = mine.batch(step.ids).encoded["targets"]
                assert np.array_equal(step.encoded["targets"], expected), f"rows of another run at step {number}"
                seen += len(step.ids)
                if number == 20:
                    replace(runs["theirs"], root)
                    if reader == "killed server":
                        server.kill()
                        server.start()
        except SoftLabelsError as error:
            assert seen < SAMPLES
            if reader != "folder" or replace is not write_over:
                assert isinstance(error, StoreChangedError), f"{type(error).__name__}: {error}"  # noqa: PT017
        else:
            assert seen == SAMPLES
        if reader != "folder":
            with pytest.raises(StoreChangedError):
                HttpRows.fetch(rows, np.arange(5), ("targets",))
