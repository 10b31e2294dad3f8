"""Flipped bits, cut files, full disks, kill -9: a cache never gives a wrong row, and training never ends of it."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.manifest import Manifest
from softlabels.store import LocalRows
from softlabels.target_store import TargetStore
from softlabels_client.cache import CachedRows, CacheFolder

Same = Callable[[Any, Any], None]


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers at each run."""
    return np.random.default_rng(3)


FILES = {"dense": ("rows", "index"), "strings": ("rows", "index", "ids"), "views": ("rows", "index")}
PLACES = [(kind, name) for kind, names in FILES.items() for name in names]
PLAN: dict[str, Any] = {"seed": 1, "epoch": 0, "batch_size": 9}


def refuse_wrong_rows(setting: Any, same: Same) -> None:
    """Batches and an epoch, all as the store itself gives them."""
    ids = setting.near.ids()
    keys = {"views": 1} if setting.near.manifest.layout.kind == "views" else {}
    view = {"view": 1} if keys else {}
    same(setting.cached.batch(ids, **keys), setting.near.batch(ids, **keys))
    for ours, theirs in zip(setting.cached.epoch(**PLAN, **view), setting.near.epoch(**PLAN, **view), strict=True):
        same(ours, theirs)


def flip_bits(path: Path, rng: np.random.Generator, bits: int) -> None:
    """Turn some bits of a file over, of those that are not in a hole."""
    content = bytearray(path.read_bytes())
    written = np.flatnonzero(np.frombuffer(content, np.uint8)) if rng.random() < 0.7 else np.arange(len(content))
    for place in rng.choice(written, size=bits):
        content[place] ^= 1 << int(rng.integers(8))
    with path.open("r+b") as file:
        file.write(content)


class TestFlippedBits:
    @pytest.mark.parametrize(("kind", "name"), PLACES)
    def test_they_never_give_a_wrong_row(
        self, kind: str, name: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """In rows, index or ids, few or many: what is spoilt is asked for again, and put right."""
        setting = make_setting(stores[kind])
        refuse_wrong_rows(setting, refuse_difference)
        rng = np.random.default_rng(len(kind + name))
        for bits in (1, 1, 1, 5, 50):
            flip_bits(setting.file(name), rng, bits)
            refuse_wrong_rows(setting, refuse_difference)

    @pytest.mark.parametrize(("kind", "name"), PLACES)
    def test_nothing_but_noise(
        self, kind: str, name: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """A whole file of random bytes, or of one byte."""
        setting = make_setting(stores[kind])
        refuse_wrong_rows(setting, refuse_difference)
        for seed in range(3):
            size = setting.file(name).stat().st_size
            noise = np.random.default_rng(seed).bytes(size) if seed else b"\xff" * size
            with setting.file(name).open("r+b") as file:
                file.write(noise)
            refuse_wrong_rows(setting, refuse_difference)

    def test_one_is_said_once_and_put_right(
        self, stores: dict[str, Path], make_setting: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The row is asked for again; the next time it comes from the disk."""
        setting = make_setting(stores["dense"])
        ids = setting.near.ids()
        setting.cached.batch(ids, fingerprints=True)
        for byte in (20, 90):  # in the first record, and in the second
            with setting.file("rows").open("r+b") as file:
                file.seek(byte)
                old = file.read(1)[0]
                file.seek(byte)
                file.write(bytes([old ^ 4]))
            setting.far.forget()
            setting.cached.batch(ids, fingerprints=True)
            assert setting.far.fetched == [1]
            setting.cached.batch(ids, fingerprints=True)
            assert setting.far.fetched == [1]
        assert [(record.name, record.levelno) for record in caplog.records] == [("softlabels.cache", logging.WARNING)]
        assert "checksum" in caplog.text

    @pytest.mark.slow
    @pytest.mark.faults
    @pytest.mark.parametrize(("kind", "name"), PLACES)
    def test_thousands_of_times(
        self, kind: str, name: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """The same for long."""
        setting = make_setting(stores[kind])
        refuse_wrong_rows(setting, refuse_difference)
        rng = np.random.default_rng(0)
        for _ in range(300):
            flip_bits(setting.file(name), rng, int(rng.integers(1, 30)))
            refuse_wrong_rows(setting, refuse_difference)

    def test_every_single_bit_of_a_record(
        self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """None goes unnoticed: the row is asked for again, and right."""
        setting = make_setting(stores["dense"])
        expected = setting.near.batch([5], fingerprints=True)
        setting.cached.batch([5], fingerprints=True)
        fields = 8 * (3 + 24 // 8 + 1 + 16 // 8)  # with their checksums; the key before them comes last
        for place in (*range(8, 8 + fields), 0):
            for bit in range(8):
                with setting.file("rows").open("r+b") as file:
                    file.seek(place)
                    old = file.read(1)[0]
                    file.seek(place)
                    file.write(bytes([old ^ 1 << bit]))
                setting.far.forget()
                refuse_difference(setting.cached.batch([5], fingerprints=True), expected)
                assert setting.far.fetched == ([1] if place or not bit else []), (place, bit)


class TestCutFiles:
    @pytest.mark.parametrize("name", ["rows", "index", "ids"])
    @pytest.mark.parametrize("opened", [True, False])
    def test_they_are_noticed(
        self,
        name: str,
        opened: bool,
        stores: dict[str, Path],
        make_setting: Any,
        refuse_difference: Same,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """While a trainer reads them, or before: the rows come from the server, or the cache is made anew."""
        setting = make_setting(stores["strings"])
        refuse_wrong_rows(setting, refuse_difference)
        if not opened:
            setting.cached.close()
        os.truncate(setting.file(name), 1000)
        refuse_wrong_rows(setting, refuse_difference)
        assert ("cannot be read any more" in caplog.text) is opened
        setting.cached.close()
        refuse_wrong_rows(setting, refuse_difference)
        setting.far.forget()
        refuse_wrong_rows(setting, refuse_difference)
        assert (setting.far.fetched, setting.far.epochs) == ([], 0)

    @pytest.mark.parametrize("content", ["", "{", "[1]", '{"slots": -4}', '{"slots": "x"}', "null"])
    def test_a_table_that_says_nothing(
        self, content: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """As a power failure leaves it: made anew."""
        setting = make_setting(stores["dense"])
        setting.cached.batch([5, 6])
        setting.cached.close()
        setting.file("table.json").write_text(content)
        refuse_wrong_rows(setting, refuse_difference)
        assert json.loads(setting.file("table.json").read_text())["name"] == "dense"

    def test_files_that_are_gone(self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same) -> None:
        """Removed under a trainer, which goes on; the next one begins anew."""
        setting = make_setting(stores["strings"])
        refuse_wrong_rows(setting, refuse_difference)
        shutil.rmtree(setting.folder)
        refuse_wrong_rows(setting, refuse_difference)
        setting.cached.close()
        refuse_wrong_rows(setting, refuse_difference)
        assert setting.file("rows").exists()


class TestForeignFiles:
    def test_rows_of_another_version_are_never_used(
        self, stores: dict[str, Path], other_version: Path, make_setting: Any, refuse_difference: Same
    ) -> None:
        """Not even files of another store of the same shape, put in the place of this one's."""
        setting = make_setting(stores["dense"])
        refuse_wrong_rows(setting, refuse_difference)
        with TargetStore(CachedRows(LocalRows(other_version), folder=setting.folder), where="other") as store:
            store.batch(store.ids())
            theirs = setting.folder / "rows-v2" / store.digest
        setting.cached.close()
        for name in ("rows", "index"):
            shutil.copyfile(theirs / name, setting.file(name))
        setting.far.forget()
        refuse_wrong_rows(setting, refuse_difference)
        assert setting.far.fetched == [120]


class TestExchanged:
    """Whole pieces of valid bytes in the place of others, and changes that a sum of words does not see."""

    @pytest.mark.parametrize("kind", ["dense", "strings", "views"])
    def test_two_records(
        self, kind: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same, rng: np.random.Generator
    ) -> None:
        """Each has its own row's key: neither is used for the other row."""
        setting = make_setting(stores[kind])
        refuse_wrong_rows(setting, refuse_difference)
        for name in ("rows", "ids") if kind == "strings" else ("rows",):
            size = json.loads(setting.file("table.json").read_text())["files"][name]
            count = 3 * 120 if kind == "views" else 120
            records = np.fromfile(setting.file(name), np.uint8).reshape(-1, size // count)
            for _ in range(20):
                one, other = rng.choice(len(records), 2, replace=False)
                records[[one, other]] = records[[other, one]]
                overwrite(setting.file(name), records.tobytes())
                refuse_wrong_rows(setting, refuse_difference)

    def test_one_record_for_all(self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same) -> None:
        """A record repeated in every slot is right for one row."""
        setting = make_setting(stores["dense"])
        refuse_wrong_rows(setting, refuse_difference)
        records = np.fromfile(setting.file("rows"), np.uint8).reshape(120, -1)
        overwrite(setting.file("rows"), np.repeat(records[7:8], 120, axis=0).tobytes())
        setting.far.forget()
        refuse_difference(setting.cached.batch(setting.near.ids()), setting.near.batch(setting.near.ids()))
        assert setting.far.fetched == [119]

    def test_two_fields_of_a_record(self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same) -> None:
        """With their checksums: a field's name is part of its sum."""
        setting = make_setting(stores["views"])  # parameters and fingerprints both take two words
        ids = setting.near.ids()
        fields = {"views": 1, "fingerprints": True, "view_parameters": True}
        setting.cached.batch(ids, **fields)
        places = words_of_fields(setting.near.manifest)
        one, other = places["fingerprints"], places["view_parameters"]
        records = np.fromfile(setting.file("rows"), "<u8").reshape(3 * 120, -1)
        records[:, one], records[:, other] = records[:, other].copy(), records[:, one].copy()
        overwrite(setting.file("rows"), records.tobytes())
        refuse_difference(setting.cached.batch(ids, **fields), setting.near.batch(ids, **fields))

    def test_words_and_high_bits_of_a_row(
        self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """Two words exchanged, and the signs of two pairs of numbers turned over, which leave many sums as they are."""
        setting = make_setting(stores["dense"])
        ids = setting.near.ids()
        setting.cached.batch(ids)
        whole = np.fromfile(setting.file("rows"), "<u8").reshape(120, -1)
        signs = np.uint64(1 << 63 | 1 << 31)
        first = words_of_fields(setting.near.manifest)["targets"].start
        for one, other in ((first, first + 1), (first, first + 2), (first + 1, first + 2)):  # six f32 are three words
            swapped, negated = whole.copy(), whole.copy()
            swapped[:, [one, other]] = swapped[:, [other, one]]
            negated[:, [one, other]] ^= signs
            for changed in (swapped, negated):
                overwrite(setting.file("rows"), changed.tobytes())
                refuse_difference(setting.cached.batch(ids), setting.near.batch(ids))

    def test_two_files(self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same) -> None:
        """Of one table, while it is open and before it is opened."""
        setting = make_setting(stores["strings"])
        for opened in (True, False):
            refuse_wrong_rows(setting, refuse_difference)
            if not opened:
                setting.cached.close()
            for one, other in (("rows", "ids"), ("index", "rows")):
                first, second = setting.file(one).read_bytes(), setting.file(other).read_bytes()
                overwrite(setting.file(one), second[: len(first)].ljust(len(first), b"\0"))
                overwrite(setting.file(other), first[: len(second)].ljust(len(second), b"\0"))
                refuse_wrong_rows(setting, refuse_difference)


def words_of_fields(manifest: Manifest) -> dict[str, slice]:
    """Where each field and its checksum are in a record."""
    begin, places = 1, {}
    for name, spec in manifest.arrays.items():
        if name != "ids":
            places[name] = slice(begin, begin + -(-spec.row_bytes // 8) + 1)
            begin = places[name].stop
    return places


def overwrite(path: Path, content: bytes) -> None:
    """Change a file's bytes in place, as an open map sees them."""
    with path.open("r+b") as file:
        file.write(content)


class TestFullDisk:
    @pytest.mark.parametrize("kind", ["dense", "strings", "views"])
    def test_training_goes_on(
        self,
        kind: str,
        stores: dict[str, Path],
        make_setting: Any,
        refuse_difference: Same,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The disk fills up in the middle of a write, at any of them: said once; what was kept before stays right."""
        write = os.pwrite
        for room in (0, 1, 7, 8, 40, 300, 2000, 5000):
            left = room

            def full(fd: int, data: Any, offset: int) -> int:
                nonlocal left
                if left == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                count = write(fd, data[:left], offset)
                left -= count
                return count

            setting = make_setting(stores[kind])
            with monkeypatch.context() as patched:
                patched.setattr(os, "pwrite", full)
                refuse_wrong_rows(setting, refuse_difference)
                refuse_wrong_rows(setting, refuse_difference)
            assert [record.levelno for record in caplog.records] == [logging.WARNING]
            assert "No space left" in caplog.text
            setting.cached.close()
            refuse_wrong_rows(setting, refuse_difference)
            setting.cached.close()
            shutil.rmtree(setting.folder)
            caplog.clear()


FILLING = textwrap.dedent(
    """
    import sys
    import numpy as np
    from pathlib import Path
    from softlabels.target_store import TargetStore
    from softlabels.store import LocalRows
    from softlabels_client.cache import CachedRows

    root, folder, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rows = LocalRows(root)
    print("ready", flush=True)
    store = TargetStore(CachedRows(rows, folder=folder), where="child")
    ids, rng = store.ids(), np.random.default_rng(seed)
    while True:
        for batch in store.epoch(seed=seed, epoch=0, batch_size=5):
            pass
        store.batch(rng.permutation(ids)[:7], fingerprints=True)
        store.close()
        for path in folder.glob("rows-v2/*/table.json"):
            if rng.random() < 0.3:
                path.unlink()
    """
)


def kill_while_it_fills(root: Path, folder: Path, rng: np.random.Generator) -> None:
    """kill -9 a process that fills and empties a cache, at a random moment."""
    child = subprocess.Popen(
        [sys.executable, "-c", FILLING, str(root), str(folder), str(rng.integers(1 << 30))], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(float(rng.uniform(0, 0.06)))
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()


@pytest.mark.parametrize("kind", ["dense", "strings"])
@pytest.mark.parametrize(
    "kills", [pytest.param(4, id="few"), pytest.param(100, id="many", marks=[pytest.mark.slow, pytest.mark.faults])]
)
def test_killed_writers(
    kind: str, kills: int, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
) -> None:
    """Killed at any moment, making, filling or removing a table: no wrong row, no lock left, no rubbish, no damage."""
    rng = np.random.default_rng(kills)
    setting = make_setting(stores[kind])
    setting.cached.close()
    for _ in range(kills):
        kill_while_it_fills(stores[kind], setting.folder, rng)
        refuse_wrong_rows(setting, refuse_difference)
        setting.cached.close()
    assert [path.name for path in (setting.folder / "rows-v2").iterdir() if path.name.startswith(".")] == []
    kept = CacheFolder(setting.folder).stores()
    assert [(store.cached_rows, store.in_use) for store in kept] == [(120, False)]
