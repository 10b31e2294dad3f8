"""Where do the samples of webdataset tars lie? An index of their headers, made once."""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from softlabels.errors import JobError
from softlabels.transfer_sets.names import PackedNames

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
