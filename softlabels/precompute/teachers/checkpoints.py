"""Weights files, read without running code in them: safetensors, sharded safetensors, and `torch.save` checkpoints.

A checkpoint is a pickle, which can run code. PyTorch's `weights_only` reader builds tensors and plain containers and
refuses everything else. `state_of_pickled_module` reads even a whole pickled module that way: each class that it names
is replaced by an empty one, so that none of its code is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from softlabels.atomic_files import sha256_of
from softlabels.errors import JobError

INDEX_SUFFIX = ".safetensors.index.json"
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPED_IN = ("state_dict", "model_state_dict", "model")
"""Keys of the weights in trainers' checkpoints: Lightning, PyTorch's tutorial, timm, detectron."""

_PARALLEL = "module."
"""DataParallel's prefix of every name."""

_UNREADABLE = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, OSError, EOFError)
"""Exceptions that damaged or foreign bytes raise in torch.load."""

State = dict[str, Tensor]


def read_state(path: Path, *, label: str) -> State:
    """Return the weights in a file, by name.

    Args:
        path: `.safetensors`, `.safetensors.index.json` with its parts beside it, or `.pt`, `.pth`, `.bin`, `.ckpt`.
        label: name of the teacher, for messages.
    Raises:
        JobError: the file is missing, damaged, of another kind, or holds more than weights.
    """
    try:
        return _read_any(path, label=label)
    except _PickledCodeError as error:
        raise JobError(
            f"{label}: {path.name} holds more than weights (a module pickled whole, or a trainer's own objects), and "
            "loading that runs whatever code is in it, so it is refused: convert it once with `softlabels "
            f"convert-weights {path} {path.with_suffix('.safetensors')}`, which runs none of it"
        ) from error


def weights_sha256(path: Path) -> str:
    """Return the SHA-256 of a weights file; of an index, over names and digests of the index and of every part."""
    if not path.name.endswith(INDEX_SUFFIX):
        return sha256_of(path)
    return files_sha256([path, *(path.parent / part for part in _parts_of(path))])


def files_sha256(paths: Iterable[Path]) -> str:
    """Return the SHA-256 over names and digests of several files, in this order."""
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.name}|{sha256_of(path)}|".encode())
    return total.hexdigest()


def state_of_pickled_module(path: Path) -> State:
    """Return the weights of a module that was pickled whole, without importing or running any of its code.

    Raises:
        JobError: the file is not from `torch.save`, or holds no module.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # One empty class for each name in the file; the class of that name is never looked up.
        placeholders = [(type("Placeholder", (_Placeholder,), {}), name) for name in names]
        # PyTorch documents pairs of class and name; its annotation has classes alone.
        with torch.serialization.safe_globals(cast("list[Any]", placeholders)):
            found = _load_weights_only(path)
    except (*_UNREADABLE, _PickledCodeError) as error:
        raise JobError(
            f"{path} cannot be read without running what is in it ({str(error).splitlines()[0]}): load it where you "
            "trust it, and save `model.state_dict()`"
        ) from error
    nested = next((found[key] for key in _WRAPPED_IN if isinstance(found, Mapping) and key in found), None)
    if isinstance(nested, Mapping):  # a trainer's checkpoint: weights by name, beside objects of its own
        return _weights_in(nested, path.name, str(path))
    modules = (part for part in _containers(found) if isinstance(part, _Placeholder) and "_modules" in vars(part))
    module = next(modules, None)
    if module is None:
        raise JobError(f"{path} holds no weights and no module")
    return _state_of(module, "")


def convert_checkpoint(source: Path, destination: Path) -> State:
    """Write the weights of a checkpoint, or of a module pickled whole, as a safetensors file; return them.

    Raises:
        JobError: the file holds no weights, or the destination exists.
    """
    if destination.exists():
        raise JobError(f"{destination} exists: name another file")
    if destination.suffix != ".safetensors":
        raise JobError(f"{destination} must end in .safetensors")
    if not source.is_file():
        raise JobError(f"there is no file {source}")
    try:
        state = _read_any(source, label=str(source))
    except _PickledCodeError:
        state = state_of_pickled_module(source)
    # Cloned, because safetensors refuses two names that share memory, and modules with tied weights need both.
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, destination)
    return state


class _PickledCodeError(Exception):
    """The file names classes or functions, which unpickling would import and run."""


class _Placeholder:
    """Replaces any class that a pickled file names."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __new__(cls, *_arguments: Any) -> _Placeholder:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            vars(self).update(state)


def _read_any(path: Path, *, label: str) -> State:
    if not path.is_file():
        raise JobError(f"{label}: there is no weights file {path}")
    try:
        if path.name.endswith(INDEX_SUFFIX):
            return _read_parts(path)
        if path.suffix == ".safetensors":
            return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(f"{label}: {path.name} cannot be read: {error}") from error
    if path.suffix in CHECKPOINT_SUFFIXES:
        return _read_checkpoint(path, label)
    raise JobError(
        f"{label}: {path.name} is no safetensors file and no checkpoint: weights are read from .safetensors, "
        f"{INDEX_SUFFIX}, {', '.join(CHECKPOINT_SUFFIXES)}"
    )


def _read_parts(index: Path) -> State:
    state: State = {}
    for part in _parts_of(index):
        if not (index.parent / part).is_file():
            raise ValueError(f"it names {part}, which is not beside it")
        state.update(load_file(index.parent / part))
    missing = set(json.loads(index.read_text())["weight_map"]) - set(state)
    if missing:
        raise ValueError(f"its parts lack {', '.join(sorted(missing)[:5])}")
    return state


def _parts_of(index: Path) -> list[str]:
    parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for part in parts:
        # An index may come from anyone: it must not name a file outside its own folder.
        if Path(part).name != part:
            raise ValueError(f"it names {part!r}, which is no file beside it")
    return parts


def _read_checkpoint(path: Path, label: str) -> State:
    try:
        found = _load_weights_only(path)
    except _UNREADABLE as error:
        raise JobError(f"{label}: {path.name} is no checkpoint that can be read: {error}") from error
    return _weights_in(found, path.name, label)


def _load_weights_only(path: Path) -> Any:
    try:
        # The one call in this product: `weights_only` builds tensors and plain containers, and runs nothing.
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:
        # By name, because its class lives in a module that nothing here imports.
        if type(error).__name__ != "UnpicklingError":
            raise
        raise _PickledCodeError(str(error)) from error


def _weights_in(found: Any, file: str, label: str) -> State:
    for key in _WRAPPED_IN:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        inside = ", ".join(map(str, list(found)[:8])) if isinstance(found, Mapping) else type(found).__name__
        raise JobError(
            f"{label}: {file} holds no table of weights by name but {inside or 'nothing'}: save `model.state_dict()`"
        )
    state = {str(name): value for name, value in found.items()}
    if all(name.startswith(_PARALLEL) for name in state):
        state = {name.removeprefix(_PARALLEL): value for name, value in state.items()}
    return state


def _containers(value: Any) -> Iterable[Any]:
    """Yield the value and everything that containers and placeholders in it hold, breadth first."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop(0)
        # Pickled objects may refer to each other in cycles.
        if id(part) in seen or isinstance(part, Tensor | str | int | float):
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part
        elif isinstance(part, _Placeholder):
            waiting += vars(part).values()


def _state_of(module: Any, prefix: str) -> State:
    """Return the `state_dict` of a pickled module: parameters, persistent buffers, and those of its submodules."""
    inside = vars(module)
    not_persistent = inside.get("_non_persistent_buffers_set", ())
    own = {**inside.get("_parameters", {}), **inside.get("_buffers", {})}
    state = {prefix + name: tensor for name, tensor in own.items() if tensor is not None and name not in not_persistent}
    for name, part in inside.get("_modules", {}).items():
        if part is not None:
            state.update(_state_of(part, f"{prefix}{name}."))
    return state
