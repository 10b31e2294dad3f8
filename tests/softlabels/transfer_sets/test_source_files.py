"""Files of a transfer set: patterns, and listing of folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from softlabels.errors import DataUnavailableError, JobError
from softlabels.transfer_sets.source_files import list_files, match_files


class TestMatching:
    def test_ranges_choices_and_stars(self, tmp_path: Path) -> None:
        """As in shells and the webdataset library; sorted within a pattern, in order between."""
        for name in ("a-000.tar", "a-001.tar", "b-000.tar", "c.tar"):
            (tmp_path / name).touch()
        (tmp_path / "d.tar").mkdir()

        def names(patterns: str | list[str]) -> list[str]:
            return [path.name for path in match_files(patterns, tmp_path, what="tars")]

        assert names("a-{000..001}.tar") == ["a-000.tar", "a-001.tar"]
        assert names("{b,a}-000.tar") == ["b-000.tar", "a-000.tar"]
        assert names(["c.tar", "?-*.tar"]) == ["c.tar", "a-000.tar", "a-001.tar", "b-000.tar"]
        assert names(str(tmp_path / "c.tar")) == ["c.tar"]

    def test_what_names_nothing_or_too_much(self, tmp_path: Path) -> None:
        """A gap in a range, a folder, a million files and more."""
        (tmp_path / "0.tar").touch()
        with pytest.raises(DataUnavailableError, match=r"1\.tar"):
            match_files("{0..1}.tar", tmp_path, what="tars")
        with pytest.raises(DataUnavailableError, match="names no file"):
            match_files(".", tmp_path, what="tars")
        for pattern in ("{0..99999999}.tar", "{0..9999}{0..9999}.tar"):
            with pytest.raises(JobError, match="more than 1,000,000 files"):
                match_files(pattern, tmp_path, what="tars")

    def test_a_listing_is_always_the_same(self, tmp_path: Path) -> None:
        """Files of a folder first, then its folders, each in order; hidden ones are skipped."""
        for name in ("b/x", "b/a/y", "a", ".git/config", "c/.cache", "b/z"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        assert list(list_files(tmp_path)) == ["a", "b/x", "b/z", "b/a/y"]
