"""Checks of a reply against the request: store version, arrays, dtypes and shapes, checksum, and sample ids."""

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
"""Most headers kept; replies to batches of one size have equal headers."""


class ReplyReader:
    """Parses and checks the replies of one store version.

    Args:
        manifest: manifest of the store.
        digest: digest of the version that was opened.
        where: URL of the store, for messages.
    """

    def __init__(self, manifest: Manifest, digest: str, where: str) -> None:
        self._manifest, self._digest, self._where = manifest, digest, where
        self._specs = _specs(manifest)
        # A header, which says where the arrays are, is checked once; equal bytes mean the same the next time.
        self._known: dict[tuple[bytes, tuple[str, ...], int], wire.TensorLayout] = {}

    def row_bytes(self, names: tuple[str, ...]) -> int:
        """Return the bytes of a row in these arrays. Raises UnknownFieldError: the store keeps no such array."""
        return sum(self._spec(name).row_bytes for name in names)

    def read(
        self, blob: memoryview, names: tuple[str, ...], *, samples: int
    ) -> tuple[dict[str, NDArray[Any]], Mapping[str, str]]:
        """Return the arrays of a reply, as views of it, and its metadata.

        Args:
            blob: body of the reply.
            names: requested arrays.
            samples: number of requested samples.
        Raises:
            WireError: cut, inconsistent, or not the requested arrays. StoreChangedError: rows of another version.
        """
        header = wire.raw_header(blob)
        layout = self._known.get((header, names, samples))
        if layout is None:
            layout = wire.parse_header(blob)
            arrays = self.check(layout, blob, names, samples=samples)
            if len(self._known) >= _MOST_HEADERS:
                self._known.clear()
            # Row counts of sequences are not part of the header, so those replies are checked each time.
            if ROW_OFFSETS not in arrays:
                self._known[header, names, samples] = layout
            return arrays, layout.metadata
        return self.verified(layout.arrays(blob)), layout.metadata

    def verified(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the arrays without their checksum. Raises WireError: missing or wrong checksum."""
        checksum = arrays.pop(wire.CHECKSUM, None)
        if checksum is None or checksum.dtype != np.dtype("<u8") or checksum.shape != (1,):
            raise WireError(f"{self._where} sent rows without a checksum, so they cannot be verified")
        if checksum[0] != wire.checksum_of(arrays.values())[0]:
            raise WireError(
                f"rows from {self._where} were changed in transit: their checksum fails; check the proxy or the "
                "network between"
            )
        return arrays

    def ids_of(self, kept: NDArray[Any]) -> IdArray:
        """Return the ids in a reply. Raises WireError: they are not UTF-8."""
        if self._manifest.ids.kind == "int":
            return kept
        try:
            return from_fixed_bytes(kept)
        except UnicodeDecodeError as error:
            raise WireError(f"{self._where} returned sample ids that are not UTF-8: {error}") from error

    def check_ids(self, returned: IdArray, asked: IdArray) -> None:
        """Raise WireError unless the reply has the requested ids, which the server reads from the store."""
        if not np.array_equal(returned, asked):
            raise WireError(
                f"{self._where} returned rows of other samples than requested, or in another order: none of this batch "
                "can be used; check the server, or the proxy or cache before it",
                asked=asked[:5].tolist(),
                returned=returned[:5].tolist(),
            )

    def check_version(self, digest: str | None) -> None:
        """Raise StoreChangedError unless this is the version that was opened."""
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
        """Return the arrays of a reply whose header is new, after checking it. Raises as `read`."""
        arrays = self.verified(layout.arrays(blob))
        self.check_version(layout.metadata.get("digest"))
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
            self._check_array(arrays, name, rows=samples if once_a_sample else rows)
        return arrays

    def _spec(self, name: str) -> ArraySpec:
        spec = self._specs.get(name)
        if spec is None:
            kept = ", ".join(self._specs)
            raise UnknownFieldError(f"{self._manifest.name!r} keeps no {name!r}; it keeps {kept}", field=name)
        return spec

    def _check_array(self, arrays: Mapping[str, NDArray[Any]], name: str, *, rows: int) -> None:
        array, spec = arrays.get(name), self._spec(name)
        if array is None:
            raise WireError(f"{self._where} left {name!r} out of its reply")
        if array.dtype != np.dtype(spec.dtype) or array.shape != (rows, *spec.row_shape):
            raise WireError(
                f"{self._where} sent {name!r} as {array.dtype.str}{list(array.shape)} where the manifest says "
                f"{spec.dtype}{[rows, *spec.row_shape]}"
            )


def _specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Return every array that a reply may contain; sequence stores keep ids and fingerprints apart from their rows."""
    specs = dict(manifest.arrays)
    if manifest.layout.kind == "sequences":
        text = ArraySpec(dtype="|u1", row_shape=(manifest.ids.width_bytes,))
        specs[IDS] = text if manifest.ids.kind == "str" else ArraySpec(dtype="<i8", row_shape=())
        specs[FINGERPRINTS] = ArraySpec(dtype="|u1", row_shape=(FINGERPRINT_BYTES,))
    return specs
