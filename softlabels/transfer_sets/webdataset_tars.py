"""WebDataset tars: an index of member offsets, made once from the headers, then random access to inputs and labels."""

from __future__ import annotations

import io
import json
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.ids import IdArray
from softlabels.transfer_set import UNLABELLED, Samples
from softlabels.transfer_sets.images import EXTENSIONS, ImageDecoder, ImageSource
from softlabels.transfer_sets.sample_ids import PackedStrings
from softlabels.transfer_sets.source_files import NPY_ERRORS, FileTransferSet, match_files

ABSENT = -1
"""Offset of the label of a sample that has none."""

_BLOCK_BYTES = 512
"""Headers and contents of a tar are multiples of it (POSIX.1-1988, ustar)."""

_IMAGES = tuple(sorted(extension[1:] for extension in EXTENSIONS))
_PICKLES = frozenset({"pth", "pt", "pyd", "pkl", "pickle"})


class TarIndex:
    """Offsets and sizes of each sample's input and label in the tars: six integers and a key per sample.

    Args:
        paths: the tars, in order.
        inputs: extensions that an input may have; the first that a sample has is taken.
        label: extension of the label; None where labels are not wanted.
    Raises:
        JobError: a tar is compressed or damaged, or a sample has no input.
    """

    def __init__(self, paths: Sequence[Path], inputs: Sequence[str], label: str | None) -> None:
        self.paths, self._inputs, self._label = tuple(paths), inputs, label
        numbers = array("q")  # of all samples, one after another: lists of tuples would take ten times the memory
        self.keys = [PackedStrings(self._index(shard, path, numbers)) for shard, path in enumerate(self.paths)]
        table = np.array(numbers, dtype=np.int64).reshape(-1, 6).T
        self.shard, self.input_at, self.input_size, self.label_at, self.label_size, self.is_npy = table

    def _index(self, shard: int, path: Path, numbers: array[int]) -> Iterator[str]:
        """Yield the keys of a tar's samples, and add to `numbers`; consecutive members with one key are one sample."""
        for key, members in groupby(_members(path), key=itemgetter(0)):
            parts = {extension: (offset, size) for _, extension, offset, size in members}
            numbers.extend([shard, *self._sample(path, key, parts)])
            yield key

    def _sample(self, path: Path, key: str, parts: dict[str, tuple[int, int]]) -> tuple[int, ...]:
        chosen = next((extension for extension in self._inputs if extension in parts), None)
        if chosen is None:
            raise JobError(
                f"sample {key!r} of {path} has no input: its members are {', '.join(sorted(parts))}, an input is one "
                f"of {', '.join(self._inputs)}; choose by `input`"
            )
        return (*parts[chosen], *parts.get(self._label or "", (ABSENT, 0)), chosen.endswith("npy"))


class WebDataset(FileTransferSet):
    """Samples in WebDataset tars by position. Safe for use from several threads; pickles with its index.

    Args:
        index: offsets of the samples.
        ids: ids in the order of the index.
        label_key: key of the label in the JSON object of its member; "" for members with the integer alone; None
            where no sample has a label.
        decoder: brings images to one shape; None where all inputs are npy.
        name: name for messages and manifests.
    """

    def __init__(
        self, index: TarIndex, ids: PackedStrings, label_key: str | None, decoder: ImageDecoder | None, name: str
    ) -> None:
        super().__init__(name, index.paths, ids.id_spec())
        self._index, self._ids, self._label_key, self._decoder = index, ids, label_key, decoder

    def __len__(self) -> int:
        return len(self._ids)

    def all_ids(self) -> Iterator[IdArray]:
        """Yield the ids of all samples."""
        return self._ids.blocks()

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at these positions."""
        ids, index = self._ids.take(positions), self._index
        contents: list[bytes] = [b""] * len(positions)
        labels = np.full(len(positions), UNLABELLED, dtype=np.int64)
        for shard in np.unique(index.shard[positions]).tolist():
            with index.paths[shard].open("rb") as file:
                for row in np.flatnonzero(index.shard[positions] == shard).tolist():
                    sample = int(positions[row])
                    what = f"{ids[row]} of {index.paths[shard]}"
                    contents[row] = _read(file, index.input_at[sample], index.input_size[sample], what)
                    if self._label_key is not None and index.label_at[sample] != ABSENT:
                        text = _read(file, index.label_at[sample], index.label_size[sample], what)
                        labels[row] = _parse_label(text, self._label_key, what)
        inputs = self._decoded(contents, ids.tolist(), positions)
        return Samples(ids=ids, inputs=inputs, labels=None if self._label_key is None else labels)

    def _decoded(self, contents: list[bytes], ids: list[str], positions: NDArray[np.int64]) -> NDArray[Any]:
        if self._decoder is not None and not self._index.is_npy[positions].any():
            return self._decoder.decode_batch(contents, ids)
        arrays = [_array(body, name) for body, name in zip(contents, ids, strict=True)]
        for found, name in zip(arrays, ids, strict=True):
            if (found.shape, found.dtype) != (arrays[0].shape, arrays[0].dtype):
                raise ShapeMismatchError(
                    f"sample {ids[0]!r} is {arrays[0].dtype}{list(arrays[0].shape)}, sample {name!r} is "
                    f"{found.dtype}{list(found.shape)}: a transfer set has samples of one shape"
                )
        return np.stack(arrays)


class WebDatasetSource(ImageSource, frozen=True, kw_only=True):
    """Samples in tars as the webdataset library writes them: members whose names share a stem are one sample.

    Attributes:
        shards: uncompressed tars: a path, a list of paths, or with `*` and `{000..146}`.
        input: extensions of the input, such as "jpg;png" or "npy"; by default any image, or npy.
        label: "cls" for a member with an integer, "json:KEY" for an integer in a JSON object, "none"; by default cls
            where there is any. A sample without that member is unlabelled.
        ids: "key", or "shard/key" to put the tar's name first; by default the latter if a key occurs in several tars.
        name: by default the name of the first tar's folder.
    """

    shards: str | list[str]
    input: str | None = None
    label: str | None = None
    ids: Literal["key", "shard/key"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        pickled = sorted(_PICKLES & set(self._extensions()))
        if pickled:
            raise ValueError(f"members called .{pickled[0]} hold pickles, which run code when they are read: use npy")
        kind, _, key = self._label_kind()
        if kind not in ("cls", "json", "none") or (kind == "json") != bool(key):
            raise ValueError(f"`label` is {self.label!r}: choose 'cls', 'json:KEY' or 'none'")

    def load(self, base: Path | None) -> WebDataset:
        """Return the samples of the tars."""
        paths = match_files(self.shards, base, what="webdataset shards")
        kind, _, key = self._label_kind()
        index = TarIndex(paths, self._extensions(), None if kind == "none" else kind)
        if len(index.shard) == 0:
            raise JobError(f"the tars hold no sample: {paths[0]} is the first of {len(paths)}")
        is_labelled = bool((index.label_at != ABSENT).any())
        if self.label not in (None, "none") and not is_labelled:
            raise JobError(f"no sample has a member .{kind} for its label; write label = 'none' if this is intended")
        name = self.name or paths[0].resolve().parent.name
        ids = _ids(index, self.ids, name)
        index.keys.clear()  # `ids` holds the same strings
        decoder = None if all(index.is_npy) else self.decoder()
        return WebDataset(index, ids, key if is_labelled else None, decoder, name)

    def _extensions(self) -> tuple[str, ...]:
        return tuple(self.input.lower().lstrip(".").split(";")) if self.input else (*_IMAGES, "npy")

    def _label_kind(self) -> tuple[str, str, str]:
        return (self.label or "cls").partition(":")


def _members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yield key, extension, offset and size of each file in a tar; only headers are read."""
    end = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                folder, slash, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not member.isreg() or not stem or not dot:
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"it ends within {member.name!r}")
                yield folder + slash + stem, extension.lower(), member.offset_data, member.size
            _check_end(path, tar.offset)
    except tarfile.TarError as error:
        raise JobError(
            f"{path} cannot be read as an uncompressed tar ({error}): decompress it, as samples are read in any order, "
            "or fetch a damaged one again"
        ) from error


def _check_end(path: Path, offset: int) -> None:
    # tarfile takes a damaged or truncated header for the end of the archive: samples after it would be lost silently.
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
            raise tarfile.ReadError(f"there is neither a header nor the end at byte {offset}")
        while more := file.read(1 << 16):
            if any(more):
                raise tarfile.ReadError("something follows its end: concatenated tars must be split into files again")


def _ids(index: TarIndex, style: str | None, name: str) -> PackedStrings:
    if style != "shard/key":
        ids = PackedStrings(key for keys in index.keys for key in keys)
        duplicate = ids.find_duplicate()
        if duplicate is None:
            return ids
        if style == "key":
            raise JobError(f"key {duplicate!r} of {name!r} occurs twice: set ids = 'shard/key'", id=duplicate)
    stems = [path.stem for path in index.paths]
    if len(set(stems)) < len(stems):
        stems = [f"{path.parent.name}/{path.stem}" for path in index.paths]
    ids = PackedStrings(f"{stem}/{key}" for stem, keys in zip(stems, index.keys, strict=True) for key in keys)
    duplicate = ids.find_duplicate()
    if duplicate is not None:
        raise JobError(f"sample {duplicate!r} occurs twice in {name!r}: keys must be unique within a tar", id=duplicate)
    return ids


def _read(file: Any, offset: Any, size: Any, what: str) -> bytes:
    file.seek(int(offset))
    found: bytes = file.read(int(size))
    if len(found) != size:
        raise UnreadableSampleError(f"sample {what} is truncated: {len(found)} of {size} bytes; fetch the tar again")
    return found


def _array(body: bytes, name: str) -> NDArray[Any]:
    try:
        return np.asarray(np.load(io.BytesIO(body), allow_pickle=False))
    except (*NPY_ERRORS, OSError) as error:
        raise UnreadableSampleError(f"sample {name!r} is not an array in npy format: {error}", sample=name) from error


def _parse_label(text: bytes, key: str, what: str) -> int:
    try:
        found = json.loads(text).get(key) if key else int(text)
        if found is not None and type(found) is not int:  # `true` counts as an integer in Python
            raise TypeError(found)
    except (ValueError, TypeError, AttributeError) as error:
        raise UnreadableSampleError(f"the label of sample {what} is {text[:80]!r}, not an integer") from error
    return UNLABELLED if found is None else int(found)
