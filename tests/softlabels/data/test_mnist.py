"""MNIST as transfer sets: the real files where they are at hand, and what is said where they are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from softlabels.data.mnist import MIRRORS, load_mnist, mnist_places, open_mnist
from softlabels.errors import DataUnavailableError


class TestUsualPlaces:
    def test_the_environment_names_the_folders(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """`SOFTLABELS_DATA` first, then the cache, then the mirrors."""
        monkeypatch.setenv("SOFTLABELS_DATA", str(tmp_path / "data"))
        monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "cache"))
        places = mnist_places()
        assert places.folders == (("SOFTLABELS_DATA", tmp_path / "data" / "mnist"),)
        assert places.cache == tmp_path / "cache" / "mnist"
        assert places.mirrors == MIRRORS

    def test_without_them_the_cache_is_in_the_home_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And there is no folder before it."""
        monkeypatch.delenv("SOFTLABELS_DATA", raising=False)
        monkeypatch.delenv("SOFTLABELS_CACHE", raising=False)
        places = mnist_places()
        assert places.folders == ()
        assert places.cache == Path.home() / ".cache" / "softlabels" / "mnist"

    def test_npm_is_left_out_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """An empty PATH holds no npm."""
        monkeypatch.setenv("PATH", str(tmp_path))
        assert mnist_places().npm is None


class TestLoadMnist:
    def test_a_folder_that_is_named_is_the_only_place(self, tmp_path: Path) -> None:
        """No download takes the place of a folder that the caller chose."""
        with pytest.raises(DataUnavailableError, match="holds neither train-images-idx3-ubyte") as caught:
            load_mnist(folder=tmp_path)
        assert "mirror" not in str(caught.value)

    def test_an_unknown_split_is_refused(self) -> None:
        """There are two."""
        with pytest.raises(DataUnavailableError, match="'train' and 'test', not 'valid'"):
            load_mnist(split="valid")  # type: ignore[arg-type]

    @pytest.mark.needs_data
    def test_the_real_files_are_as_the_world_knows_them(self, data_dir: Path) -> None:
        """The known count of each class, ids by position, inputs as bytes."""
        mnist = open_mnist(folder=data_dir / "mnist")
        assert mnist.train.name == "mnist"
        assert mnist.test.name == "mnist-test"
        assert mnist.train.inputs.shape == (60_000, 28, 28)
        assert mnist.test.inputs.shape == (10_000, 28, 28)
        assert mnist.train.inputs.dtype == np.uint8
        assert mnist.train.labels is not None
        assert mnist.test.labels is not None
        assert np.bincount(mnist.train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert int((mnist.test.labels == 3).sum()) == 1_010
        np.testing.assert_array_equal(np.arange(60_000), mnist.train.ids)
        np.testing.assert_array_equal(mnist.test.inputs, load_mnist(folder=data_dir / "mnist", split="test").inputs)
