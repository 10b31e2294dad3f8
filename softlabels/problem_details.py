"""Errors over HTTP: RFC 9457 problem details, and from those back to the same error class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softlabels.errors import ConflictError, NotFoundError, RequestError, SoftLabelsError, rebuild_error

PROBLEM_TYPE_PREFIX = "urn:softlabels:error:"


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


def from_problem(problem: Mapping[str, Any]) -> SoftLabelsError:
    """Return the error that problem details describe; for an unknown code, the class that fits the HTTP status."""
    message = str(problem.get("detail") or problem.get("title") or "the server gave no reason")
    context = problem.get("context")
    facts = {str(k): v for k, v in context.items()} if isinstance(context, Mapping) else {}
    by_code = {cls.code: cls for cls in all_error_classes()}
    known = by_code.get(str(problem.get("code")))
    return rebuild_error(known or _class_for_status(problem.get("status")), message, facts)


def _class_for_status(status: object) -> type[SoftLabelsError]:
    if status == 404:
        return NotFoundError
    if status == 409:
        return ConflictError
    return RequestError if isinstance(status, int) and 400 <= status < 500 else SoftLabelsError
