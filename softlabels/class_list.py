"""Whose class is column j? The names of a store's classes, kept so that a student with another list gets an error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softlabels.documents import canonical_json
from softlabels.errors import ClassListMismatchError

MAX_NAMED_BYTES = 1 << 16
"""Names up to here stand in the manifest, which travels with every opening; of a longer list its digest does."""


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """The classes of a store, in the order of its columns.

    Attributes:
        sha256: of the names' canonical JSON list.
        names: the names themselves; None where they take more than `MAX_NAMED_BYTES`.
    """

    sha256: str
    names: tuple[str, ...] | None = None


def make_class_list(names: Sequence[str]) -> ClassList:
    """What a manifest keeps of a class list."""
    raw = canonical_json(list(names))
    return ClassList(
        sha256=hashlib.sha256(raw).hexdigest(), names=tuple(names) if len(raw) <= MAX_NAMED_BYTES else None
    )


def class_list_of(document: Mapping[str, Any], *, classes: int) -> ClassList:
    """Read a class list of a manifest and believe nothing of it that does not add up.

    Raises:
        ValueError, TypeError: names that are no text, too few or too many, or not those that the digest is of.
    """
    found = ClassList(**document)
    if not isinstance(found.sha256, str) or len(found.sha256) != 64:
        raise ValueError(f"class_list.sha256 is {found.sha256!r}")
    if found.names is None:
        return found
    if not isinstance(found.names, list | tuple) or not all(isinstance(name, str) for name in found.names):
        raise ValueError("class_list.names is no list of names")
    if len(found.names) != classes or make_class_list(found.names).sha256 != found.sha256:
        raise ValueError(f"class_list does not name the {classes} classes that its digest is of")
    return ClassList(sha256=found.sha256, names=tuple(found.names))


def check_class_names(kept: ClassList | None, names: Sequence[str], *, store: str) -> None:
    """Let a student's class list pass that is the store's own.

    Args:
        kept: what the store's manifest says.
        names: the student's classes, in the order of its outputs.
        store: the store's name, for the message.
    Raises:
        ClassListMismatchError: it is another list, or the store does not know its classes by name.
    """
    if kept is None:
        raise ClassListMismatchError(
            f"store {store!r} does not know its classes by name, so yours cannot be compared: precompute with "
            "`classes` in the job's [targets] table, or compare the number of classes alone"
        )
    if make_class_list(names).sha256 == kept.sha256:
        return
    raise ClassListMismatchError(
        f"the student's classes are not those of {store!r}, {_difference(kept, names)}: its outputs would be trained "
        "towards other classes' targets; order the student's classes as the store's",
        store=kept.sha256,
    )


def _difference(kept: ClassList, names: Sequence[str]) -> str:
    if kept.names is None:
        return "whose list is kept as a digest alone"
    for number, (theirs, yours) in enumerate(zip(kept.names, names, strict=False)):
        if theirs != yours:
            return f"the first that differs is number {number}, {theirs!r} there and {yours!r} here"
    return f"which has {len(kept.names)}, not {len(names)}"
