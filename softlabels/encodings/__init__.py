"""How one distribution becomes bytes: one file an encoding, and the way from a name to it."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.base import TARGETS, Encoding, Field, RowKind, row_bytes
from softlabels.encodings.basis import Basis
from softlabels.encodings.dense import BF16, F16, F32
from softlabels.encodings.hidden import HEAD_TYPES, Hidden, hidden_encoding
from softlabels.encodings.quantised import Quantised
from softlabels.encodings.sampled import Sampled
from softlabels.encodings.topk import TAIL_RULES, TopK
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
    "hidden_encoding",
    "make_encoding",
    "rng_keys",
    "row_bytes",
]

_QUANTISED = {f"q{bits}": bits for bits in range(8, 1, -1)}

ENCODING_NAMES: tuple[str, ...] = ("f32", "f16", "bf16", *_QUANTISED, "topk", "sampled", "basis", "hidden")
"""Every encoding that a manifest may name."""

DEFAULT_HEAD = 16
"""Classes that quantised rows keep exactly unless told otherwise; of few classes, an eighth."""

_OTHERS: Mapping[str, Any] = {"topk": TopK, "sampled": Sampled, "basis": Basis, "hidden": Hidden}
_DENSE: Mapping[str, type[F32] | type[F16] | type[BF16]] = {"f32": F32, "f16": F16, "bf16": BF16}


def make_encoding(
    name: str,
    *,
    classes: int,
    params: Mapping[str, Any] | None = None,
    constants: Mapping[str, NDArray[Any]] | None = None,
) -> Encoding:
    """The encoding of this name for rows of `classes` classes.

    Args:
        name: one of `ENCODING_NAMES`.
        classes: at least 2 (1 for dense rows and topk).
        params: as `Encoding.params` gave them; what may be left out: `head` of q8 … q2, `tail` of topk.
        constants: as `Encoding.constants` gave them; `basis` and `hidden` alone have some.
    Raises:
        UnknownEncodingError: no encoding has that name, or it does not take these parameters or constants.
    """
    given = dict(params or {})
    if name in _DENSE:
        kind: Any = _DENSE[name]
    elif name in _QUANTISED:
        kind = Quantised
        given = {"head": max(1, min(DEFAULT_HEAD, classes // 8)), **given}
    elif name in _OTHERS:
        kind = _OTHERS[name]
    else:
        near = get_close_matches(name, ENCODING_NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownEncodingError(f"there is no encoding {name!r}{hint}; known are {', '.join(ENCODING_NAMES)}")
    _check_params(name, kind, given)
    fixed = {"bits": _QUANTISED[name]} if name in _QUANTISED else {}
    encoding: Encoding = kind(classes=classes, **fixed, **given, **_arrays(name, constants))
    return encoding


_CONSTANTS: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "basis": {"basis": ("basis_RC", ("<i2",)), "mean": ("mean_C", ("<i4",)), "widths": ("widths_R", ("|u1",))},
    "hidden": {"head": ("head_CD", HEAD_TYPES), "bias": ("bias_C", ("<f4",))},
}
"""Arrays that belong to a store's encoding: the parameter that each is, and the types that it may have."""

_MAY_LACK = frozenset({"bias"})
_SOURCE = {
    "basis": "; learn them from a pilot of real rows (learn_basis)",
    "hidden": "; take them from the teacher's last layer (hidden_encoding)",
}


def _arrays(name: str, constants: Mapping[str, NDArray[Any]] | None) -> dict[str, NDArray[Any]]:
    expected = _CONSTANTS.get(name, {})
    given = {} if constants is None else constants
    if not set(expected) - _MAY_LACK <= set(given) <= set(expected):
        raise UnknownEncodingError(
            f"encoding {name!r} goes with the arrays {sorted(expected)}, learnt for one store, and got {sorted(given)}"
            + _SOURCE.get(name, "")
        )
    for array, values in given.items():
        if values.dtype.str not in expected[array][1]:
            raise UnknownEncodingError(
                f"array {array!r} of encoding {name!r} is {' or '.join(expected[array][1])}, not {values.dtype.str}"
            )
    return {expected[array][0]: np.asarray(values) for array, values in given.items()}


_TYPES: Mapping[str, tuple[type, ...]] = {
    **{"tail": (str,), "kept_as": (str,)},
    **dict.fromkeys(("depth", "scale", "softcap"), (float, int)),
}


def _check_params(name: str, kind: Any, given: Mapping[str, Any]) -> None:
    """Names and types, before a constructor sees them: they may come from a manifest that nobody vouches for."""
    arrays = {field for field, _ in _CONSTANTS.get(name, {}).values()}
    fields = {p.name: p for p in signature(kind).parameters.values() if p.name not in arrays | {"classes", "bits"}}
    unknown = [key for key in given if key not in fields]
    if unknown:
        near = get_close_matches(unknown[0], list(fields), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        takes = f"takes {', '.join(fields)}" if fields else "takes no parameters"
        raise UnknownEncodingError(f"encoding {name!r} {takes}, not {unknown[0]!r}{hint}")
    missing = [key for key, parameter in fields.items() if parameter.default is parameter.empty and key not in given]
    if missing:
        raise UnknownEncodingError(f"encoding {name!r} needs {', '.join(missing)}")
    for key, value in given.items():
        wanted: tuple[type, ...] = _TYPES.get(key, (int,))
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UnknownEncodingError(
                f"parameter {key!r} of encoding {name!r} is {value!r}: give {wanted[0].__name__}"
            )
