"""Encodings: how one distribution becomes bytes. One file for each encoding, and `make_encoding` from a name to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.documents import Document, Number, as_json, did_you_mean, parse_document
from softlabels.encodings.base import TARGETS, Encoding, Field, RowKind, encoding_label, row_bytes
from softlabels.encodings.basis import Basis
from softlabels.encodings.dense import BF16, F16, F32
from softlabels.encodings.hidden import HEAD_TYPES, Hidden, KeptAs, hidden_encoding
from softlabels.encodings.quantised import Quantised
from softlabels.encodings.sampled import Sampled
from softlabels.encodings.topk import TAIL_RULES, TailRule, TopK
from softlabels.errors import UnknownEncodingError
from softlabels.splitmix64 import rng_keys

__all__ = [
    "BF16",
    "ENCODING_NAMES",
    "F16",
    "F32",
    "TAIL_RULES",
    "TARGETS",
    "Basis",
    "Encoding",
    "Field",
    "Hidden",
    "Quantised",
    "RowKind",
    "Sampled",
    "TopK",
    "encoding_label",
    "hidden_encoding",
    "make_encoding",
    "rng_keys",
    "row_bytes",
]

DEFAULT_HEAD = 16
"""Head of quantised rows if none is given; an eighth of the classes if these are few."""


class _NoParams(Document, frozen=True):
    """Parameters of dense encodings."""


class _QuantisedParams(Document, frozen=True):
    head: int | None = None


class _TopKParams(Document, frozen=True):
    k: int
    tail: TailRule = "uniform"


class _SampledParams(Document, frozen=True):
    head: int
    draws: int


class _BasisParams(Document, frozen=True):
    head: int
    head_bits: int
    depth: Number
    residual_bits: int
    unit_log2: int
    refine: int


class _HiddenParams(Document, frozen=True):
    kept_as: KeptAs = "f16"
    scale: Number = 1.0
    softcap: Number = 0.0


def _quantised(*, classes: int, bits: int, head: int | None = None) -> Quantised:
    default = max(1, min(DEFAULT_HEAD, classes // 8))
    return Quantised(classes=classes, bits=bits, head=default if head is None else head)


_KINDS: Mapping[str, tuple[Callable[..., Encoding], type[Document]]] = {
    "f32": (F32, _NoParams),
    "f16": (F16, _NoParams),
    "bf16": (BF16, _NoParams),
    **{f"q{bits}": (partial(_quantised, bits=bits), _QuantisedParams) for bits in range(8, 1, -1)},
    "topk": (TopK, _TopKParams),
    "sampled": (Sampled, _SampledParams),
    "basis": (Basis, _BasisParams),
    "hidden": (Hidden, _HiddenParams),
}

ENCODING_NAMES: tuple[str, ...] = tuple(_KINDS)
"""Every encoding that a manifest may name."""

_CONSTANTS: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "basis": {"basis": ("basis_RC", ("<i2",)), "mean": ("mean_C", ("<i4",)), "widths": ("widths_R", ("|u1",))},
    "hidden": {"head": ("head_CD", HEAD_TYPES), "bias": ("bias_C", ("<f4",))},
}
"""Arrays that belong to a store's encoding: the constructor's argument for each, and its element types."""

_OPTIONAL = frozenset({"bias"})
_SOURCES = {
    "basis": "; learn them from a pilot of real rows (learn_basis)",
    "hidden": "; take them from the teacher's last layer (hidden_encoding)",
}


def make_encoding(
    name: str,
    *,
    classes: int,
    params: Mapping[str, Any] | None = None,
    constants: Mapping[str, NDArray[Any]] | None = None,
) -> Encoding:
    """Return the encoding of this name for rows of `classes` classes.

    Args:
        name: one of `ENCODING_NAMES`.
        classes: number of classes, at least 2 (1 for dense rows and topk).
        params: what `Encoding.params` returned; `head` of q8 … q2 and `tail` of topk may be left out.
        constants: what `Encoding.constants` returned; only for `basis` and `hidden`.
    Raises:
        UnknownEncodingError: no encoding has that name, or it does not take these parameters or constants.
    """
    if name not in _KINDS:
        hint = did_you_mean(name, ENCODING_NAMES)
        raise UnknownEncodingError(f"there is no encoding {name!r}{hint}; known are {', '.join(ENCODING_NAMES)}")
    kind, params_type = _KINDS[name]
    parsed = parse_document(dict(params or {}), params_type, what=f"encoding {name!r}", error=UnknownEncodingError)
    return kind(classes=classes, **as_json(parsed), **_checked_arrays(name, constants or {}))


def _checked_arrays(name: str, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    expected = _CONSTANTS.get(name, {})
    if not set(expected) - _OPTIONAL <= set(given) <= set(expected):
        raise UnknownEncodingError(
            f"encoding {name!r} needs the arrays {sorted(expected)}, which belong to one store, and got {sorted(given)}"
            + _SOURCES.get(name, "")
        )
    for array, values in given.items():
        if values.dtype.str not in expected[array][1]:
            raise UnknownEncodingError(
                f"array {array!r} of encoding {name!r} is {' or '.join(expected[array][1])}, not {values.dtype.str}"
            )
    return {expected[array][0]: np.asarray(values) for array, values in given.items()}
