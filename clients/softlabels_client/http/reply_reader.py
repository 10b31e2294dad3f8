"""Is a reply what was asked for? Its version, its arrays, their shapes, and whose rows they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels import wire
from softlabels.errors import StoreChangedError, UnknownFieldError, WireError
from softlabels.ids import IdArray, from_fixed_bytes
from softlabels.manifest import FINGERPRINTS, IDS, ROW_OFFSETS, ArraySpec, Manifest
from softlabels.transfer_set import FINGERPRINT_BYTES

_MOST_HEADERS = 64
"""Headers kept: the replies to batches of one size have all the same."""


class ReplyReader:
    """Takes the replies of one version of a store apart, and refuses what is not what it should be.

    Args:
        manifest: what the store said of itself.
        digest: the version that was opened.
        where: the store's URL, for messages.
    """

    def __init__(self, manifest: Manifest, digest: str, where: str) -> None:
        self._manifest, self._digest, self._where = manifest, digest, where
        self._specs = _specs(manifest)
        # The header says where the arrays lie and is checked once; the same bytes mean the same the next time.
        self._known: dict[tuple[bytes, tuple[str, ...], int], wire.TensorLayout] = {}

    def row_bytes(self, names: tuple[str, ...]) -> int:
        """Bytes that a row takes in these arrays. Raises UnknownFieldError: the store keeps no such array."""
        return sum(self._spec(name).row_bytes for name in names)

    def read(
        self, blob: memoryview, names: tuple[str, ...], *, samples: int
    ) -> tuple[dict[str, NDArray[Any]], Mapping[str, str]]:
        """The arrays of a reply, views of it, and its metadata.

        Args:
            blob: the reply.
            names: the arrays that were asked for.
            samples: how many samples were.
        Raises:
            WireError: cut, contradictory, or not the arrays asked for. StoreChangedError: rows of another version.
        """
        header = wire.raw_header(blob)
        layout = self._known.get((header, names, samples))
        if layout is None:
            layout = wire.parse_header(blob)
            arrays = self.check(layout, blob, names, samples=samples)
            if len(self._known) >= _MOST_HEADERS:
                self._known.clear()
            # What a header does not settle, the row counts of sequences, is looked at each time.
            if ROW_OFFSETS not in arrays:
                self._known[header, names, samples] = layout
            return arrays, layout.metadata
        return self.unspoilt(layout.arrays(blob)), layout.metadata

    def unspoilt(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The arrays but for their checksum, if it is theirs. Raises WireError: bytes changed on the way."""
        checksum = arrays.pop(wire.CHECKSUM, None)
        if checksum is None or checksum.dtype != np.dtype("<u8") or checksum.shape != (1,):
            raise WireError(f"{self._where} sent rows without their checksum: whether they are whole cannot be told")
        if checksum[0] != wire.checksum_of(arrays.values())[0]:
            raise WireError(
                f"rows from {self._where} changed on the way: their checksum fails; look at the proxy or the network "
                "between"
            )
        return arrays

    def ids_of(self, kept: NDArray[Any]) -> IdArray:
        """The ids that came with a reply. Raises WireError: they are not UTF-8."""
        if self._manifest.ids.kind == "int":
            return kept
        try:
            return from_fixed_bytes(kept)
        except UnicodeDecodeError as error:
            raise WireError(f"{self._where} returned sample ids that are not UTF-8: {error}") from error

    def refuse_other_ids(self, returned: IdArray, asked: IdArray) -> None:
        """The promise that row i is the row you think it is: the server reads these ids from the store, not from us."""
        if not np.array_equal(returned, asked):
            raise WireError(
                f"{self._where} returned the rows of other samples than those asked for, or in another order: none of "
                "this batch can be used; look at the server, or at the proxy or cache before it",
                asked=asked[:5].tolist(),
                returned=returned[:5].tolist(),
            )

    def refuse_other_version(self, digest: str | None) -> None:
        """Let the version pass that was opened. Raises StoreChangedError."""
        if digest != self._digest:
            raise StoreChangedError(
                f"{self._where} is now at version {digest}, this was opened at {self._digest}: rows of two versions "
                "must not be mixed; open the store again",
                store=digest,
                yours=self._digest,
            )

    def check(
        self, layout: wire.TensorLayout, blob: memoryview, names: tuple[str, ...], *, samples: int
    ) -> dict[str, NDArray[Any]]:
        """The arrays of a reply whose header was not seen before. Raises as `read` does."""
        arrays = self.unspoilt(layout.arrays(blob))
        self.refuse_other_version(layout.metadata.get("digest"))
        rows = samples
        if self._manifest.layout.kind == "sequences":
            offsets = arrays.get(ROW_OFFSETS)
            if offsets is None or offsets.dtype != np.dtype("<i8") or offsets.shape != (samples + 1,):
                raise WireError(f"{self._where} did not say which rows belong to which of the {samples} sequences")
            rows = int(offsets[-1])
            if offsets[0] != 0 or bool((np.diff(offsets) < 0).any()):
                raise WireError(f"{self._where} sent row offsets that do not ascend from 0")
        for name in names:
            once_a_sample = name == IDS or (name == FINGERPRINTS and name not in self._manifest.arrays)
            self._refuse_other_form(arrays, name, rows=samples if once_a_sample else rows)
        return arrays

    def _spec(self, name: str) -> ArraySpec:
        spec = self._specs.get(name)
        if spec is None:
            kept = ", ".join(self._specs)
            raise UnknownFieldError(f"{self._manifest.name!r} keeps no {name!r}; it keeps {kept}", field=name)
        return spec

    def _refuse_other_form(self, arrays: Mapping[str, NDArray[Any]], name: str, *, rows: int) -> None:
        array, spec = arrays.get(name), self._spec(name)
        if array is None:
            raise WireError(f"{self._where} left {name!r} out of its reply")
        if array.dtype != np.dtype(spec.dtype) or array.shape != (rows, *spec.row_shape):
            raise WireError(
                f"{self._where} sent {name!r} as {array.dtype.str}{list(array.shape)} where the manifest says "
                f"{spec.dtype}{[rows, *spec.row_shape]}"
            )


def _specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Every array that a reply may hold; sequences keep ids and fingerprints elsewhere than beside their rows."""
    specs = dict(manifest.arrays)
    if manifest.layout.kind == "sequences":
        text = ArraySpec(dtype="|u1", row_shape=(manifest.ids.width_bytes,))
        specs[IDS] = text if manifest.ids.kind == "str" else ArraySpec(dtype="<i8", row_shape=())
        specs[FINGERPRINTS] = ArraySpec(dtype="|u1", row_shape=(FINGERPRINT_BYTES,))
    return specs
