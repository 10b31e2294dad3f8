"""How does a data set of the Hugging Face `datasets` library become a transfer set? Rows of its Arrow table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import DataUnavailableError, JobError, MissingExtraError
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import IdSpec
from softlabels.transfer_set import Samples
from softlabels.transfer_sets.images import Decoder, picture_form
from softlabels.transfer_sets.parquet import label_array, numbers, picture_bytes, refuse_nulls
from softlabels.transfer_sets.sample_ids import examine_ids
from softlabels.transfer_sets.source_files import file_facts, rooted

_IDS_AT_ONCE = 1 << 14


class HuggingFaceRows:
    """Samples of a `datasets.Dataset`. Safe under threads; pickles as the data set does.

    Args:
        rows: the data set, pictures undecoded.
        columns: of the input, the label and the id; None for those that there are not.
        decoder: for pictures; None where the input is numbers.
        name: for people and manifests.
    Raises:
        BadIdsError: an id stands twice.
    """

    def __init__(
        self, rows: Any, columns: tuple[str, str | None, str | None], decoder: Decoder | None, name: str
    ) -> None:
        self._input, self._label, self._id = columns
        self._rows = rows.select_columns([name for name in columns if name is not None]).with_format("arrow")
        self._decoder, self._name = decoder, name
        self._spec = IdSpec(kind="int", dense_start=0) if self._id is None else self._examined(self._id)

    @property
    def name(self) -> str:
        """A short name for people and manifests."""
        return self._name

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at these positions, in this order; positions may repeat.

        Raises:
            UnreadableSampleError: a picture that cannot be decoded. ShapeMismatchError: inputs of several shapes.
        """
        found = self._rows[positions.tolist()]
        ids: IdArray = positions.astype(np.int64) if self._id is None else as_ids(found.column(self._id).to_pylist())
        labels = None if self._label is None else label_array(found.column(self._label), self._label)
        return Samples(ids=ids, inputs=self._inputs(found.column(self._input), ids), labels=labels)

    def id_spec(self) -> IdSpec:
        """How a store keeps the ids."""
        return self._spec

    def identity(self) -> Iterator[tuple[str, str]]:
        """The library's own fingerprint of the data set, then size and time of the Arrow files that it lies in."""
        yield "fingerprint of the data set", str(self._rows._fingerprint)
        for file in self._rows.cache_files:
            path = Path(file["filename"])
            yield path.name, file_facts(path)

    def _inputs(self, column: Any, ids: IdArray) -> NDArray[Any]:
        column = column.combine_chunks()
        refuse_nulls(column, self._input, ids)
        if self._decoder is None:
            return numbers(column, self._input)
        pairs = zip(column.to_pylist(), ids.tolist(), strict=True)
        return self._decoder.batch([(partial(picture_bytes, value), str(name)) for value, name in pairs])

    def _examined(self, column: str) -> IdSpec:
        ids = self._rows.select_columns([column])
        count = len(ids)
        blocks = (
            as_ids(ids[start : start + _IDS_AT_ONCE].column(column).to_pylist())
            for start in range(0, count, _IDS_AT_ONCE)
        )
        return examine_ids(blocks, count, self._name)


def huggingface(
    path: str,
    split: str | None = None,
    config: str | None = None,
    data_files: str | list[str] | None = None,
    input: str | None = None,
    label: str | None = None,
    id: str | None = None,
    revision: str | None = None,
    size: int | list[int] | None = None,
    resize: int | None = None,
    mode: str = "RGB",
    layout: str = "chw",
    threads: int | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> HuggingFaceRows:
    """Samples of a data set that the `datasets` library loads.

    Args:
        path: a folder that `save_to_disk` wrote, or what `load_dataset` takes: a folder, "parquet", "arrow", "csv", or
            the name of a data set; HF_DATASETS_OFFLINE=1 takes those from the cache alone.
        split: needed where the data set has several.
        config, data_files, revision: for `load_dataset`.
        input: its column; the first with pictures when left out.
        label: its column; "label" or "labels" when left out and there. Null is unlabelled; "none" leaves all so.
        id: the column with the samples' ids; row numbers when left out.
        size, resize, mode, layout, threads: of pictures, as `image_folder` takes them.
        name: of the transfer set; `path` and split when left out.
        base: the folder that relative paths start from.
    Raises:
        DataUnavailableError: it cannot be loaded. JobError: no such split or column, or a streamed data set.
        MissingExtraError: no datasets library.
    """
    rows = _loaded(path, split, config, data_files, revision, base)
    import datasets

    if isinstance(rows, dict):
        raise JobError(f"data set {path!r} has the splits {', '.join(rows)}: choose one by `split`")
    if not isinstance(rows, datasets.Dataset):
        raise JobError(
            f"data set {path!r} gives a {type(rows).__name__}, which has no rows by position: a sample of it has no id "
            "that lasts, and a job could not go on where it stopped; load it without streaming"
        )
    if len(rows) == 0:
        raise JobError(f"data set {path!r} is empty: there is nothing to compute targets for")
    chosen = _columns(rows.features, input, label, id, path, datasets.Image)
    decoder = None
    if isinstance(rows.features[chosen[0]], datasets.Image):
        rows = rows.cast_column(chosen[0], datasets.Image(decode=False))
        decoder = Decoder(picture_form(size, resize, mode, layout), threads)
    title = name or "-".join(filter(None, (Path(path).name, config, split)))
    return HuggingFaceRows(rows, chosen, decoder, title)


def _loaded(
    path: str,
    split: str | None,
    config: str | None,
    data_files: str | list[str] | None,
    revision: str | None,
    base: Path | None,
) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MissingExtraError(
            "this source needs the datasets library, which is not installed: `pip install softlabels[huggingface]`",
            extra="huggingface",
        ) from error
    folder = rooted(path, base)
    files = data_files
    if files is not None:
        files = [str(rooted(file, base)) for file in ([files] if isinstance(files, str) else files)]
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            kept = datasets.load_from_disk(str(folder))
            return kept[split] if split is not None and isinstance(kept, dict) else kept
        where = str(folder) if folder.is_dir() else path
        return datasets.load_dataset(where, config, data_files=files, split=split, revision=revision)
    except KeyError as error:
        raise JobError(f"data set {path!r} has no split {error}") from error
    except (OSError, ValueError, IndexError, DatasetsError) as error:
        raise DataUnavailableError(f"data set {path!r} cannot be loaded: {error}") from error


def _columns(
    features: Any, input: str | None, label: str | None, id: str | None, path: str, image: type
) -> tuple[str, str | None, str | None]:
    pictures = [column for column, feature in features.items() if isinstance(feature, image)]
    if input is None and not pictures:
        raise JobError(f"data set {path!r} has no column of pictures: name the `input` among {', '.join(features)}")
    if label is None:
        label = next((column for column in ("label", "labels") if column in features), None)
    chosen = (input or pictures[0], None if label == "none" else label, id)
    for column in chosen:
        if column is not None and column not in features:
            raise JobError(f"data set {path!r} has no column {column!r}: it has {', '.join(features)}")
    return chosen
