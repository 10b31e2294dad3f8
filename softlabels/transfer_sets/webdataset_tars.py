"""Where do the samples of webdataset tars lie? An index of their headers, made once."""

from __future__ import annotations

import io
import json
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.manifest import IdSpec
from softlabels.transfer_set import UNLABELLED, Samples
from softlabels.transfer_sets.images import EXTENSIONS, Decoder, picture_form
from softlabels.transfer_sets.sample_ids import PackedNames
from softlabels.transfer_sets.source_files import file_identities, matching

ABSENT = -1
"""Where the label of a sample lies that has none."""

_BLOCK_BYTES = 512
"""What headers and contents of a tar are multiples of (POSIX.1-1988, ustar)."""


class TarIndex:
    """Where each sample's input and label lie in the tars: five numbers and a key a sample.

    Args:
        paths: of the tars, in order.
        inputs: what the input's member may be called after the key; the first that a tar has, where several do.
        label: what the label's member is called; None where labels are not wanted.
    Raises:
        JobError: a tar that is compressed or damaged, or a sample without an input.
    """

    def __init__(self, paths: Sequence[Path], inputs: Sequence[str], label: str | None) -> None:
        self.paths = tuple(paths)
        self._columns = {name: array("q") for name in ("shard", "input", "input_size", "label", "label_size")}
        self.as_npy = array("b")
        self.keys = [PackedNames(self._index(shard, path, inputs, label)) for shard, path in enumerate(self.paths)]
        found = {name: np.array(column, dtype=np.int64) for name, column in self._columns.items()}
        self.shard, self.input_at, self.input_size = found["shard"], found["input"], found["input_size"]
        self.label_at, self.label_size = found["label"], found["label_size"]
        self._columns.clear()

    def _index(self, shard: int, path: Path, inputs: Sequence[str], label: str | None) -> Iterator[str]:
        """The keys of a tar's samples; a sample is members with one key that follow each other."""
        key, parts = None, dict[str, tuple[int, int]]()
        for member_key, extension, offset, size in _members(path):
            if member_key != key and key is not None:
                yield self._add(shard, path, key, parts, inputs, label)
            if member_key != key:
                key, parts = member_key, {}
            parts[extension] = (offset, size)
        if key is not None:
            yield self._add(shard, path, key, parts, inputs, label)

    def _add(
        self,
        shard: int,
        path: Path,
        key: str,
        parts: dict[str, tuple[int, int]],
        inputs: Sequence[str],
        label: str | None,
    ) -> str:
        chosen = next((extension for extension in inputs if extension in parts), None)
        if chosen is None:
            raise JobError(
                f"sample {key!r} of {path} has no input: its members are {', '.join(sorted(parts))}, and an input is "
                f"one of {', '.join(inputs)}; name it by `input`"
            )
        at, size = parts[chosen]
        label_at, label_size = parts.get(label or "", (ABSENT, 0))
        for name, value in zip(self._columns, (shard, at, size, label_at, label_size), strict=True):
            self._columns[name].append(value)
        self.as_npy.append(chosen.endswith("npy"))
        return key


def _members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Key, extension, offset and size of each file in a tar, by its headers alone."""
    end = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else every header of a large tar is kept
                folder, slash, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not member.isreg() or not stem or not dot:
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"it ends within {member.name!r}")
                yield folder + slash + stem, extension.lower(), member.offset_data, member.size
            _refuse_other_end(path, tar.offset)
    except tarfile.TarError as error:
        raise JobError(
            f"{path} cannot be read as an uncompressed tar ({error}): samples of it are read in any order, so unpack a "
            "compressed one first, and fetch a damaged one again"
        ) from error


def _refuse_other_end(path: Path, offset: int) -> None:
    """Let a tar pass whose headers end with zeros and nothing behind them.

    The standard library takes a header that is damaged or cut for the end: samples behind it would be lost silently.
    """
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
            raise tarfile.ReadError(f"there is neither a header nor the end at byte {offset}")
        while more := file.read(1 << 16):
            if any(more):
                raise tarfile.ReadError("something follows its end: tars that were joined must stay files of their own")


# MERGED from softlabels.transfer_sets.webdataset_tars: How do webdataset tars become a transfer set? Members are read at their places and decoded, in any order.


_PICTURES = tuple(sorted(extension[1:] for extension in EXTENSIONS))


class WebDataset:
    """Samples in webdataset tars, by position. Safe under threads; pickles with its index.

    Args:
        index: where they lie.
        ids: of the samples, in the index's order.
        label: reads a label of a member's contents; None where no sample has one.
        decoder: brings pictures to one shape.
        name: for people and manifests.
    """

    def __init__(
        self,
        index: TarIndex,
        ids: PackedNames,
        label: Callable[[bytes], int] | None,
        decoder: Decoder | None,
        name: str,
    ) -> None:
        self._index, self._ids, self._label, self._decoder, self._name = index, ids, label, decoder, name

    @property
    def name(self) -> str:
        """A short name for people and manifests."""
        return self._name

    def __len__(self) -> int:
        return len(self._ids)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at these positions, decoded, in this order; positions may repeat.

        Raises:
            UnreadableSampleError: a member that is cut or cannot be decoded. ShapeMismatchError: of several shapes.
        """
        ids, index = self._ids.take(positions), self._index
        contents: list[bytes] = [b""] * len(positions)
        labels = np.full(len(positions), UNLABELLED, dtype=np.int64)
        for shard in np.unique(index.shard[positions]).tolist():
            with index.paths[shard].open("rb") as file:
                for place in np.flatnonzero(index.shard[positions] == shard).tolist():
                    sample = int(positions[place])
                    what = f"{ids[place]} of {index.paths[shard]}"
                    contents[place] = _read(file, index.input_at[sample], index.input_size[sample], what)
                    if self._label is not None and index.label_at[sample] != ABSENT:
                        text = _read(file, index.label_at[sample], index.label_size[sample], what)
                        labels[place] = _labelled(self._label, text, what)
        inputs = self._decoded(contents, ids.tolist(), positions)
        return Samples(ids=ids, inputs=inputs, labels=None if self._label is None else labels)

    def id_spec(self) -> IdSpec:
        """How a store keeps the keys."""
        return self._ids.id_spec()

    def identity(self) -> Iterator[tuple[str, str]]:
        """Size and time of modification of each tar."""
        return file_identities(self._index.paths)

    def _decoded(self, contents: list[bytes], ids: list[str], positions: NDArray[np.int64]) -> NDArray[Any]:
        if self._decoder is not None and not any(self._index.as_npy[position] for position in positions.tolist()):
            return self._decoder.batch([(partial(bytes, body), name) for body, name in zip(contents, ids, strict=True)])
        arrays = [_array(body, name) for body, name in zip(contents, ids, strict=True)]
        for found, name in zip(arrays, ids, strict=True):
            if (found.shape, found.dtype) != (arrays[0].shape, arrays[0].dtype):
                raise ShapeMismatchError(
                    f"sample {ids[0]!r} is {arrays[0].dtype}{list(arrays[0].shape)}, sample {name!r} is "
                    f"{found.dtype}{list(found.shape)}: a transfer set has samples of one shape"
                )
        return np.stack(arrays)


def webdataset(
    shards: str | list[str],
    input: str | None = None,
    label: str | None = None,
    ids: str | None = None,
    size: int | list[int] | None = None,
    resize: int | None = None,
    mode: str = "RGB",
    layout: str = "chw",
    threads: int | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> WebDataset:
    """Samples in tars as the webdataset library writes them: members whose names begin alike belong together.

    Args:
        shards: paths of uncompressed tars: a list, or with `*` and `{000..146}`.
        input: what an input's member is called after the key, such as "jpg;png" or "npy"; any picture, or npy, when
            left out.
        label: "cls" for a text with a number, "json:KEY" for a number in a JSON object, "none"; when left out, cls
            where there is any. A sample without that member is unlabelled.
        ids: "key", or "shard/key" for the tar's name before it; when left out, the latter where a key stands in
            several tars.
        size, resize, mode, layout, threads: of pictures, as `image_folder` takes them.
        name: of the transfer set; the first tar's folder when left out.
        base: the folder that relative paths start from.
    Raises:
        JobError, DataUnavailableError: no such tar, one that is compressed or damaged, a key that stands twice in it.
    """
    paths = matching(shards, base, what="webdataset shards")
    wanted = tuple(input.lower().lstrip(".").split(";")) if input else (*_PICTURES, "npy")
    refused = sorted({"pth", "pt", "pyd", "pkl", "pickle"} & set(wanted))
    if refused:
        raise JobError(f"members called .{refused[0]} hold pickles, which run code when they are read: use npy")
    if ids not in (None, "key", "shard/key"):
        raise JobError(f"ids is {ids!r}: choose 'key' or 'shard/key'")
    kind, _, entry = (label or "cls").partition(":")
    if kind not in ("cls", "json", "none") or (kind == "json") != bool(entry):
        raise JobError(f"label is {label!r}: choose 'cls', 'json:KEY' or 'none'")
    index = TarIndex(paths, wanted, None if kind == "none" else kind)
    if len(index.shard) == 0:
        raise JobError(f"the tars hold no sample: {paths[0]} is the first of {len(paths)}")
    is_labelled = bool((index.label_at != ABSENT).any())
    if label not in (None, "none") and not is_labelled:
        raise JobError(f"no sample has a member .{kind} for its label; write label = 'none' if that is meant")
    decoder = None if all(index.as_npy) else Decoder(picture_form(size, resize, mode, layout), threads)
    read_label: Callable[[bytes], int] | None = partial(_json_label, entry) if kind == "json" else int
    title = name or paths[0].resolve().parent.name
    read_label = read_label if is_labelled else None
    names = _ids(index, ids, title)
    index.keys.clear()  # from here on they are the ids
    return WebDataset(index, names, label=read_label, decoder=decoder, name=title)


def _ids(index: TarIndex, style: str | None, name: str) -> PackedNames:
    if style != "shard/key":
        names = PackedNames(key for keys in index.keys for key in keys)
        twice = names.repeated()
        if twice is None:
            return names
        if style == "key":
            raise JobError(f"key {twice!r} of {name!r} stands twice: let ids be 'shard/key'", id=twice)
    stems = [path.stem for path in index.paths]
    if len(set(stems)) < len(stems):
        stems = [f"{path.parent.name}/{path.stem}" for path in index.paths]
    names = PackedNames(f"{stem}/{key}" for stem, keys in zip(stems, index.keys, strict=True) for key in keys)
    twice = names.repeated()
    if twice is not None:
        raise JobError(f"sample {twice!r} stands twice in {name!r}: each needs a key of its own in its tar", id=twice)
    return names


def _read(file: Any, offset: Any, size: Any, what: str) -> bytes:
    file.seek(int(offset))
    found: bytes = file.read(int(size))
    if len(found) != size:
        raise UnreadableSampleError(f"sample {what} is cut: {len(found)} of {size} bytes; fetch the tar again")
    return found


def _array(body: bytes, name: str) -> NDArray[Any]:
    try:
        return np.asarray(np.load(io.BytesIO(body), allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise UnreadableSampleError(f"sample {name!r} is no array in npy form: {error}", sample=name) from error


def _labelled(read: Callable[[bytes], int], text: bytes, what: str) -> int:
    try:
        return read(text)
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableSampleError(f"the label of sample {what} is {text[:80]!r}, no whole number") from error


def _json_label(key: str, text: bytes) -> int:
    found = json.loads(text).get(key)
    if found is None:
        return UNLABELLED
    if type(found) is not int:
        raise ValueError(key)
    return found
