"""How does the `[transfer_set]` table of a job become a transfer set?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from softlabels.errors import JobError
from softlabels.references import load_reference
from softlabels.transfer_set import TransferSet

KINDS: Mapping[str, str] = {
    "image_folder": "softlabels.transfer_sets.image_folder:image_folder",
    "torch": "softlabels.transfer_sets.torch_dataset:torch_dataset",
    "webdataset": "softlabels.transfer_sets.webdataset_tars:webdataset",
    "huggingface": "softlabels.transfer_sets.huggingface_datasets:huggingface",
    "parquet": "softlabels.transfer_sets.parquet:parquet",
    "zarr": "softlabels.transfer_sets.array_files:zarr_arrays",
    "hdf5": "softlabels.transfer_sets.array_files:hdf5_arrays",
    "npy": "softlabels.transfer_sets.array_files:npy_arrays",
    "text": "softlabels.transfer_sets.text_files:text",
}
"""What a job file may call a source, and what makes it; all else is a reference with a colon."""

BASE = "base"
"""The argument of the built-in kinds that is no key of a job: the folder that its relative paths start from."""


def check_source(source: str) -> str:
    """The source, if it is a reference or a kind that is known.

    Raises:
        JobError: it is neither; the nearest kind is named.
    """
    if ":" in source or source in KINDS:
        return source
    near = get_close_matches(source, list(KINDS), n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? Known are" if near else "known are"
    raise JobError(
        f"transfer set source {source!r} is unknown: {hint} {', '.join(KINDS)}, and references such as "
        "'package.module:name' and 'file.py:name'",
        source=source,
    )


def load_transfer_set(source: str, arguments: Mapping[str, Any], *, base: Path | None = None) -> TransferSet:
    """The transfer set that a source gives for these arguments.

    Args:
        source: a kind, or a reference to a callable or to a transfer set.
        arguments: for what the source names, by name.
        base: the folder that relative paths start from, usually the job file's.
    Raises:
        JobError: an argument that is unknown, missing or of the wrong type, or something that is no transfer set; and
        all that the source raises. ReferenceLoadError: the reference leads nowhere.
    """
    built_in = check_source(source) in KINDS
    make = load_reference(KINDS.get(source, source), base=base)
    if not callable(make):
        found = make
    else:
        _check_arguments(make, arguments, f"transfer set {source}", built_in=built_in)
        found = make(**arguments, **({BASE: base} if built_in else {}))
    if not all(hasattr(found, name) for name in ("name", "take", "__len__")):
        raise JobError(f"transfer set {source} gives a {type(found).__name__}, not a TransferSet (name, __len__, take)")
    return found  # type: ignore[no-any-return]


def _check_arguments(make: Callable[..., Any], arguments: Mapping[str, Any], what: str, *, built_in: bool) -> None:
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some callables written in C say nothing of theirs
        return
    keys = {p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    keys -= {BASE} if built_in else set()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in arguments:
        if key not in keys and not takes_any:
            near = get_close_matches(key, sorted(keys), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(sorted(keys)) or 'none'}"
            raise JobError(f"{what} has no argument `{key}`: {hint}", key=key)
    missing = [key for key in keys if parameters[key].default is inspect.Parameter.empty and key not in arguments]
    if missing:
        raise JobError(f"{what} lacks the argument `{sorted(missing)[0]}`: give it under `arguments`")
    if built_in:
        hints = get_type_hints(make)
        for key, value in arguments.items():
            _check_type(value, hints[key], f"{what}: `{key}`")


def _check_type(value: Any, hint: Any, where: str) -> None:
    kinds = tuple(get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)))
    fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    if not fits:
        names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
        raise JobError(f"{where} is {value!r}, it must be a {names}")
