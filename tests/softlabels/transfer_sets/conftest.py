"""The same fourteen small images and vectors, kept in every way that a transfer set can be read from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

COUNT = 14
SIDE = 12
LABELS = [0, 1, -1, 2, 1, 0, 2, 2, 1, 0, -1, 1, 0, 2]
"""Every source below keeps -1, no label or null for the third and the eleventh."""

MODULE = """
import numpy as np
import torch


class Pairs(torch.utils.data.Dataset):
    def __init__(self, folder="."):
        self.pixels, self.labels = np.load(folder + "/pixels.npy"), np.load(folder + "/labels.npy")
        self.names = [f"s{n:02d}" for n in range(len(self.labels))]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, position):
        label = int(self.labels[position])
        return torch.from_numpy(self.pixels[position]), None if label < 0 else label
"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One way to keep the samples.

    Attributes:
        kind, arguments: as a job names them.
        base: the job's folder.
        ids, inputs, labels: what `take` must give for all samples in order.
        path: a file of it that may change.
    """

    kind: str
    arguments: dict[str, Any]
    base: Path
    ids: list[Any]
    inputs: NDArray[Any]
    labels: list[int] | None
    path: Path


def pixels_HWC() -> NDArray[np.uint8]:
    """The images, [14, 12, 12, 3]."""
    return np.random.default_rng(3).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)


NAMES = [f"s{n:02d}" for n in range(COUNT)]
CLASSES = ("ant", "bee", "cat")
CHW = np.ascontiguousarray(pixels_HWC().transpose(0, 3, 1, 2))


def _image_folder(base: Path) -> Source:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    order = [(NAMES[n] if LABELS[n] < 0 else f"{CLASSES[LABELS[n]]}/{NAMES[n]}", n) for n in range(COUNT)]
    order.sort(key=lambda entry: ("/" in entry[0], entry[0]))
    for name, number in order:
        path = base / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels_HWC()[number]).save(path)
    (base / "images" / "notes.txt").write_text("no image")
    numbers = [number for _, number in order]
    return Source(
        kind="image_folder",
        arguments={"path": "images"},
        base=base,
        ids=[f"{name}.png" for name, _ in order],
        inputs=CHW[numbers],
        labels=[LABELS[number] for number in numbers],
        path=base / "images" / f"{order[5][0]}.png",
    )


def _torch(base: Path) -> Source:
    (base / "parts.py").write_text(MODULE)
    np.save(base / "pixels.npy", CHW)
    np.save(base / "labels.npy", np.array(LABELS))
    return Source(
        kind="torch",
        arguments={"dataset": "parts.py:Pairs", "arguments": {"folder": str(base)}, "ids": "names", "files": "*.npy"},
        base=base,
        ids=NAMES,
        inputs=CHW,
        labels=LABELS,
        path=base / "pixels.npy",
    )


def _webdataset(base: Path) -> Source:
    library = pytest.importorskip("webdataset", reason="webdataset is not installed")
    pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for shard, numbers in enumerate((range(5), range(5, COUNT))):
        with library.TarWriter(str(base / f"train-{shard:03d}.tar")) as tar:
            for number in numbers:
                sample: dict[str, Any] = {"__key__": NAMES[number], "png": pixels_HWC()[number]}
                tar.write(sample if LABELS[number] < 0 else {**sample, "cls": LABELS[number]})
    return Source(
        kind="webdataset",
        arguments={"shards": "train-{000..001}.tar", "threads": 2},
        base=base,
        ids=NAMES,
        inputs=CHW,
        labels=LABELS,
        path=base / "train-001.tar",
    )


def _huggingface(base: Path) -> Source:
    library = pytest.importorskip("datasets", reason="the datasets library is not installed")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    library.disable_progress_bars()
    rows = {
        "key": NAMES,
        "image": [image.fromarray(pixels) for pixels in pixels_HWC()],
        "label": [None if label < 0 else label for label in LABELS],
    }
    library.Dataset.from_dict(rows).save_to_disk(str(base / "saved"))
    return Source(
        kind="huggingface",
        arguments={"path": "saved", "id": "key"},
        base=base,
        ids=NAMES,
        inputs=CHW,
        labels=LABELS,
        path=base / "saved" / "data-00000-of-00001.arrow",
    )


def _parquet(base: Path) -> Source:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    for number, part in enumerate((slice(0, 6), slice(6, COUNT))):
        table = pa.table(
            {
                "name": NAMES[part],
                "pixels": pa.array(CHW[part].reshape(len(CHW[part]), -1).tolist(), type=pa.list_(pa.uint8())),
                "label": pa.array([None if label < 0 else label for label in LABELS[part]], type=pa.int16()),
            }
        )
        pq.write_table(table, base / f"part-{number}.parquet", row_group_size=4)
    return Source(
        kind="parquet",
        arguments={
            "path": "part-*.parquet",
            "input": "pixels",
            "shape": [3, SIDE, SIDE],
            "label": "label",
            "id": "name",
        },
        base=base,
        ids=NAMES,
        inputs=CHW,
        labels=LABELS,
        path=base / "part-1.parquet",
    )


def _hdf5(base: Path) -> Source:
    import h5py

    with h5py.File(base / "all.h5", "w") as file:
        file.create_dataset("train/images", data=CHW, chunks=(4, 3, SIDE, SIDE), compression="gzip")
        file["train/labels"], file["train/names"] = np.array(LABELS, dtype=np.int8), NAMES
    keys = {"inputs": "train/images", "labels": "train/labels", "ids": "train/names"}
    arguments = {"path": "all.h5", **keys}
    path = base / "all.h5"
    return Source(kind="hdf5", arguments=arguments, base=base, ids=NAMES, inputs=CHW, labels=LABELS, path=path)


def _zarr(base: Path) -> Source:
    import zarr

    group = zarr.create_group(base / "all.zarr")
    group.create_array("train/images", data=CHW, chunks=(4, 3, SIDE, SIDE))
    group.create_array("train/labels", data=np.array(LABELS), chunks=(5,))
    group.create_array("train/numbers", data=np.arange(COUNT) * 3, chunks=(5,))
    keys = {"inputs": "train/images", "labels": "train/labels", "ids": "train/numbers"}
    return Source(
        kind="zarr",
        arguments={"path": "all.zarr", **keys},
        base=base,
        ids=[3 * number for number in range(COUNT)],
        inputs=CHW,
        labels=LABELS,
        path=base / "all.zarr" / "train" / "images" / "c" / "2" / "0" / "0" / "0",
    )


def _npy(base: Path) -> Source:
    np.save(base / "images.npy", CHW)
    np.save(base / "labels.npy", np.array(LABELS, dtype=np.int16))
    np.save(base / "names.npy", np.array(NAMES))
    return Source(
        kind="npy",
        arguments={"inputs": "images.npy", "labels": "labels.npy", "ids": "names.npy"},
        base=base,
        ids=NAMES,
        inputs=CHW,
        labels=LABELS,
        path=base / "images.npy",
    )


def _text(base: Path) -> Source:
    """Words of a tiny vocabulary: a number a word, sequences of four."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "ant", "bee", "cat"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (base / "words").mkdir()
    made.save(str(base / "words" / "tokenizer.json"))
    config = '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>"}'
    (base / "words" / "tokenizer_config.json").write_text(config)
    (base / "a.txt").write_text("ant bee\ncat ant bee dog\n")
    return Source(
        kind="text",
        arguments={"files": "a.txt", "tokenizer": "words", "length": 4},
        base=base,
        ids=["a.txt:0", "a.txt:4"],
        inputs=np.array([[2, 3, 4, 2], [3, 0, -1, -1]], dtype=np.int32),
        labels=None,
        path=base / "a.txt",
    )


SEQUENCE_MAKERS: dict[str, Callable[[Path], Source]] = {"text": _text}
"""Whose samples have many positions, and are not all alike."""

MAKERS: dict[str, Callable[[Path], Source]] = {
    "image_folder": _image_folder,
    "torch": _torch,
    "webdataset": _webdataset,
    "huggingface": _huggingface,
    "parquet": _parquet,
    "hdf5": _hdf5,
    "zarr": _zarr,
    "npy": _npy,
}


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[[str], Source]:
    """Keeps the samples in one way: `make_source("parquet")`."""

    def make(kind: str) -> Source:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that write
            return (MAKERS | SEQUENCE_MAKERS)[kind](tmp_path)

    return make


@pytest.fixture(params=tuple(MAKERS))
def source(request: pytest.FixtureRequest, make_source: Callable[[str], Source]) -> Source:
    """The samples, kept in each of the ways."""
    return make_source(request.param)
