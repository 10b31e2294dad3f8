"""How do webdataset tars become a transfer set? Members are read at their places and decoded, in any order."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.manifest import IdSpec
from softlabels.transfer import UNLABELLED, Samples
from softlabels.transfer_sets.files import identity_of, matching
from softlabels.transfer_sets.names import PackedNames
from softlabels.transfer_sets.pictures import EXTENSIONS, Decoder, picture_form
from softlabels.transfer_sets.tar_index import ABSENT, TarIndex

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
        return identity_of(self._index.paths)

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
