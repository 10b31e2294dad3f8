"""What makes a view of a sample, so that the same arguments give the same bytes wherever it is made again?

A transform works on one sample at a time, on the host: a view must not depend on what else is in its batch, nor on the
device that a trainer happens to have. Two kinds exist: those whose random numbers follow from a seed
(`SeededTransform`) and those whose random numbers are written down and given back (`softlabels.views.transforms`).
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
from softlabels.ids import IdArray
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


_EXACT = 1 << 53
"""Whole numbers up to here are float64 exactly; float32 and bool always are."""


class RecordedTransform:
    """A kornia augmentation, or an `AugmentationSequential` of them, with the parameters of every view recorded.

    Args:
        augmentation: takes float tensors [1, channels, height, width]; the samples are [channels, height, width],
            float or uint8, which becomes 0 … 1.
        arguments: that it was made with; they count for its identity.
    """

    needs_main_thread = False

    def __init__(self, augmentation: Any, *, arguments: Mapping[str, Any] | None = None) -> None:
        if not hasattr(augmentation, "forward_parameters"):
            raise JobError(
                f"kornia's {type(augmentation).__name__} does not say what it draws, so its views cannot be recorded: "
                "use an AugmentationSequential of augmentations"
            )
        self._augmentation = augmentation
        self.identity = transform_identity(augmentation, arguments or {})
        self.libraries = libraries_of(augmentation)
        self._columns: tuple[str, ...] | None = None
        self._like: Any = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the columns; known once a first view was drawn or `probe` was called."""
        if self._columns is None:
            raise JobError("what this augmentation draws is known when it has seen a sample: call `probe` first")
        return self._columns

    def probe(self, sample: Tensor) -> None:
        """Find out what is drawn for a sample of this shape."""
        if self._columns is None:
            with seeded(0):
                self._like = self._drawn(sample)
            self._columns = tuple(name for name, _ in _leaves(self._like))

    def draw(self, sample: Tensor, seed: int) -> NDArray[np.float64]:
        """The parameters of the view with this seed, [parameters].

        Raises:
            JobError: another number of them than for the samples before, or numbers that float64 does not hold.
        """
        self.probe(sample)
        with seeded(seed):
            drawn = dict(_leaves(self._drawn(sample)))
        if tuple(drawn) != self._columns:
            raise JobError(
                "this augmentation draws other parameters for another sample (random_apply, or inputs of several "
                "sizes), which no store of equal rows holds: wrap it in a function, and its views are seeded instead"
            )
        return np.array([_exact(name, value) for name, value in drawn.items()], dtype=np.float64)

    def view(self, sample: Tensor, *, seed: int, parameters: NDArray[np.float64]) -> Tensor:
        """The view of a sample that these parameters make."""
        self.probe(sample)
        columns: tuple[str, ...] = self.parameters
        given = _filled(self._like, dict(zip(columns, parameters.tolist(), strict=True)))
        with torch.no_grad():
            made: Tensor = self._augmentation(_as_image(sample)[None], params=given)
        return made[0]

    def _drawn(self, sample: Tensor) -> Any:
        return self._augmentation.forward_parameters(torch.Size((1, *_as_image(sample).shape)))


def _as_image(sample: Tensor) -> Tensor:
    if sample.ndim != 3 or not (sample.is_floating_point() or sample.dtype == torch.uint8):
        raise JobError(
            f"kornia augments images [channels, height, width], float or uint8; a sample is {sample.dtype} "
            f"{list(sample.shape)}: have the transfer set give such images"
        )
    return sample.float() / 255 if sample.dtype == torch.uint8 else sample


def _leaves(drawn: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every single number of what kornia drew, by the name of its column."""
    if isinstance(drawn, Tensor):
        for place, value in enumerate(drawn.flatten().tolist()):
            yield f"{path}.{place}", float(value)
    elif isinstance(drawn, Mapping):
        for name in sorted(drawn):
            yield from _leaves(drawn[name], f"{path}/{name}" if path else str(name))
    elif isinstance(drawn, list):
        for item in drawn:
            yield from _leaves(item.data, f"{path}/{item.name}" if path else str(item.name))
    elif drawn is not None:
        raise JobError(f"kornia drew a {type(drawn).__name__} for {path!r}, which no column of numbers holds")


def _filled(like: Any, values: Mapping[str, float], path: str = "") -> Any:
    """What kornia drew, with other numbers in the same places."""
    if isinstance(like, Tensor):
        numbers = [values[f"{path}.{place}"] for place in range(like.numel())]
        return torch.tensor(numbers, dtype=torch.float64).to(like.dtype).reshape(like.shape)
    if isinstance(like, Mapping):
        return {name: _filled(like[name], values, f"{path}/{name}" if path else str(name)) for name in like}
    if isinstance(like, list):
        return [
            item._replace(data=_filled(item.data, values, f"{path}/{item.name}" if path else str(item.name)))
            for item in like
        ]
    return like


def _exact(name: str, value: float) -> float:
    if value.is_integer() and abs(value) > _EXACT:
        raise JobError(
            f"{name} is {value:g}, which float64 does not hold exactly: this augmentation cannot be recorded"
        )
    return value


def view_seeds(key: str, ids: IdArray, views_B: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The seed of each view, by counter and not by sequence: a resumed or reordered run draws the same ones.

    Args:
        key: the store's `views.seed_key`.
        ids: [B] sample ids.
        views_B: [B] the views' numbers, from 0.
    Returns:
        uint64, shape [B], below 2^63 so that every library takes them: BLAKE2b of key, id and view.
    """
    seeds = np.empty(len(ids), dtype=np.uint64)
    for row, (sample_id, view) in enumerate(zip(ids.tolist(), views_B.tolist(), strict=True)):
        kind = "i" if isinstance(sample_id, int) else "s"
        text = f"{key}\0{kind}{sample_id}\0{view}".encode()
        seeds[row] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    return seeds
