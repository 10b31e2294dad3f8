"""In which form does a client want its arrays? What `Accept` names, safetensors where it leaves the choice open.

Source: RFC 9110, section 12.5.1.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from starlette.exceptions import HTTPException

from softlabels.wire import MEDIA_TYPE

Form: TypeAlias = Literal["safetensors", "arrow", "npy", "json"]

MEDIA_TYPES: dict[Form, str] = {
    "safetensors": MEDIA_TYPE,
    "arrow": "application/vnd.apache.arrow.stream",
    "npy": "application/x-npy",
    "json": "application/json",
}
"""In the order of preference where a client likes several equally well."""


DEFAULT: Form = "safetensors"


def accepted_form(accept: str | None) -> Form:
    """The form of the reply.

    Args:
        accept: the header as it came, None where there is none.
    Raises:
        HTTPException: 406, nothing that this server speaks is acceptable.
    """
    if not accept or accept == MEDIA_TYPE:
        return DEFAULT
    wishes = [_wish(part) for part in accept.split(",") if part.strip()]
    liked: dict[Form, float] = {form: _weight(media_type, wishes) for form, media_type in MEDIA_TYPES.items()}
    # The first of those that are liked best: they stand in the order of preference.
    best, weight = DEFAULT, liked[DEFAULT]
    for form, other in liked.items():
        best, weight = (form, other) if other > weight else (best, weight)
    if weight <= 0:
        raise HTTPException(406, f"it accepts {accept[:128]!r} alone; there are {', '.join(MEDIA_TYPES.values())}")
    return best


def _wish(part: str) -> tuple[str, float]:
    media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return media_range, min(max(float(value), 0.0), 1.0)
            except ValueError:
                return media_range, 0.0
    return media_range, 1.0


def _weight(media_type: str, wishes: list[tuple[str, float]]) -> float:
    """The weight of the most specific range that covers a type; 0 where none does."""
    covering = {media_type: 3, media_type.partition("/")[0] + "/*": 2, "*/*": 1}
    found = [(covering[media_range], weight) for media_range, weight in wishes if media_range in covering]
    return max(found)[1] if found else 0.0
