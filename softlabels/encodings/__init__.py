"""How one distribution becomes bytes: one file an encoding, and the way from a name to it."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from softlabels.encodings.dense import BF16, F16, F32
from softlabels.encodings.protocol import Encoding, Field
from softlabels.errors import UnknownEncodingError

__all__ = ["BF16", "ENCODING_NAMES", "F16", "F32", "Encoding", "Field", "make_encoding"]

ENCODING_NAMES: tuple[str, ...] = ("f32", "f16", "bf16")
"""Every encoding that a job or a manifest may name."""


def make_encoding(name: str, *, classes: int, params: Mapping[str, Any] | None = None) -> Encoding:
    """The encoding of this name for rows of `classes` classes.

    Raises:
        UnknownEncodingError: no encoding has that name, or it does not take these parameters.
    """
    if params:
        raise UnknownEncodingError(f"encoding {name!r} takes no parameters, but got {sorted(params)}")
    if name == "f32":
        return F32(classes=classes)
    if name == "f16":
        return F16(classes=classes)
    if name == "bf16":
        return BF16(classes=classes)
    near = get_close_matches(name, ENCODING_NAMES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownEncodingError(f"there is no encoding {name!r}{hint}; known are {', '.join(ENCODING_NAMES)}")
