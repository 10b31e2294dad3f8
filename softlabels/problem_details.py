"""How does an error travel over HTTP? As RFC 9457 problem details, and back into the same class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softlabels.errors import (
    ConflictError,
    NotFoundError,
    RequestError,
    SoftLabelsError,
    all_error_classes,
    rebuild_error,
)

PROBLEM_TYPE_PREFIX = "urn:softlabels:error:"


def to_problem(error: SoftLabelsError) -> dict[str, Any]:
    """An error as RFC 9457 problem details, ready for JSON."""
    return {
        "type": PROBLEM_TYPE_PREFIX + error.code,
        "title": error.title,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "context": error.context,
    }


def from_problem(problem: Mapping[str, Any]) -> SoftLabelsError:
    """The error that a server's problem details stand for; an unknown code becomes its nearest parent by status."""
    message = str(problem.get("detail") or problem.get("title") or "the server gave no reason")
    context = problem.get("context")
    facts = {str(k): v for k, v in context.items()} if isinstance(context, Mapping) else {}
    by_code = {cls.code: cls for cls in all_error_classes()}
    known = by_code.get(str(problem.get("code")))
    if known is not None:
        return rebuild_error(known, message, facts)
    status = problem.get("status")
    fallback: type[SoftLabelsError] = {404: NotFoundError, 409: ConflictError}.get(
        status if isinstance(status, int) else 0, SoftLabelsError
    )
    if fallback is SoftLabelsError and isinstance(status, int) and 400 <= status < 500:
        fallback = RequestError
    return rebuild_error(fallback, message, facts)
