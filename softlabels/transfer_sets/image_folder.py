"""How do pictures in folders become a transfer set? By their relative paths, labelled by folder or by a table."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import DataUnavailableError, JobError
from softlabels.manifest import IdSpec
from softlabels.transfer_set import UNLABELLED, Samples
from softlabels.transfer_sets.images import EXTENSIONS, Decoder, picture_form
from softlabels.transfer_sets.sample_ids import PackedNames
from softlabels.transfer_sets.source_files import existing, file_facts, walk


class ImageFolder:
    """Pictures below a folder; a sample's id is its path relative to it, with `/` on every system. Pickles.

    Args:
        folder: where they lie.
        paths: of the pictures, relative to it.
        labels: [N], `UNLABELLED` where there is none; None when no picture has one.
        decoder: brings them to one shape.
        name: for people and manifests.
    """

    def __init__(
        self, folder: Path, paths: PackedNames, labels: NDArray[np.int64] | None, decoder: Decoder, name: str
    ) -> None:
        self._folder, self._paths, self._labels, self._decoder, self._name = folder, paths, labels, decoder, name

    @property
    def name(self) -> str:
        """A short name for people and manifests."""
        return self._name

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at these positions, decoded, in this order; positions may repeat.

        Raises:
            UnreadableSampleError, ShapeMismatchError: see `Decoder.batch`; the file is named.
        """
        ids = self._paths.take(positions)
        # Opened in the decoder's threads, so that slow disks are read side by side too.
        files = [(partial(Path, self._folder, path), path) for path in ids.tolist()]
        labels = None if self._labels is None else self._labels[positions]
        return Samples(ids=ids, inputs=self._decoder.batch(files), labels=labels)

    def id_spec(self) -> IdSpec:
        """How a store keeps the paths."""
        return self._paths.id_spec()

    def identity(self) -> Iterator[tuple[str, str]]:
        """Each picture's path, size and time of modification, as they are now."""
        for path in _pictures_in(self._folder):
            yield path, file_facts(self._folder / path)


def image_folder(
    path: str,
    size: int | list[int] | None = None,
    resize: int | None = None,
    mode: str = "RGB",
    layout: str = "chw",
    labels: str | None = "folder",
    file_column: str | None = None,
    label_column: str | None = None,
    first_label: int = 0,
    classes: list[str] | None = None,
    threads: int | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> ImageFolder:
    """Pictures in a folder and its sub-folders.

    Args:
        path: the folder.
        size, resize, mode, layout: see `PictureForm`; pictures of several sizes need a `size`.
        labels: "folder" takes the first folder of each path for its class (pictures beside these folders have none);
            "none" leaves all unlabelled; else a CSV file with a header, relative to the folder or to the job file.
        file_column, label_column: of the CSV: the first two when left out. A file may be named without its extension.
        first_label: the number of the first class in the CSV; 1 where classes are counted from one.
        classes: their names in the teachers' order; sorted names of folders when left out.
        threads: that decode; one a core when left out.
        name: of the transfer set; the folder's when left out.
        base: the folder that relative paths start from.
    Raises:
        JobError, DataUnavailableError: no picture, or labels that fit no picture. MissingExtraError: no Pillow.
    """
    folder = existing(path, base, what="folder of pictures")
    decoder = Decoder(picture_form(size, resize, mode, layout), threads)
    paths = PackedNames(_pictures_in(folder))
    if len(paths) == 0:
        raise DataUnavailableError(f"{folder} holds no picture: known are {', '.join(sorted(EXTENSIONS))}")
    if labels == "folder":
        found = _labels_of_folders(paths, classes)
    elif labels in (None, "none"):
        found = None
    else:
        table = folder / str(labels)
        table = table if table.is_file() else existing(str(labels), base, what="table of labels")
        found = _labels_of_table(table, paths, (file_column, label_column), first_label, classes)
    return ImageFolder(folder, paths, found, decoder, name or folder.resolve().name)


def _pictures_in(folder: Path) -> Iterator[str]:
    return (path for path in walk(folder) if "." + path.rpartition(".")[2].lower() in EXTENSIONS)


def _labels_of_folders(paths: PackedNames, classes: list[str] | None) -> NDArray[np.int64] | None:
    folders = {path.partition("/")[0] for path in paths if "/" in path}
    if not folders:
        return None
    names = classes if classes is not None else sorted(folders)
    unknown = sorted(folders - set(names))
    if unknown:
        raise JobError(f"folder {unknown[0]!r} is none of the `classes`, which are {', '.join(names[:20])}")
    number = {folder: label for label, folder in enumerate(names)}
    firsts = (path.partition("/") for path in paths)
    labels = (number[first] if slash else UNLABELLED for first, slash, _ in firsts)
    return np.fromiter(labels, dtype=np.int64, count=len(paths))


def _labels_of_table(
    table: Path,
    paths: PackedNames,
    columns: tuple[str | None, str | None],
    first_label: int,
    classes: list[str] | None,
) -> NDArray[np.int64]:
    known: dict[str, int] = {}
    for position, path in enumerate(paths):
        known[path] = position
        known.setdefault(path.rpartition(".")[0], position)
    labels = np.full(len(paths), UNLABELLED, dtype=np.int64)
    numbers = None if classes is None else {entry: label for label, entry in enumerate(classes)}
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        of_file, of_label = _columns(table, rows.fieldnames or [], columns)
        for row in rows:
            if row[of_file] not in known:
                raise JobError(f"{table}, line {rows.line_num}: there is no picture {row[of_file]!r}")
            labels[known[row[of_file]]] = _label(row[of_label], first_label, numbers, f"{table}, line {rows.line_num}")
    return labels


def _columns(table: Path, header: Sequence[str], wanted: tuple[str | None, str | None]) -> list[str]:
    header = list(header)
    found = [name or (header[place] if place < len(header) else "") for place, name in enumerate(wanted)]
    for name in found:
        if name not in header:
            raise JobError(f"{table} has no column {name!r}: it has {', '.join(header) or 'none'}")
    return found


def _label(text: str | None, first_label: int, numbers: Mapping[str, int] | None, where: str) -> int:
    if not text:
        return UNLABELLED
    if numbers is not None:
        if text not in numbers:
            raise JobError(f"{where}: {text!r} is none of the `classes`")
        return numbers[text]
    try:
        label = int(text) - first_label
    except ValueError as error:
        raise JobError(f"{where}: label {text!r} is no whole number; name the `classes` in their order") from error
    if label < 0:
        raise JobError(f"{where}: label {text} lies before `first_label`, {first_label}")
    return label
