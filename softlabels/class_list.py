"""Class lists: the names of a store's classes, so that a student with other classes or another order gets an error."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from softlabels.documents import Document, Sha256, canonical_json
from softlabels.errors import ClassListMismatchError

MAX_NAMED_BYTES = 1 << 16
"""Longer lists are stored as their digest alone: the manifest travels with every opening of a store."""


class ClassList(Document, frozen=True):
    """The classes of a store, in the order of its columns.

    Attributes:
        sha256: digest of the names' canonical JSON list.
        names: the names; None where they take more than `MAX_NAMED_BYTES`.
    """

    sha256: Sha256
    names: tuple[str, ...] | None = None


def make_class_list(names: Sequence[str]) -> ClassList:
    """Return what a manifest stores of a class list."""
    raw = canonical_json(list(names))
    return ClassList(
        sha256=hashlib.sha256(raw).hexdigest(), names=tuple(names) if len(raw) <= MAX_NAMED_BYTES else None
    )


def check_digest_of_names(stored: ClassList, *, classes: int) -> None:
    """Raise ValueError unless the names are as many as the classes and have the digest beside them."""
    names = stored.names
    if names is not None and (len(names) != classes or make_class_list(names).sha256 != stored.sha256):
        raise ValueError(f"class_list.names are not {classes} names with the digest class_list.sha256")


def check_class_names(stored: ClassList | None, names: Sequence[str], *, store: str) -> None:
    """Raise unless a student's class names are the store's, in the same order.

    Args:
        stored: class list in the store's manifest.
        names: the student's classes, in the order of its outputs.
        store: name of the store, for messages.
    Raises:
        ClassListMismatchError: the lists differ, or the store has no class names.
    """
    if stored is None:
        raise ClassListMismatchError(
            f"store {store!r} has no class names to compare yours with: precompute with `classes` in the job's "
            "[targets] table, or compare the number of classes alone"
        )
    if make_class_list(names).sha256 == stored.sha256:
        return
    raise ClassListMismatchError(
        f"the student's classes are not those of {store!r}, {_first_difference(stored, names)}: its outputs would be "
        "trained towards the targets of other classes; order the student's classes as the store's",
        store=stored.sha256,
    )


def _first_difference(stored: ClassList, names: Sequence[str]) -> str:
    if stored.names is None:
        return "whose list is stored as a digest alone"
    for number, (theirs, yours) in enumerate(zip(stored.names, names, strict=False)):
        if theirs != yours:
            return f"the first that differs is number {number}, {theirs!r} there and {yours!r} here"
    return f"which has {len(stored.names)}, not {len(names)}"
