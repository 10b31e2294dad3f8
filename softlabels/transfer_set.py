"""Transfer sets: the samples that targets are computed for, and fingerprints that tell one data set from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError, ShapeMismatchError
from softlabels.ids import IdArray, as_ids
from softlabels.softmath import UNLABELLED as UNLABELLED
from softlabels.splitmix64 import splitmix64

FINGERPRINT_BYTES = 16
"""128 bits: among 10^12 samples the chance of one accidental collision is about 10^-15."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Some samples of a transfer set.

    Attributes:
        ids: [B] sample ids.
        inputs: [B, ...], as the data set holds them: fingerprints are taken of these bytes.
        labels: [B] int64, `UNLABELLED` where absent; None when no sample of the set has one.
    """

    ids: IdArray
    inputs: NDArray[Any]
    labels: NDArray[np.int64] | None

    def __post_init__(self) -> None:
        counts = {len(self.ids), len(self.inputs)} | (set() if self.labels is None else {len(self.labels)})
        if len(counts) != 1:
            labels = "no" if self.labels is None else len(self.labels)
            raise ShapeMismatchError(
                f"{len(self.ids)} ids, {len(self.inputs)} inputs and {labels} labels do not describe the same samples"
            )


class TransferSet(Protocol):
    """Samples by position, each with a stable id; two passes give the same samples in the same order."""

    @property
    def name(self) -> str:
        """Short name, for messages and manifests."""
        ...

    def __len__(self) -> int: ...

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at these positions, in this order; positions may repeat."""
        ...


class ArrayTransferSet:
    """Transfer set over arrays in memory or memory-mapped files.

    Args:
        name: short name, for messages and manifests.
        inputs: [N, ...].
        labels: [N] integers, `UNLABELLED` where absent; None when no sample has one.
        ids: [N] unique integers or strings; None for 0 … N−1.
    Raises:
        BadIdsError: ids repeat.
        ShapeMismatchError: the arrays differ in length.
    """

    def __init__(
        self, name: str, inputs: NDArray[Any], *, labels: NDArray[Any] | None = None, ids: IdArray | None = None
    ) -> None:
        self.name = name
        self.inputs = inputs
        self.labels = None if labels is None else np.asarray(labels).astype(np.int64)
        self.ids: IdArray = np.arange(len(inputs), dtype=np.int64) if ids is None else as_ids(ids)
        Samples(ids=self.ids, inputs=self.inputs, labels=self.labels)  # checks that the lengths agree
        if ids is not None and len(np.unique(self.ids)) != len(self.ids):
            raise BadIdsError(f"sample ids of {name!r} repeat: each sample needs another id")

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at these positions, in this order; positions may repeat."""
        labels = None if self.labels is None else self.labels[positions]
        return Samples(ids=self.ids[positions], inputs=np.asarray(self.inputs[positions]), labels=labels)


class MapStyleDataset(Protocol):
    """Anything with a length and items by position: a list, an array, a map-style torch data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: Any, /) -> Any: ...


class SequenceTransferSet:
    """Transfer set over a sequence or a map-style torch data set.

    Args:
        items: inputs (arrays, tensors, images), or tuples (input, label).
        ids: [N] unique ids that the targets were computed under; None for the positions.
        name: short name, for messages.
    Raises:
        BadIdsError: ids repeat. ShapeMismatchError: there are not as many ids as items.
    """

    def __init__(
        self, items: MapStyleDataset, *, ids: Iterable[Any] | NDArray[Any] | None, name: str = "inputs"
    ) -> None:
        self._items = items
        self.ids: IdArray | None = None if ids is None else as_ids(ids)
        self.name = name
        if self.ids is not None and len(self.ids) != len(items):
            raise ShapeMismatchError(f"{len(self.ids)} ids do not name {len(items)} inputs: give one id an input")
        if self.ids is not None and len(np.unique(self.ids)) != len(self.ids):
            raise BadIdsError("sample ids of the inputs repeat: each sample needs another id")

    def __len__(self) -> int:
        return len(self._items)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at these positions, in this order; positions may repeat.

        Raises:
            ShapeMismatchError: inputs of different shapes.
        """
        items = [self._items[position] for position in positions.tolist()]
        with_labels = all(isinstance(item, tuple) and len(item) >= 2 for item in items)
        inputs = [np.asarray(item[0] if with_labels else item) for item in items]
        shapes = sorted({array.shape for array in inputs})
        if len(shapes) > 1:
            raise ShapeMismatchError(
                f"inputs of shapes {shapes[:4]} cannot share a batch: bring them to one shape first"
            )
        labels = None
        if with_labels:
            labels = np.array([UNLABELLED if item[1] is None else int(item[1]) for item in items], dtype=np.int64)
        ids = positions.astype(np.int64) if self.ids is None else self.ids[positions]
        return Samples(ids=ids, inputs=np.stack(inputs), labels=labels)


def sample_fingerprints(inputs: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a content fingerprint of each sample in `inputs` [B, ...].

    Returns:
        uint8, shape [B, 16]: BLAKE2b of dtype, shape and bytes, so that the same pixels as floats or transposed differ.
    """
    rows = np.ascontiguousarray(inputs)
    preamble = f"{rows.dtype.str}{rows.shape[1:]}".encode()
    seeded = hashlib.blake2b(preamble, digest_size=FINGERPRINT_BYTES)
    out = np.empty((len(rows), FINGERPRINT_BYTES), dtype=np.uint8)
    # Without any rows, NumPy cannot infer the -1.
    flat = rows.reshape(len(rows), -1).view(np.uint8) if rows.size else np.empty((len(rows), 0), np.uint8)
    for position, row in enumerate(flat):
        digest = seeded.copy()
        digest.update(row.data)
        out[position] = np.frombuffer(digest.digest(), dtype=np.uint8)
    return out


def sequence_fingerprints(inputs: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return a content fingerprint of each sequence without its padding, as stores of sequences hold them.

    Args:
        inputs: [B, L, ...].
        lengths: [B] length of each sequence.
    Returns:
        uint8, shape [B, 16].
    """
    pieces = [sample_fingerprints(row[None, :length]) for row, length in zip(inputs, lengths.tolist(), strict=True)]
    return np.concatenate(pieces) if pieces else np.empty((0, FINGERPRINT_BYTES), dtype=np.uint8)


class FingerprintSum:
    """Fingerprint of a set of samples: independent of order, and mergeable over shards.

    Each (id, sample fingerprint) is mixed to 128 bits and the results are added modulo 2^64 in two lanes: an additive
    set hash, proof against accident (its purpose), not against an adversary who may choose the samples. With s =
    `splitmix64`, f and g the fingerprint's halves as little-endian uint64, and k = s(id) of an integer id or the first
    8 bytes of BLAKE2b of a string one: h = s(f + s(g ^ s(k))), and the lanes are h and s(g + s(h ^ k)).
    """

    def __init__(self, lanes: NDArray[np.uint64] | None = None, count: int = 0) -> None:
        # A copy, since `add` and `merge` add in place.
        self._lanes = np.zeros(2, dtype=np.uint64) if lanes is None else lanes.copy()
        self.count = count

    def add(self, ids: IdArray, fingerprints: NDArray[np.uint8]) -> None:
        """Add samples: ids [B] and their content fingerprints [B, 16]."""
        if len(ids) != len(fingerprints):
            raise ShapeMismatchError(f"{len(ids)} ids and {len(fingerprints)} fingerprints are not of the same samples")
        halves = np.ascontiguousarray(fingerprints).view("<u8").astype(np.uint64)
        first, second, key = halves[:, 0], halves[:, 1], _id_keys(ids)
        with np.errstate(over="ignore"):
            high = splitmix64(first + splitmix64(second ^ splitmix64(key)))
            low = splitmix64(second + splitmix64(high ^ key))
            self._lanes += np.array([high.sum(dtype=np.uint64), low.sum(dtype=np.uint64)])
        self.count += len(ids)

    def merge(self, other: FingerprintSum) -> None:
        """Add the samples of `other`."""
        self._lanes += other._lanes
        self.count += other.count

    def hexdigest(self) -> str:
        """Return the fingerprint: 32 hex digits and the sample count."""
        return f"{self._lanes.astype('<u8').tobytes().hex()}-{self.count}"

    @classmethod
    def from_hexdigest(cls, text: str) -> FingerprintSum:
        """Return the sum that `hexdigest` described.

        Raises:
            ValueError: the text is not such a digest.
        """
        lanes, _, count = text.partition("-")
        raw = bytes.fromhex(lanes)
        if len(raw) != 16 or not count.isdigit():
            raise ValueError(f"not a transfer set fingerprint: {text!r}")
        return cls(np.frombuffer(raw, dtype="<u8").astype(np.uint64), int(count))


def _id_keys(ids: IdArray) -> NDArray[np.uint64]:
    if ids.dtype.kind != "U":
        return splitmix64(ids.astype(np.int64).view(np.uint64))
    digests = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def transfer_set_fingerprint(transfer_set: TransferSet, *, batch_size: int = 4096) -> str:
    """Return the fingerprint of a transfer set's ids and contents, in any order and whatever its labels.

    Labels are left out because a relabelled set is still the set that the teachers saw.
    """
    total = FingerprintSum()
    for start in range(0, len(transfer_set), batch_size):
        positions = np.arange(start, min(start + batch_size, len(transfer_set)), dtype=np.int64)
        samples = transfer_set.take(positions)
        total.add(samples.ids, sample_fingerprints(samples.inputs))
    return total.hexdigest()
