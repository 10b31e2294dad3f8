"""Image folders: ids are relative paths; labels are the first folder of each path, or columns of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import DataUnavailableError, JobError
from softlabels.ids import IdArray
from softlabels.transfer_set import UNLABELLED, Samples
from softlabels.transfer_sets.images import EXTENSIONS, ImageDecoder, ImageSource
from softlabels.transfer_sets.sample_ids import PackedStrings
from softlabels.transfer_sets.source_files import FileTransferSet, existing_path, file_state, list_files


class ImageFolder(FileTransferSet):
    """Images below a folder, each under its path relative to it, with `/` on every system. Can be pickled."""

    def __init__(
        self, folder: Path, paths: PackedStrings, labels: NDArray[np.int64] | None, decoder: ImageDecoder, name: str
    ) -> None:
        super().__init__(name, (folder,), paths.id_spec())
        self._folder, self._paths, self._labels, self._decoder = folder, paths, labels, decoder

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at these positions."""
        ids = self._paths.take(positions)
        names = ids.tolist()
        inputs = self._decoder.decode_batch([self._folder / name for name in names], names)
        return Samples(ids=ids, inputs=inputs, labels=None if self._labels is None else self._labels[positions])

    def all_ids(self) -> Iterator[IdArray]:
        """Yield the paths of the images that there were when the folder was listed."""
        return self._paths.blocks()

    def identity(self) -> Iterator[tuple[str, str]]:
        """Yield path, size and modification time of each image as they are now."""
        for path in _images_in(self._folder):
            yield path, file_state(self._folder / path)


class ImageFolderSource(ImageSource, frozen=True, kw_only=True):
    """Images in a folder and its subfolders.

    Attributes:
        path: the folder; its name is the transfer set's by default.
        labels: "folder" for the first folder of each path (images at the top are unlabelled); "none"; or a CSV file
            with a header, relative to the folder or to the job file.
        file_column, label_column: columns of the CSV file, by default its first two. A file may be named without its
            extension.
        first_label: number of the first class in the CSV file, 1 where classes are counted from one.
        classes: class names in the order of the teachers' outputs; by default the sorted names of folders.
    """

    path: str
    labels: str | None = "folder"
    file_column: str | None = None
    label_column: str | None = None
    first_label: int = 0
    classes: list[str] | None = None

    def load(self, base: Path | None) -> ImageFolder:
        """Return the images below the folder."""
        folder = existing_path(self.path, base, what="folder of images")
        decoder = self.decoder()
        paths = PackedStrings(_images_in(folder))
        if len(paths) == 0:
            raise DataUnavailableError(f"{folder} holds no image; known are {', '.join(sorted(EXTENSIONS))}")
        labels = self._labels_of(paths, folder, base)
        return ImageFolder(folder, paths, labels, decoder, self.name or folder.resolve().name)

    def _labels_of(self, paths: PackedStrings, folder: Path, base: Path | None) -> NDArray[np.int64] | None:
        if self.labels in (None, "none"):
            return None
        if self.labels == "folder":
            return _labels_by_folder(paths, self.classes)
        assert self.labels is not None
        table = folder / self.labels
        table = table if table.is_file() else existing_path(self.labels, base, what="table of labels")
        return self._labels_by_table(table, paths)

    def _labels_by_table(self, table: Path, paths: PackedStrings) -> NDArray[np.int64]:
        known: dict[str, int] = {}
        for position, path in enumerate(paths):
            known[path] = position
            known.setdefault(path.rpartition(".")[0], position)
        labels = np.full(len(paths), UNLABELLED, dtype=np.int64)
        numbers = None if self.classes is None else {entry: label for label, entry in enumerate(self.classes)}
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            file_column, label_column = _columns(table, rows.fieldnames or [], (self.file_column, self.label_column))
            for row in rows:
                where = f"{table}, line {rows.line_num}"
                if row[file_column] not in known:
                    raise JobError(f"{where}: there is no image {row[file_column]!r}")
                labels[known[row[file_column]]] = _label(row[label_column], self.first_label, numbers, where)
        return labels


def _images_in(folder: Path) -> Iterator[str]:
    return (path for path in list_files(folder) if "." + path.rpartition(".")[2].lower() in EXTENSIONS)


def _labels_by_folder(paths: PackedStrings, classes: list[str] | None) -> NDArray[np.int64] | None:
    folders = {path.partition("/")[0] for path in paths if "/" in path}
    if not folders:
        return None
    names = classes if classes is not None else sorted(folders)
    unknown = sorted(folders - set(names))
    if unknown:
        raise JobError(f"folder {unknown[0]!r} is none of the `classes`, which are {', '.join(names[:20])}")
    number = {folder: label for label, folder in enumerate(names)}
    split_paths = (path.partition("/") for path in paths)
    labels = (number[first] if slash else UNLABELLED for first, slash, _ in split_paths)
    return np.fromiter(labels, dtype=np.int64, count=len(paths))


def _columns(table: Path, header: Sequence[str], wanted: tuple[str | None, str | None]) -> list[str]:
    header = list(header)
    found = [name or (header[index] if index < len(header) else "") for index, name in enumerate(wanted)]
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
        raise JobError(f"{where}: label {text!r} is not an integer; list the `classes` in their order") from error
    if label < 0:
        raise JobError(f"{where}: label {text} is below `first_label`, {first_label}")
    return label
