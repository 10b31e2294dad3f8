"""Wire formats: named arrays as one safetensors file, bound to the question they answer, and errors as problem details.

safetensors (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length H; H bytes of JSON,
`{"name": {"dtype", "shape", "data_offsets": [begin, end]}, …, "__metadata__": {str: str}}`, padded with spaces so that
data begin at a multiple of 8; then the arrays' bytes, in the order of the header, without gaps.

The last array of a reply, `crc32c`, is the CRC-32C of the question and of every byte of the file before it. The client
computes it over the question that it asked: a reply to another one, however whole, has another checksum. Docs: http.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.documents import as_json, canonical_json
from softlabels.errors import ConflictError, NotFoundError, RequestError, SoftLabelsError, WireError, rebuild_error
from softlabels.ids import IdArray, id_kind
from softlabels.order import EpochConfig
from softlabels.row_sums import bytes_of, crc32c

MEDIA_TYPE = "application/vnd.safetensors"
"""Media type of a batch reply."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

MAX_AXES = 32
"""More than any array here has; NumPy's own limit is 64."""

CHECKSUM = "crc32c"
"""The last array of a reply, uint32 [1]."""

CHECKSUM_BYTES = 4

BATCH_FORMAT = "softlabels-batch/2"
EPOCH_FORMAT = "softlabels-epoch/2"
END_FORMAT = "softlabels-end/2"
ERROR_FORMAT = "softlabels-error/1"
CONSTANTS_FORMAT = "softlabels-constants/2"
"""`format` in the metadata of a batch, a frame, a stream's last frame, a frame with an error, and of constants."""

CONSTANT_PATH = "encoding/{name}.npy"
"""Path in a store of an array that the encoding learnt; the manifest's `metadata_sha256` has its digest."""

CHECKSUM_HEADER = "softlabels-crc32c"
"""Header of replies in other formats: CRC-32C of the question and the whole body, eight hex digits."""

VERIFY_HEADER = "softlabels-verify"
"""Header of a request whose reply failed its checksum before: the server compares the rows with what was written."""

PROBLEM_TYPE_PREFIX = "urn:softlabels:error:"

_TO_WIRE = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8",
            "<u8": "U64", "<u4": "U32", "<u2": "U16", "|u1": "U8"}  # fmt: skip
_FROM_WIRE = {wire: np.dtype(numpy) for numpy, wire in _TO_WIRE.items()}


def header_bytes(
    shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str], *, size_bytes: int = 0
) -> bytes:
    """Return the length field and header of a safetensors file whose arrays have these dtypes and shapes.

    Arrays follow in the order of the mapping; with wider dtypes first, all are aligned. Padded to `size_bytes`.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape) in shapes.items():
        end = begin + dtype.itemsize * math.prod(shape)
        wire_name = _TO_WIRE[dtype.newbyteorder("<").str]
        table[name] = {"dtype": wire_name, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text = text.ljust(max(len(text) + -len(text) % 8, size_bytes - 8))
    return len(text).to_bytes(8, "little") + text


def to_bytes(
    arrays: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str],
    *,
    question: int | None = None,
    header_size_bytes: int = 0,
) -> bytes:
    """Return a safetensors file; with the checksum of a question, that of question and file follows the arrays."""
    # Widest items first: with a header of whole 8-byte words, every array is aligned to its dtype.
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))
    shapes = {name: (array.dtype, array.shape) for name, array in ordered.items()}
    if question is not None:
        shapes[CHECKSUM] = (np.dtype("<u4"), (1,))
    header = header_bytes(shapes, metadata, size_bytes=header_size_bytes)
    file = b"".join([header, *map(bytes_of, ordered.values())])
    return file if question is None else file + crc32c(file, question).to_bytes(CHECKSUM_BYTES, "little")


def batch_question(
    digest: str,
    *,
    columns: Iterable[str],
    fields: Iterable[str] | None,
    temperature: float | None = None,
    decode: str | None = None,
) -> int:
    """Return the checksum of a batch's question up to its columns, whose bytes continue it; see `column_bytes`.

    Args:
        digest: version of the store.
        columns: names of the columns of the request, in order, `ids` first.
        fields, temperature, decode: as in the request; None where it leaves them out.
    """
    question = {
        "question": "batch",
        "digest": digest,
        "columns": list(columns),
        "fields": None if fields is None else list(fields),
        "temperature": None if temperature is None else float(temperature),
        "decode": decode,
    }
    return crc32c(canonical_json(question) + b"\n")


def column_bytes(ids: IdArray, *others: NDArray[np.int64] | None) -> bytes:
    """Return the columns of a batch's question: a binary request body; string ids as canonical JSON."""
    first = canonical_json(ids.tolist()) if id_kind(ids) == "str" else np.ascontiguousarray(ids, "<i8").tobytes()
    return b"".join([first, *(np.ascontiguousarray(other, "<i8").tobytes() for other in others if other is not None)])


def epoch_question(
    digest: str, config: EpochConfig, *, fields: Iterable[str] | None, temperature: float | None = None
) -> int:
    """Return the checksum of an epoch's question up to the cursor, which `frame_question` continues."""
    epoch = {name: value for name, value in as_json(config).items() if name != "cursor"}
    question = {
        "question": "epoch",
        "digest": digest,
        "epoch": epoch,
        "fields": None if fields is None else list(fields),
        "temperature": None if temperature is None else float(temperature),
    }
    return crc32c(canonical_json(question) + b"\n")


def frame_question(epoch: int, cursor: int) -> int:
    """Return the checksum of a frame's question: its epoch's, and the cursor before the frame.

    The last frame has the cursor at which the stream began, which its counts are counted from.
    """
    return crc32c(b"%d\n" % cursor, epoch)


def is_intact(file: memoryview, question: int) -> bool:
    """Return whether a file ends with the checksum of this question and of its own bytes."""
    return crc32c(file[:-CHECKSUM_BYTES], question) == int.from_bytes(file[-CHECKSUM_BYTES:], "little")


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """Positions of the arrays in a safetensors file, and its metadata.

    Attributes:
        metadata: strings by name.
        entries: name, dtype, shape and first byte of each array, in the order of their bytes.
        data_begin: offset of the first array in the file.
        data_bytes: size of all arrays together.
    """

    metadata: Mapping[str, str]
    entries: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]
    data_begin: int
    data_bytes: int

    def arrays(self, blob: memoryview) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, as views of the file.

        Raises:
            WireError: the file is shorter or longer than its header says.
        """
        found = len(blob) - self.data_begin
        if found != self.data_bytes:
            raise WireError(
                f"{found} bytes of data, not the {self.data_bytes} in the header: the reply is cut or padded"
            )
        return {
            name: np.ndarray(shape, dtype=dtype, buffer=blob, offset=begin)
            for name, dtype, shape, begin in self.entries
        }


def from_bytes(blob: bytes | bytearray | memoryview) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Read a safetensors file.

    Returns:
        Arrays by name, views of `blob` where it is aligned and read-only if it is; and the metadata.
    Raises:
        WireError: truncated, overlapping, with gaps, out of bounds, of an unknown dtype, or not safetensors at all.
    """
    view = memoryview(blob).cast("B")
    layout = parse_header(view)
    return layout.arrays(view), dict(layout.metadata)


def raw_header(view: memoryview) -> bytes:
    """Return the length field and header of a safetensors file.

    Raises:
        WireError: truncated, or not safetensors at all.
    """
    if len(view) < 8:
        raise WireError(f"{len(view)} bytes are no safetensors file: the reply is cut")
    length = int.from_bytes(view[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > len(view):
        raise WireError(
            f"the header announces {length} bytes, {len(view) - 8} follow: the reply is cut or no safetensors"
        )
    return bytes(view[: 8 + length])


def parse_header(view: memoryview | bytes) -> TensorLayout:
    """Return the layout that a safetensors file's header declares; nothing after the header is read.

    Raises:
        WireError: the header is truncated, contradicts itself or names an unknown dtype.
    """
    header = raw_header(memoryview(view))
    table = _table_of(header)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WireError("the safetensors metadata are not strings")
    entries: list[tuple[str, np.dtype[Any], tuple[int, ...], int]] = []
    end = 0
    try:
        for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, end = _entry(entry, expected_begin=end)
            entries.append((name, dtype, shape, len(header) + entry["data_offsets"][0]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise WireError(f"the safetensors header contradicts itself: {error}") from error
    return TensorLayout(metadata=metadata, entries=tuple(entries), data_begin=len(header), data_bytes=end)


def _table_of(header: bytes) -> dict[str, Any]:
    try:
        table = json.loads(header[8:])
    except (ValueError, RecursionError) as error:
        raise WireError(f"the safetensors header is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise WireError("the safetensors header is not a JSON object")
    return table


def _entry(entry: Mapping[str, Any], *, expected_begin: int) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    dtype = _FROM_WIRE[entry["dtype"]]
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    # `type(…) is int`, since JSON's `true` passes isinstance.
    if len(shape) > MAX_AXES or any(type(extent) is not int or extent < 0 for extent in (*shape, begin, end)):
        raise ValueError(f"shape {shape} at {begin}:{end}")
    # math.prod, of Python integers: the product of hostile extents cannot overflow.
    if begin != expected_begin or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry['dtype']}{list(shape)} is not at {begin}:{end}")
    return dtype, shape, end


def all_error_classes(root: type[SoftLabelsError] = SoftLabelsError) -> list[type[SoftLabelsError]]:
    """Return `root` and every error class below it, parents first."""
    return [root, *(found for child in root.__subclasses__() for found in all_error_classes(child))]


def to_problem(error: SoftLabelsError) -> dict[str, Any]:
    """Return an error as problem details, ready for JSON."""
    return {
        "type": PROBLEM_TYPE_PREFIX + error.code,
        "title": error.title,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "context": error.context,
    }


def problem_in(layout: TensorLayout) -> SoftLabelsError:
    """Return the error that a frame of format `softlabels-error/1` carries. Raises WireError if it carries none."""
    try:
        problem = json.loads(layout.metadata["problem"])
    except (KeyError, ValueError, RecursionError) as error:
        raise WireError(f"a frame announces an error and carries none: {error!r}") from error
    if not isinstance(problem, dict):
        raise WireError("a frame announces an error, and its problem details are not a JSON object")
    return from_problem(problem)


def from_problem(problem: Mapping[str, Any]) -> SoftLabelsError:
    """Return the error that problem details describe; for an unknown code, the class that fits the HTTP status."""
    message = str(problem.get("detail") or problem.get("title") or "the server gave no reason")
    context = problem.get("context")
    facts = {str(k): v for k, v in context.items()} if isinstance(context, Mapping) else {}
    by_code = {cls.code: cls for cls in all_error_classes()}
    known = by_code.get(str(problem.get("code")))
    return rebuild_error(known or _class_for_status(problem.get("status")), message, facts)


def _class_for_status(status: object) -> type[SoftLabelsError]:
    if status in (404, 409):
        return NotFoundError if status == 404 else ConflictError
    return RequestError if isinstance(status, int) and 400 <= status < 500 else SoftLabelsError
