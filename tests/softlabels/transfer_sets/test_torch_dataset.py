"""Map-style torch data sets: items of every form, ids, and data sets that cannot be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import BadIdsError, JobError, ShapeMismatchError
from softlabels.transfer_set import TransferSet
from softlabels.transfer_sets import load_transfer_set

MODULE = """
import numpy as np
import torch

torch.manual_seed(0)
ROWS = torch.randn(10, 3)
PLAIN = torch.utils.data.TensorDataset(ROWS, torch.arange(10))
LISTED = [row for row in ROWS]


class Mapped(torch.utils.data.Dataset):
    def __init__(self, key="pixels", names=None):
        self.key, self.names = key, names

    def __len__(self):
        return 10

    def __getitem__(self, position):
        return {self.key: ROWS[position], "y": None if position == 4 else position % 3, "other": "text"}


class Augmented(Mapped):
    def __getitem__(self, position):
        return ROWS[position] + torch.rand(3), 0


class Ragged(Mapped):
    def __getitem__(self, position):
        return ROWS[position, : 2 + position % 2]


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ROWS


def nothing():
    return 3
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Loads a data set of the module above."""
    (tmp_path / "sets.py").write_text(MODULE)

    def load(dataset: str, **arguments: Any) -> TransferSet:
        return load_transfer_set("torch", {"dataset": f"sets.py:{dataset}", **arguments}, base=tmp_path)

    return load


def everything(data: TransferSet) -> Any:
    """All samples."""
    return data.take(np.arange(len(data)))


class TestItems:
    def test_pairs_are_inputs_with_labels(self, load: Any) -> None:
        """A TensorDataset as it is: positions for ids, its second tensor for labels."""
        samples = everything(load("PLAIN"))
        assert samples.ids.tolist() == samples.labels.tolist() == list(range(10))
        assert samples.inputs.shape == (10, 3)
        assert load("PLAIN").id_spec().dense_start == 0

    def test_bare_items_have_no_labels(self, load: Any) -> None:
        """A list of tensors."""
        assert everything(load("LISTED")).labels is None

    def test_mappings_by_key(self, load: Any) -> None:
        """The keys of input and label; a label of None is unlabelled; the data set's name is its class."""
        data = load("Mapped", input_key="pixels", label_key="y")
        samples = everything(data)
        assert samples.labels.tolist() == [0, 1, 2, 0, -1, 2, 0, 1, 2, 0]
        np.testing.assert_array_equal(samples.inputs, everything(load("PLAIN")).inputs)
        assert data.name == "Mapped"
        assert everything(load("Mapped", input_key="pixels")).labels is None

    def test_tuples_by_position(self, load: Any) -> None:
        """Any part may be the input."""
        assert everything(load("PLAIN", input_key=1, name="numbers")).inputs.tolist() == list(range(10))

    def test_a_key_that_no_item_has(self, load: Any) -> None:
        """With those that it has."""
        with pytest.raises(JobError, match="it is pixels, y, other"):
            load("Mapped", input_key="pixel", label_key="y")


class TestIds:
    def test_an_attribute_or_a_file_names_them(self, load: Any, tmp_path: Path) -> None:
        """Strings or integers, one an item."""
        names = [f"n{number}" for number in range(10)]
        given: dict[str, Any] = {"input_key": "pixels", "label_key": "y"}
        assert everything(load("Mapped", arguments={"names": names}, ids="names", **given)).ids.tolist() == names
        np.save(tmp_path / "ids.npy", np.arange(10) * 7)
        assert everything(load("PLAIN", ids="ids.npy")).ids.tolist() == list(range(0, 70, 7))

    def test_ids_that_cannot_be(self, load: Any, tmp_path: Path) -> None:
        """Repeated, too few, or not there."""
        with pytest.raises(BadIdsError, match="repeat"):
            load("Mapped", arguments={"names": ["a"] * 10}, ids="names", input_key="pixels")
        np.save(tmp_path / "ids.npy", np.arange(9))
        with pytest.raises(ShapeMismatchError, match="9 ids"):
            load("PLAIN", ids="ids.npy")
        with pytest.raises(JobError, match="no attribute 'nams'"):
            load("Mapped", ids="nams")
        (tmp_path / "ids.npy").write_bytes(b"x")
        with pytest.raises(JobError, match=r"ids\.npy"):
            load("PLAIN", ids="ids.npy")


class TestRefusals:
    def test_an_iterable_data_set(self, load: Any) -> None:
        """Its samples have no ids that last; the message says what to do instead."""
        with pytest.raises(JobError, match=r"no items by position.*webdataset tars"):
            load("Streamed")

    def test_one_that_augments_at_random(self, load: Any) -> None:
        """Teacher and student would see different inputs."""
        with pytest.raises(JobError, match="another input when item"):
            load("Augmented")

    def test_items_of_several_shapes(self, load: Any) -> None:
        """They share no batch."""
        with pytest.raises(ShapeMismatchError, match="cannot share a batch"):
            everything(load("Ragged"))

    def test_what_is_no_data_set(self, load: Any) -> None:
        """A number, and arguments that the class does not take."""
        with pytest.raises(JobError, match="gives a int"):
            load("nothing")
        with pytest.raises(JobError, match="does not take"):
            load("Mapped", arguments={"colour": 3})
