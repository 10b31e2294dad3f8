"""Which class is a teacher's column j? Class lists from files, and teachers brought into the store's order by name."""

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

OF_THE_MODEL = "model"
"""What `classes` of a teacher says where its library knows the names."""

_SHOWN = 5


def read_class_list(path: Path, *, who: str) -> tuple[str, ...]:
    """The class names that a file holds, in the order of the outputs.

    Args:
        path: `.txt` with a name a line, or `.json` with a list of names, or a table from numbers to names.
        who: whose classes, for messages.
    Raises:
        JobError: no such file, names missing, or two of the same.
    """
    try:
        text = path.read_text(encoding="utf-8")
        names = _names_in_json(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except FileNotFoundError as error:
        raise JobError(f"{who}: there is no class list {path}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(f"{who}: the class list {path} cannot be read: {error}") from error
    while names and not names[-1]:
        names.pop()
    return checked_names(names, who=f"{who}: the class list {path.name}")


def checked_names(names: Sequence[str], *, who: str) -> tuple[str, ...]:
    """The names, if each is one and stands once. Raises JobError."""
    if not names or not all(names):
        raise JobError(f"{who} has no name for class {list(names).index('') if names else 0}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise JobError(
            f"{who} names {_listed(twice)} more than once, so a class cannot be told by its name: use identifiers that "
            "differ, such as WordNet's",
            names=twice,
        )
    return tuple(names)


def align_classes(job: Job, teachers: Sequence[Teacher]) -> list[Teacher]:
    """The teachers, each giving its logits in the store's order of classes.

    The store's order is `classes` of the job's [targets], else that of the first teacher with a list. Where the job
    gives the store's, a teacher without a list is taken at its word to be in that order.

    Raises:
        JobError: a teacher's classes are not the store's, by name; some teachers have no list and neither has the job.
    """
    named = [teacher for teacher in teachers if teacher.class_names is not None]
    wanted = _wanted(job)
    if wanted is None:
        if not named:
            return list(teachers)
        without = [teacher.spec.name for teacher in teachers if teacher.class_names is None]
        if without:
            raise JobError(
                f"{named[0].spec.name} names its classes and {_listed(without)} does not, so their columns cannot be "
                "told to be the same: give each teacher `classes`, or the job's [targets] the store's"
            )
        wanted = named[0].class_names
    assert wanted is not None
    return [_in_order(teacher, wanted) for teacher in teachers]


def class_list_of_store(job: Job, teachers: Sequence[Teacher], *, classes: int) -> ClassList | None:
    """What the manifest is to say of the classes; None where nobody names them.

    Raises:
        JobError: their number is not that of the columns.
    """
    names = _wanted(job) or next((teacher.class_names for teacher in teachers if teacher.class_names), None)
    if names is not None and len(names) != classes:
        raise JobError(f"the job names {len(names)} classes, its teachers give {classes}", names=len(names))
    return None if names is None else make_class_list(names)


def _wanted(job: Job) -> tuple[str, ...] | None:
    file = job.targets.classes
    return None if file is None else read_class_list(job.base / file, who="[targets]")


def _in_order(teacher: Teacher, wanted: tuple[str, ...]) -> Teacher:
    own = wanted if teacher.class_names is None else teacher.class_names
    if own == wanted:
        return replace(teacher, class_names=wanted)
    places = {name: place for place, name in enumerate(own)}
    missing = [name for name in wanted if name not in places]
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
    order_C = torch.tensor([places[name] for name in wanted])
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
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
