"""A receipt holds file offsets: whatever they are, nothing outside the store is read, and nothing crashes."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import softlabels
from softlabels.documents import open_sealed, seal
from softlabels.errors import ManifestError, SoftLabelsError, TruncatedError

HUGE = 1 << 62
Lie = Callable[[dict[str, Any], dict[str, Any]], None]


def receipt_path(root: Path) -> Path:
    """The receipt of shard 0."""
    return root / "ledger" / "00000000.json"


LIES: dict[str, Lie] = {
    "a stride that is too small": lambda receipt, part: part.update(stride=part["stride"] - 4),
    "a stride that is too large": lambda receipt, part: part.update(stride=HUGE),
    "no stride": lambda receipt, part: part.update(stride=0),
    "a negative offset": lambda receipt, part: part.update(offset=-8),
    "a fractional offset": lambda receipt, part: part.update(offset=1.5),
    "a true offset": lambda receipt, part: part.update(offset=True),
    "an offset in words": lambda receipt, part: part.update(offset="0"),
    "an offset beyond 64 bits": lambda receipt, part: part.update(offset=1 << 70),
    "fewer rows": lambda receipt, part: part.update(rows=31),
    "more rows": lambda receipt, part: part.update(rows=HUGE),
    "rows that are a list": lambda receipt, part: part.update(rows=[32]),
    "sizes where none belong": lambda receipt, part: part.update(sizes=[68] * 4),
    "a part with more in it": lambda receipt, part: part.update(more=1),
    "a part of another array's bytes": lambda receipt, part: part.update(
        offset=receipt["parts"]["labels"]["offset"] + 4, path=receipt["parts"]["labels"]["path"]
    ),
    "a part of a file that is not named": lambda receipt, part: part.update(path="targets/c/9/0"),
    "too few checksums": lambda receipt, part: part.update(checksums=part["checksums"][:-8]),
    "half a checksum": lambda receipt, part: part.update(checksums=part["checksums"][:-1]),
    "checksums in words": lambda receipt, part: part.update(checksums="x" * len(part["checksums"])),
    "no checksums": lambda receipt, part: part.pop("checksums"),
    "checksums that are a list": lambda receipt, part: part.update(checksums=[0] * len(part["checksums"])),
    "no part": lambda receipt, part: receipt["parts"].pop("targets"),
    "parts that are a list": lambda receipt, part: receipt.update(parts=[part]),
    "another shard": lambda receipt, part: receipt.update(shard=1),
    "a true shard": lambda receipt, part: receipt.update(shard=False),
    "another plan": lambda receipt, part: receipt.update(plan_sha256="0" * 64),
    "files that are a list": lambda receipt, part: receipt.update(files=[]),
    "a file of negative size": lambda receipt, part: receipt["files"][part["path"]].update(size=-1),
    "rows that are missing": lambda receipt, part: receipt.pop("rows"),
    "three rows": lambda receipt, part: receipt.update(rows=[0, 1, 2]),
}

ESCAPES = (
    "/etc/passwd",
    "../outside",
    "targets/../../outside",
    "./targets/c/0/0",
    "targets//c/0/0",
    "targets/c/0/0/",
    "",
    ".",
    "..",
    "~root/x",
    ".hidden",
    "a\\..\\..\\b",
    "a\0b",
    "a\nb",
    "C:/windows",
    "-rf",
    "ü",
    "x" * 5000,
    5,
    None,
    ["targets"],
)


class TestInvalidReceipts:
    @pytest.mark.parametrize("lie", LIES.values(), ids=list(LIES))
    def test_it_is_refused(self, store: Path, rewrite: Any, lie: Lie) -> None:
        """With a valid digest and still refused, when the first row is read."""
        rewrite(receipt_path(store), lambda receipt: lie(receipt, receipt["parts"]["targets"]))
        with pytest.raises(ManifestError):
            softlabels.open(store).batch([0])

    @pytest.mark.parametrize(
        ("lie", "field"),
        [
            ("a negative offset", "parts"),
            ("a file of negative size", "files"),
            ("three rows", "rows"),
            ("a true shard", "shard"),
        ],
    )
    def test_the_message_names_the_field(self, store: Path, rewrite: Any, lie: str, field: str) -> None:
        """By its path in the document, beside the path of the receipt."""
        rewrite(receipt_path(store), lambda receipt: LIES[lie](receipt, receipt["parts"]["targets"]))
        with pytest.raises(ManifestError, match=rf"00000000\.json: .*`{field}"):
            softlabels.open(store).batch([0])

    def test_an_address_behind_the_end(self, store: Path, rewrite: Any) -> None:
        """An address outside the file would kill the process with SIGBUS; it is an error that the process survives."""
        copies = []
        for offset in (1, 4096, 1 << 20, 1 << 50, (1 << 62) - 1):
            rewrite(receipt_path(store), lambda receipt: receipt["parts"]["targets"].update(offset=offset))  # noqa: B023
            copies.append(str(shutil.copytree(store, store.parent / f"offset-{offset}")))
        program = (
            "import softlabels, softlabels.errors\n"
            f"for store in {copies!r}:\n"
            "    try: softlabels.open(store).batch([0, 31])\n"
            "    except softlabels.errors.SoftLabelsError as error: print(type(error).__name__)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) == len(copies), done.stdout
        assert set(done.stdout.split()) <= {"TruncatedError", "ChecksumError", "ManifestError"}

    @pytest.mark.parametrize("path", ESCAPES, ids=lambda path: repr(path)[:20])
    def test_a_path_that_leaves_the_store(self, store: Path, rewrite: Any, path: Any) -> None:
        """However the path is written, and also where the right bytes are at its target."""

        def escape(receipt: dict[str, Any]) -> None:
            part = receipt["parts"]["targets"]
            if isinstance(path, str):
                receipt["files"][path] = receipt["files"][part["path"]]
            part["path"] = path

        outside = store.parent / "outside"
        part = open_sealed(receipt_path(store).read_bytes(), what="receipt")["parts"]["targets"]
        outside.write_bytes((store / part["path"]).read_bytes())
        rewrite(receipt_path(store), escape)
        with pytest.raises(ManifestError):
            softlabels.open(store).batch([0])

    @pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.slow)])
    def test_one_value_replaced_by_anything(self, store: Path, rows: Any, examples: int) -> None:
        """Whatever one value of a receipt becomes: the right rows, or an error of ours."""
        receipt = open_sealed(receipt_path(store).read_bytes(), what="receipt")
        (store / "manifest.json").unlink()  # which would refuse any other receipt by its digest
        numbers = st.integers(-10, 5000) | st.sampled_from([HUGE, -HUGE, 1 << 63, 1 << 64])
        anything = numbers | st.none() | st.floats(0, 1e9) | st.text(max_size=9) | st.lists(numbers, max_size=3)

        @settings(max_examples=examples)
        @given(data=st.data())
        def check(data: st.DataObject) -> None:
            changed: Any = copy.deepcopy(receipt)
            place, key = changed, data.draw(st.sampled_from(sorted(receipt)))
            while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
                place, key = place[key], data.draw(st.sampled_from(sorted(place[key])))
            place[key] = data.draw(anything)
            receipt_path(store).write_bytes(seal(changed))
            try:
                batch = softlabels.open(store).batch([0, 31, 99])
            except SoftLabelsError:
                return
            assert np.array_equal(batch.encoded["targets"], rows[[0, 31, 99]])

        check()


class TestLinks:
    def test_a_file_that_is_a_link(self, store: Path) -> None:
        """A shard's file that is a link, even to the right bytes, is refused: it could be to anything."""
        part = open_sealed(receipt_path(store).read_bytes(), what="receipt")["parts"]["targets"]
        path = store / part["path"]
        path.rename(store.parent / "moved")
        path.symlink_to(store.parent / "moved")
        with pytest.raises(ManifestError, match="not a plain file"):
            softlabels.open(store).batch([0])

    def test_a_folder_that_is_a_link(self, store: Path) -> None:
        """A linked folder leads outside as well."""
        part = open_sealed(receipt_path(store).read_bytes(), what="receipt")["parts"]["targets"]
        folder = store / part["path"].split("/")[0]
        folder.rename(store.parent / "moved")
        folder.symlink_to(store.parent / "moved")
        with pytest.raises(ManifestError, match="not a plain file"):
            softlabels.open(store).batch([0])

    def test_the_store_itself_may_be_one(self, store: Path, rows: Any) -> None:
        """The path of the store is the caller's choice, so it may be a link."""
        link = store.parent / "link"
        link.symlink_to(store)
        assert np.array_equal(softlabels.open(link).batch([5]).encoded["targets"], rows[[5]])

    def test_the_ledger_elsewhere(self, store: Path) -> None:
        """The folder of receipts may not be a link either."""
        (store / "ledger").rename(store.parent / "moved")
        (store / "ledger").symlink_to(store.parent / "moved")
        with pytest.raises(ManifestError, match="not a plain file"):
            softlabels.open(store).batch([0])

    def test_a_file_that_is_a_folder_or_a_pipe(self, store: Path) -> None:
        """Neither is read, and neither blocks the reader."""
        part = open_sealed(receipt_path(store).read_bytes(), what="receipt")["parts"]["targets"]
        path = store / part["path"]
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ManifestError, match="not a plain file"):
            softlabels.open(store).batch([0])
        path.unlink()
        path.mkdir()
        with pytest.raises(ManifestError, match="not a plain file"):
            softlabels.open(store).batch([0])


class TestCompressed:
    @pytest.fixture(params=[("zarr", "zstd"), ("zarr", "blosc"), ("hdf5", "gzip")], ids=str)
    def archive(self, request: pytest.FixtureRequest, make_store: Callable[..., Path]) -> Path:
        """A store of compressed chunks."""
        return make_store(request.param[0], compression=request.param[1])

    @pytest.mark.parametrize(
        "sizes",
        [[], [50], [50] * 5, [4] * 4, [0] * 4, [HUGE] * 4, [-1] * 4, [1.5] * 4, ["50"] * 4, None, 5, [True] * 4],
        ids=str,
    )
    def test_sizes_that_cannot_be(self, archive: Path, rewrite: Any, sizes: Any, little_memory: Any) -> None:
        """Too few, too many, too small, beyond the file, of other types: refused before a byte is read."""
        rewrite(receipt_path(archive), lambda receipt: receipt["parts"]["targets"].update(sizes=sizes))
        with little_memory(), pytest.raises((ManifestError, TruncatedError)):
            softlabels.open(archive).batch([0])
