"""Class names of teachers: read from files, compared by name, and teachers' columns put into the store's order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from softlabels.class_list import ClassList, make_class_list
from softlabels.errors import JobError
from softlabels.precompute.job import Job
from softlabels.precompute.teachers.teacher import Teacher

FROM_MODEL = "model"
"""`classes` of a teacher whose library knows the names."""

_MAX_LISTED = 5


def read_class_list(path: Path, *, label: str) -> tuple[str, ...]:
    """Return the class names in a file, in the order of the outputs.

    Args:
        path: `.txt` with a name a line, or `.json` with a list of names or a table from "0", "1", … to names.
        label: the teacher or table that names the file, for messages.
    Raises:
        JobError: no such file, or names that are missing or repeated.
    """
    try:
        text = path.read_text(encoding="utf-8")
        names = _names_in_json(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except FileNotFoundError as error:
        raise JobError(f"{label}: there is no class list {path}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(f"{label}: the class list {path} cannot be read: {error}") from error
    while names and not names[-1]:
        names.pop()
    return checked_names(names, label=f"{label}: the class list {path.name}")


def checked_names(names: Sequence[str], *, label: str) -> tuple[str, ...]:
    """Return the names. Raises JobError if one is empty or occurs twice."""
    if not names or not all(names):
        raise JobError(f"{label} has no name for class {list(names).index('') if names else 0}")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise JobError(
            f"{label} names {_listed(repeated)} more than once, so a class cannot be told by its name: use unique "
            "identifiers, such as WordNet's",
            names=repeated,
        )
    return tuple(names)


def align_classes(job: Job, teachers: Sequence[Teacher]) -> list[Teacher]:
    """Return the teachers with their logits in the store's order of classes.

    That order is `classes` of the job's [targets], else the order of the first teacher with a list. Where the job gives
    it, a teacher without a list is assumed to have that order.

    Raises:
        JobError: a teacher's classes differ from the store's; or some teachers have no list and neither has the job.
    """
    named = [teacher for teacher in teachers if teacher.class_names is not None]
    wanted = _names_of_job(job)
    if wanted is None:
        if not named:
            return list(teachers)
        without = [teacher.spec.name for teacher in teachers if teacher.class_names is None]
        if without:
            raise JobError(
                f"{named[0].spec.name} names its classes and {_listed(without)} does not, so their columns cannot be "
                "matched: give each teacher `classes`, or give them in the job's [targets]"
            )
        wanted = named[0].class_names
    assert wanted is not None
    return [_in_order(teacher, wanted) for teacher in teachers]


def class_list_of_store(job: Job, teachers: Sequence[Teacher], *, classes: int) -> ClassList | None:
    """Return the class list for the manifest, None where the classes have no names.

    Raises:
        JobError: there are not as many names as columns.
    """
    names = _names_of_job(job) or next((teacher.class_names for teacher in teachers if teacher.class_names), None)
    if names is not None and len(names) != classes:
        raise JobError(f"the job names {len(names)} classes, its teachers give {classes}", names=len(names))
    return None if names is None else make_class_list(names)


def _names_of_job(job: Job) -> tuple[str, ...] | None:
    file = job.targets.classes
    return None if file is None else read_class_list(job.base / file, label="[targets]")


def _in_order(teacher: Teacher, wanted: tuple[str, ...]) -> Teacher:
    own = wanted if teacher.class_names is None else teacher.class_names
    if own == wanted:
        return replace(teacher, class_names=wanted)
    columns = {name: column for column, name in enumerate(own)}
    missing = [name for name in wanted if name not in columns]
    extra = sorted(set(own) - set(wanted))
    if missing or extra:
        parts = [f"lacks {_listed(missing)}"] if missing else []
        parts += [f"has {_listed(extra)} besides"] if extra else []
        raise JobError(
            f"the classes of {teacher.spec.name} are not the store's: it {' and '.join(parts)}; a teacher must know "
            "exactly the store's classes, in any order",
            missing=missing,
            extra=extra,
        )
    order_C = torch.tensor([columns[name] for name in wanted])
    device = next((tensor.device for tensor in teacher.model.parameters()), order_C.device)
    return replace(teacher, class_names=wanted, order_C=order_C.to(device))


def _names_in_json(text: str) -> list[str]:
    found = json.loads(text)
    if isinstance(found, dict):  # as `id2label` of a `transformers` configuration
        found = [found[str(number)] for number in range(len(found))]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise TypeError("it is no list of names, and no table from 0, 1, … to names")
    return [name.strip() for name in found]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(map(repr, names[:_MAX_LISTED])) + more
