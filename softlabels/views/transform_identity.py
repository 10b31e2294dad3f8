"""Identity of a view transform: a digest of its code and settings, and the versions of its libraries."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from softlabels.references import code_sha256

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def transform_identity(transform: object, arguments: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a transform's name, its source file and its settings as Python prints them."""
    maker = transform if inspect.isroutine(transform) else type(transform)
    settings = _ADDRESS.sub("", repr(_settings(transform)))
    text = "\0".join([qualified_name(transform), _own_source(maker), settings, repr(sorted(arguments.items()))])
    return hashlib.sha256(text.encode()).hexdigest()


def libraries_of(transform: object) -> dict[str, str]:
    """Return the versions of a transform's package and of the packages whose names its module holds."""
    maker: Any = transform if inspect.isroutine(transform) else type(transform)
    module = sys.modules.get(maker.__module__)
    parts = {maker.__module__, "torch", "numpy"}
    if isinstance(transform, nn.Module):
        parts |= {type(part).__module__ for part in transform.modules()}
    for found in vars(module).values() if module is not None else ():
        parts.add(found.__name__ if isinstance(found, ModuleType) else str(getattr(found, "__module__", "")))
    return versions_of(part.partition(".")[0] for part in parts)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of installed packages by name, without Python's standard library.

    Builds of one version (`+cpu`, `+cu130`) count as the same: they run the same code on the host.
    """
    found = {}
    for package in sorted(set(packages) - set(sys.stdlib_module_names)):
        try:
            found[package] = importlib.metadata.version(package).partition("+")[0]
        except (importlib.metadata.PackageNotFoundError, ValueError):
            continue
    return found


def _settings(transform: Any) -> Any:
    if isinstance(transform, nn.Module):
        return transform
    if isinstance(transform, functools.partial):
        inner = transform.func
        return qualified_name(inner), _own_source(inner), transform.args, sorted(transform.keywords.items())
    if inspect.isfunction(transform):
        return [cell.cell_contents for cell in transform.__closure__ or ()], transform.__defaults__
    return sorted(getattr(transform, "__dict__", {}).items())


def _own_source(maker: Any) -> str:
    # Installed libraries count by their version instead.
    package = str(maker.__module__).partition(".")[0]
    return "" if versions_of([package]) else code_sha256(maker) or ""


def qualified_name(transform: object) -> str:
    """Return `module:name` of a transform, the same on every machine."""
    maker: Any = transform if inspect.isroutine(transform) else type(transform)
    # A module loaded from a file has a name with a digest of its path, which differs between machines.
    module = re.sub(r"^softlabels_user_(.*)_[0-9a-f]{12}$", r"\1", str(maker.__module__))
    return f"{module}:{maker.__qualname__}"
