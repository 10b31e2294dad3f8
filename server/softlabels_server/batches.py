"""What may a client have of a store? A batch request checked against it, and its arrays gathered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import StoreChangedError, UnknownFieldError
from softlabels.ids import id_kind, to_fixed_bytes
from softlabels.manifest import FINGERPRINTS, IDS, LABELS
from softlabels.softmath import check_temperature
from softlabels.target_store import TargetStore, check_transfer_set
from softlabels.targets import check_unlocked
from softlabels_server.catalog import ServedStore
from softlabels_server.forms import form_for
from softlabels_server.requests import TARGETS, BatchRequest, short, too_large
from softlabels_server.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """A batch that may be had: what is left to do is to copy its rows.

    Attributes:
        store: the version that it is a batch of.
        request: what was asked.
        names: of the arrays to copy, `ids` among them; of the encoding's where they are not to be decoded.
        temperature: what the reply says it is tempered for.
        reply_bytes: how many bytes the arrays take.
    """

    store: ServedStore
    request: BatchRequest
    names: tuple[str, ...]
    temperature: float
    reply_bytes: int

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of the reply, rows in the order asked.

        Raises:
            UnknownIdError, BadIdsError, RequestError, RowsNotCommittedError, DamageError.
        """
        rows, request = self.store.rows, self.request
        kept = tuple(name for name in self.names if name != IDS or IDS in self.store.manifest.arrays)
        arrays = rows.fetch(request.ids, kept, views=request.views, spans=request.spans)
        if request.decode is not None and _wants_targets(request):
            arrays = {request.decode: self._decoded(), **arrays}
        # Ids come from the store and not from the request: whether row i is the row asked for shows in the reply.
        # Sequences keep none beside their rows; there the index, verified whole, is what vouches.
        ids: Any = arrays.get(IDS, request.ids)
        if id_kind(ids) == "str":
            ids = to_fixed_bytes(ids, width_bytes=self.store.manifest.ids.width_bytes)
        arrays[IDS] = ids
        return arrays

    def buffers(self) -> list[bytes | memoryview]:
        """A safetensors file of the arrays, as buffers to be sent one after the other. Raises as `arrays` does."""
        arrays = self.arrays()
        samples, decode = len(self.request.ids), self.request.decode
        return form_for(self.store, arrays, temperature=self.temperature, samples=samples, decode=decode).buffers(
            arrays
        )

    def _decoded(self) -> NDArray[np.float32]:
        request = self.request
        targets = TargetStore(self.store.rows, where=self.store.name).batch(
            request.ids, temperature=self.temperature, views=request.views, spans=request.spans, labels=False
        )
        return targets.tempered() if request.decode == "logits" else targets.p()


def plan(store: ServedStore, request: BatchRequest, settings: Settings) -> Gathering:
    """What a request comes down to, if this store may answer it.

    Raises:
        StoreChangedError, FingerprintMismatchError, TemperatureError, TemperatureLockedError, UnknownFieldError,
        BatchTooLargeError.
    """
    refuse_other_version(store, request.digest)
    check_transfer_set(store.manifest, request.transfer_set)
    temperature = check_reply_temperature(store, request.temperature)
    names = array_names(store, request.fields, encoded=request.decode is None)
    row_bytes = bytes_a_row(store, names) + (_decoded_bytes(store) if request.decode is not None else 0)
    rows = _row_count(store, request)
    most = settings.max_reply_bytes // row_bytes
    if rows > most:
        raise too_large(rows, most, "ids" if rows == len(request.ids) else "rows")
    return Gathering(store=store, request=request, names=names, temperature=temperature, reply_bytes=row_bytes * rows)


def refuse_other_version(store: ServedStore, digest: str | None) -> None:
    """Let a digest pass that is this version's, or None.

    Raises:
        StoreChangedError: the client holds another version of the store.
    """
    if digest is not None and digest != store.digest:
        raise StoreChangedError(
            f"store {store.name!r} is now at version {store.digest}, you hold {short(digest)}: rows of two versions "
            "must not be mixed; open the store again",
            store=store.digest,
            yours=digest[:128],
        )


def check_reply_temperature(store: ServedStore, asked: object) -> float:
    """The temperature that a reply carries. Raises TemperatureError, TemperatureLockedError."""
    spec = store.manifest.temperature
    temperature = spec.default if asked is None else check_temperature(asked)
    check_unlocked(temperature, captured=spec.captured, locked=spec.locked)
    return temperature


def array_names(store: ServedStore, fields: tuple[str, ...] | None, *, encoded: bool = True) -> tuple[str, ...]:
    """The arrays to gather: what the fields stand for, each once, and always the ids.

    Args:
        store: whose arrays.
        fields: as a request names them.
        encoded: whether `targets` stands for the encoding's arrays, or is left to the decoder.
    Raises:
        UnknownFieldError: the store keeps no such array.
    """
    kept = {*store.manifest.arrays, IDS}
    if store.manifest.layout.kind == "sequences":
        kept.add(FINGERPRINTS)
    if fields is None:
        fields = (TARGETS, LABELS) if LABELS in kept else (TARGETS,)
    names: list[str] = []
    for field in fields:
        if field == TARGETS:
            names.extend(store.encoding.fields if encoded else ())
        elif field in kept:
            names.append(field)
        else:
            known = ", ".join(sorted({TARGETS, *kept}))
            raise UnknownFieldError(
                f"store {store.name!r} keeps no {short(field)}; it keeps {known}", field=field[:128]
            )
    return tuple(dict.fromkeys([*names, IDS]))


def bytes_a_row(store: ServedStore, names: tuple[str, ...]) -> int:
    """Bytes that a row takes in these arrays; what sequences keep once a sample counts as a row."""
    arrays = store.manifest.arrays
    elsewhere = {IDS: 8 if store.manifest.ids.kind == "int" else store.manifest.ids.width_bytes, FINGERPRINTS: 16}
    return sum(arrays[name].row_bytes if name in arrays else elsewhere[name] for name in names)


def has_row_offsets(store: ServedStore) -> bool:
    """Whether its replies carry `row_offsets`, since a sample has any number of rows."""
    return store.manifest.layout.kind == "sequences"


def _wants_targets(request: BatchRequest) -> bool:
    return request.fields is None or TARGETS in request.fields


def _decoded_bytes(store: ServedStore) -> int:
    # Members are averaged after they are decoded, all of them.
    return 4 * store.manifest.classes * (store.manifest.members or 1)


def _row_count(store: ServedStore, request: BatchRequest) -> int:
    """How many rows the reply has, known before any is touched: a request of few bytes must not fill the memory."""
    if not has_row_offsets(store):
        return len(request.ids)
    if request.spans is None:
        return int(store.rows.row_counts(request.ids).sum())
    # A range that is refused later is cut to the store here, so that the sum cannot overflow.
    begin, end = np.clip(request.spans, 0, store.manifest.rows).T
    return max(len(request.ids), int(np.maximum(end - begin, 0).sum()))
