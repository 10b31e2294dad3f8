"""Data sets of the Hugging Face `datasets` library, read row by row from their Arrow tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import DataUnavailableError, JobError
from softlabels.extras import needs_extra
from softlabels.transfer_sets.arrow_rows import ArrowColumns, ArrowRows
from softlabels.transfer_sets.images import ImageDecoder, ImageSource
from softlabels.transfer_sets.sample_ids import IDS_PER_BLOCK
from softlabels.transfer_sets.source_files import file_state, resolve_path


class HuggingFaceRows(ArrowRows):
    """Samples of a `datasets.Dataset` with images not decoded. Safe under threads; pickles as the data set does.

    Raises:
        BadIdsError: an id occurs twice.
    """

    def __init__(self, rows: Any, columns: ArrowColumns, decoder: ImageDecoder | None, name: str) -> None:
        super().__init__(columns, decoder, name)
        self._data = rows.select_columns(columns.names()).with_format("arrow")
        self._examine()

    def __len__(self) -> int:
        return len(self._data)

    def identity(self) -> Iterator[tuple[str, str]]:
        """Yield the library's own fingerprint of the data set, then size and time of its Arrow files."""
        yield "fingerprint of the data set", str(self._data._fingerprint)
        for file in self._data.cache_files:
            path = Path(file["filename"])
            yield path.name, file_state(path)

    def _id_blocks(self) -> Iterator[Any]:
        ids = self._data.select_columns([self._columns.id])
        starts = range(0, len(self), IDS_PER_BLOCK)
        return (ids[start : start + IDS_PER_BLOCK].column(self._columns.id) for start in starts)

    def _rows(self, positions: NDArray[np.int64]) -> Any:
        return self._data[positions.tolist()]


class HuggingFaceSource(ImageSource, frozen=True, kw_only=True):
    """Samples of a data set that the `datasets` library loads.

    Attributes:
        path: a folder that `save_to_disk` wrote, or what `load_dataset` takes: a folder, "parquet", "arrow", "csv", or
            the name of a data set; with HF_DATASETS_OFFLINE=1 names are looked up in the cache alone.
        split: needed where the data set has several.
        config, data_files, revision: passed on to `load_dataset`.
        input: input column; the first with images when left out.
        label: label column; "label" or "labels" when left out and there. Null is unlabelled; "none" ignores labels.
        id: id column; row numbers when left out.
        name: by default `path`, `config` and `split`.
    """

    path: str
    split: str | None = None
    config: str | None = None
    data_files: str | list[str] | None = None
    input: str | None = None
    label: str | None = None
    id: str | None = None
    revision: str | None = None

    def load(self, base: Path | None) -> HuggingFaceRows:
        """Return the rows of the data set."""
        rows = self._load_dataset(base)
        import datasets

        if isinstance(rows, dict):
            raise JobError(f"data set {self.path!r} has the splits {', '.join(rows)}: choose one by `split`")
        if not isinstance(rows, datasets.Dataset):
            raise JobError(
                f"data set {self.path!r} gives a {type(rows).__name__}, which has no rows by position: its samples "
                "have no stable ids, and a job could not resume; load it without streaming"
            )
        if len(rows) == 0:
            raise JobError(f"data set {self.path!r} is empty: there is nothing to compute targets for")
        columns = self._columns(rows.features, datasets.Image)
        image_column, decoder = columns.inputs[0], None
        if isinstance(rows.features[image_column], datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
            decoder = self.decoder()
        name = self.name or "-".join(filter(None, (Path(self.path).name, self.config, self.split)))
        return HuggingFaceRows(rows, columns, decoder, name)

    def _load_dataset(self, base: Path | None) -> Any:
        with needs_extra("huggingface", "reading a Hugging Face data set"):
            import datasets
            from datasets.exceptions import DatasetsError
        folder = resolve_path(self.path, base)
        files = self.data_files
        if files is not None:
            files = [str(resolve_path(file, base)) for file in ([files] if isinstance(files, str) else files)]
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                saved = datasets.load_from_disk(str(folder))
                return saved[self.split] if self.split is not None and isinstance(saved, dict) else saved
            where = str(folder) if folder.is_dir() else self.path
            return datasets.load_dataset(where, self.config, data_files=files, split=self.split, revision=self.revision)
        except KeyError as error:
            raise JobError(f"data set {self.path!r} has no split {error}") from error
        except (OSError, ValueError, IndexError, DatasetsError) as error:
            raise DataUnavailableError(f"data set {self.path!r} cannot be loaded: {error}") from error

    def _columns(self, features: Any, image: type) -> ArrowColumns:
        images = [column for column, feature in features.items() if isinstance(feature, image)]
        if self.input is None and not images:
            raise JobError(
                f"data set {self.path!r} has no column of images: name the `input` among {', '.join(features)}"
            )
        label = self.label
        if label is None:
            label = next((column for column in ("label", "labels") if column in features), None)
        columns = ArrowColumns(inputs=(self.input or images[0],), label=None if label == "none" else label, id=self.id)
        columns.check(list(features), f"data set {self.path!r}")
        return columns
