"""What makes a view of a sample, so that the same arguments give the same bytes wherever it is made again?

A transform works on one sample at a time, on the host: a view must not depend on what else is in its batch, nor on the
device that a trainer happens to have. Two kinds exist: those whose random numbers follow from a seed
(`SeededTransform`) and those whose random numbers are written down and given back (`softlabels.views.recorded`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from softlabels.errors import JobError, SoftLabelsError
from softlabels.references import code_sha256, load_reference

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class ViewTransform(Protocol):
    """Makes views of single samples."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what is recorded of each view; empty where the seed says all."""
        ...

    @property
    def identity(self) -> str:
        """64 hex digits that change with the transform's code and settings."""
        ...

    @property
    def libraries(self) -> Mapping[str, str]:
        """Versions of the installed packages that the transform is made of."""
        ...

    @property
    def needs_main_thread(self) -> bool:
        """Whether making a view again draws from random generators that the whole process shares."""
        ...

    def draw(self, sample: Tensor, seed: int) -> NDArray[np.float64]:
        """What is recorded of a view, [parameters]."""
        ...

    def view(self, sample: Tensor, *, seed: int, parameters: NDArray[np.float64]) -> Tensor:
        """The view of a sample that this seed and these parameters make."""
        ...


class SeededTransform:
    """A callable whose random numbers come from torch, NumPy or Python's `random`: seeded before each view.

    One that takes a `generator` (a `torch.Generator`) is handed one of its own, which makes it safe in threads. All
    others draw from the generators of the whole process, which are given their states back afterwards: the transforms
    of torchvision v2 work like this.

    Args:
        transform: maps a sample, a tensor as the transfer set keeps it, to a view: a tensor or an array.
        arguments: that it was made with; they count for its identity.
    """

    parameters: tuple[str, ...] = ()

    def __init__(self, transform: Callable[..., Any], *, arguments: Mapping[str, Any] | None = None) -> None:
        self._transform = transform
        self._takes_generator = _takes_generator(transform)
        self.identity = transform_identity(transform, arguments or {})
        self.libraries = libraries_of(transform)

    @property
    def needs_main_thread(self) -> bool:
        """Whether it draws from generators that others in this process draw from, too."""
        return not self._takes_generator

    def draw(self, sample: Tensor, seed: int) -> NDArray[np.float64]:
        """Nothing: the seed says all."""
        return np.empty(0, dtype=np.float64)

    def view(self, sample: Tensor, *, seed: int, parameters: NDArray[np.float64]) -> Tensor:
        """The view of a sample that this seed makes. Raises JobError: the transform gives neither tensor nor array."""
        if self._takes_generator:
            return as_tensor(self._transform(sample, generator=torch.Generator().manual_seed(seed)), self._transform)
        with seeded(seed):
            return as_tensor(self._transform(sample), self._transform)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator that a transform may draw from, and give each its state back afterwards."""
    of_random, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # and not those of accelerators, which `manual_seed` reaches, too
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(of_random)
            np.random.set_state(of_numpy)


def as_tensor(made: Any, transform: object) -> Tensor:
    """What a transform gave, as a tensor on the host. Raises JobError: it is none."""
    if isinstance(made, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(made))
    if not isinstance(made, Tensor):
        raise JobError(
            f"the view transform {_name(transform)} gives a {type(made).__name__}: a view is a tensor or an array, as "
            "the teachers take it"
        )
    return made.detach().cpu()


def as_view_transform(transform: Any, *, arguments: Mapping[str, Any] | None = None) -> ViewTransform:
    """A transform of any kind behind the one interface.

    Args:
        transform: one with `draw` and `view` of its own, a kornia augmentation, whose parameters are recorded, or any
            callable from a sample to a view, which is seeded.
        arguments: that it was made with.
    Raises:
        JobError: nothing that makes views.
    """
    if callable(getattr(transform, "draw", None)) and callable(getattr(transform, "view", None)):
        return cast(ViewTransform, transform)
    if type(transform).__module__.partition(".")[0] == "kornia":
        from softlabels.views.recorded import RecordedTransform

        return RecordedTransform(transform, arguments=arguments)
    if not callable(transform):
        raise JobError(f"a {type(transform).__name__} makes no views: give a callable from a sample to a view")
    return SeededTransform(transform, arguments=arguments)


def load_view_transform(
    reference: str, *, arguments: Mapping[str, Any] | None = None, base: Path | None = None
) -> ViewTransform:
    """The transform that a reference makes.

    Args:
        reference: `package.module:name` or `file.py:name` of a function or class that is called with the arguments and
            gives the transform, or of a transform that is a torch module already.
        arguments: for that call.
        base: the folder that file references are relative to.
    Raises:
        ReferenceLoadError: it leads nowhere. JobError: it does not take the arguments, or gives no transform.
    """
    found = load_reference(reference, base=base)
    keywords = dict(arguments or {})
    if isinstance(found, nn.Module) or not callable(found):
        return as_view_transform(found, arguments=keywords)
    try:
        made = found(**keywords)
    except SoftLabelsError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise JobError(
            f"the view transform {reference!r} called with {keywords} failed with {type(error).__name__}: {error}; it "
            "is called once, and gives the callable that makes views"
        ) from error
    return as_view_transform(made, arguments=keywords)


def transform_identity(transform: object, arguments: Mapping[str, Any]) -> str:
    """64 hex digits over what a transform is: its name, its source file, and its settings as Python prints them."""
    maker = transform if inspect.isroutine(transform) else type(transform)
    settings = _ADDRESS.sub("", repr(_settings(transform)))
    text = "\0".join([_name(transform), _own_source(maker), settings, repr(sorted(arguments.items()))])
    return hashlib.sha256(text.encode()).hexdigest()


def libraries_of(transform: object) -> dict[str, str]:
    """Versions of the packages that a transform is made of: its own, and those that its module names."""
    maker: Any = transform if inspect.isroutine(transform) else type(transform)
    module = sys.modules.get(maker.__module__)
    parts = {maker.__module__, "torch", "numpy"}
    if isinstance(transform, nn.Module):
        parts |= {type(part).__module__ for part in transform.modules()}
    for found in vars(module).values() if module is not None else ():
        parts.add(found.__name__ if isinstance(found, ModuleType) else str(getattr(found, "__module__", "")))
    return versions_of(part.partition(".")[0] for part in parts)


def versions_of(packages: Any) -> dict[str, str]:
    """The versions of those packages that are installed, by name; what belongs to Python itself is left out.

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
        return _name(inner), _own_source(inner), transform.args, sorted(transform.keywords.items())
    if inspect.isfunction(transform):
        return [cell.cell_contents for cell in transform.__closure__ or ()], transform.__defaults__
    return sorted(getattr(transform, "__dict__", {}).items())


def _own_source(maker: Any) -> str:
    # What is installed as a library is named by its version instead.
    package = str(maker.__module__).partition(".")[0]
    return "" if versions_of([package]) else code_sha256(maker) or ""


def _name(transform: object) -> str:
    maker: Any = transform if inspect.isroutine(transform) else type(transform)
    # A file's module has a name that holds its path, which differs from machine to machine.
    module = re.sub(r"^softlabels_user_(.*)_[0-9a-f]{12}$", r"\1", str(maker.__module__))
    return f"{module}:{maker.__qualname__}"


def _takes_generator(transform: Callable[..., Any]) -> bool:
    try:
        return "generator" in inspect.signature(transform).parameters
    except (TypeError, ValueError):
        return False
