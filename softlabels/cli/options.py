"""Options derived from types: the flags of a settings dataclass or a pydantic model, and JSON values."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Annotated, Any, get_origin, get_type_hints

from cyclopts import Parameter, Token
from cyclopts.validators import Number

from softlabels.errors import RequestError

Wait = Annotated[float | None, Parameter(metavar="S", validator=Number(gte=0))]
"""Seconds to wait for a store's lock; None for `softlabels.store.ledger.LOCK_WAIT_S`."""


def flags_of(kind: Any) -> Any:
    """Return a dataclass like `kind` for the command line: with its names, types, defaults and documentation.

    Mappings are written as JSON objects (`settings_from` parses them), tuples of integers with commas. Bounds are
    left to `kind`, so that a bad value is the same error from the command line as from Python.
    """
    hints = get_type_hints(kind, include_extras=True)
    flags = []
    for entry in fields(kind):
        hint = hints[entry.name]
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if get_origin(hint) is Mapping:
            hint, default = Annotated[str, Parameter(metavar="JSON")], json.dumps(default)
        elif get_origin(hint) is tuple:
            hint = Annotated[hint, Parameter(converter=_integers, n_tokens=1, metavar="N,…")]
        flags.append((entry.name, hint, field(default=default)))
    # cyclopts takes the module of a dataclass for built-in where it is not set.
    namespace = {"__module__": __name__, "__doc__": kind.__doc__}
    return make_dataclass(f"{kind.__name__}Flags", flags, frozen=True, kw_only=True, namespace=namespace)


def optional_flags_of(model: Any, *, flag_of: Callable[[str], str], without: Collection[str]) -> Any:
    """Return a dataclass of the fields of a pydantic model, each None where its flag is not given.

    Args:
        model: pydantic model whose fields have descriptions.
        flag_of: name of a field's flag.
        without: fields that are no flags.
    """
    flags = []
    for name, entry in model.model_fields.items():
        # `Settings` knows the defaults; a flag that is not given must not hide a variable or the settings file.
        default = "" if entry.default in (None, False) else f" (default {entry.default})"
        about = Parameter(name=flag_of(name), help=f"{entry.description}{default}", show_default=False, negative=())
        if name not in without:
            flags.append((name, Annotated[entry.annotation | None, about], field(default=None)))
    namespace = {"__module__": __name__}
    return make_dataclass(f"{model.__name__}Flags", flags, frozen=True, kw_only=True, namespace=namespace)


def given_flags(flags: Any) -> dict[str, Any]:
    """Return the values of the flags that were given, by name of the field."""
    values = {entry.name: getattr(flags, entry.name) for entry in fields(flags)}
    return {name: value for name, value in values.items() if value is not None}


def settings_from(flags: Any, kind: type[Any]) -> Any:
    """Return the settings of type `kind` that flags made by `flags_of(kind)` stand for."""
    hints = get_type_hints(kind)
    given = {entry.name: getattr(flags, entry.name) for entry in fields(flags)}
    for name, value in given.items():
        if get_origin(hints[name]) is Mapping:
            given[name] = json_object("--" + name.replace("_", "-"), value)
    return kind(**given)


def json_object(option: str, text: str) -> dict[str, Any]:
    """Return the JSON object in an option's value.

    Raises:
        RequestError: it is no JSON object.
    """
    example = "write it like '{\"hidden\": 800}'"
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{option} is no JSON ({error}): {example}") from error
    if not isinstance(found, dict):
        raise RequestError(f"{option} is {text}, no JSON object: {example}")
    return found


def _integers(kind: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    return tuple(int(number) for number in tokens[0].value.split(","))
