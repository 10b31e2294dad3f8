"""View transforms: augmentations that make the same view of a sample again, bit for bit.

A transform works on one sample at a time, on the host: a view must not depend on the other samples of its batch or on
the trainer's device. There are two kinds. A `SeededTransform` draws its random numbers from a seed. A
`RecordedTransform` (kornia) stores the numbers that were drawn as named columns of float64: kornia draws all parameters
of an augmentation before it applies them, and accepts stored ones instead, so nothing random is left in a replay.

A store records the transform's identity, a digest of its code and settings, and the versions of its libraries: with
other code a replay would give other views than the teachers saw.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """An augmentation of single samples.

    Attributes:
        identity: 64 hex digits that change with the transform's code and settings.
        libraries: versions of the installed packages that the transform uses.
        needs_main_thread: whether a replay draws from random generators that the whole process shares.
    """

    identity: str
    libraries: Mapping[str, str]
    needs_main_thread: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the numbers recorded for each view; empty if the seed determines the view."""
        ...

    def draw(self, sample: Tensor, seed: int) -> NDArray[np.float64]:
        """Return the numbers to record for the view with this seed, [parameters]."""
        ...

    def view(self, sample: Tensor, *, seed: int, parameters: NDArray[np.float64]) -> Tensor:
        """Return the view of a sample with this seed and these parameters."""
        ...


class SeededTransform:
    """A callable with random numbers from torch, NumPy or Python's `random`, which are seeded before each view.

    A callable that takes a `generator` (a `torch.Generator`) gets its own, which makes it safe in threads. All others
    draw from the generators of the whole process, whose states are restored afterwards; torchvision v2 works like this.

    Args:
        transform: maps a sample, a tensor as in the transfer set, to a view, a tensor or an array.
        arguments: arguments that it was made with, as a part of its identity.
    """

    parameters: tuple[str, ...] = ()

    def __init__(self, transform: Callable[..., Any], *, arguments: Mapping[str, Any] | None = None) -> None:
        self._transform = transform
        try:
            self.needs_main_thread = "generator" not in inspect.signature(transform).parameters
        except (TypeError, ValueError):  # a callable without a signature
            self.needs_main_thread = True
        self.identity = transform_identity(transform, arguments or {})
        self.libraries = libraries_of(transform)

    def draw(self, sample: Tensor, seed: int) -> NDArray[np.float64]:
        """Return no numbers: the seed determines the view."""
        return np.empty(0, dtype=np.float64)

    def view(self, sample: Tensor, *, seed: int, parameters: NDArray[np.float64]) -> Tensor:
        """Return the view with this seed. Raise JobError if the transform returns neither a tensor nor an array."""
        if self.needs_main_thread:
            with seeded(seed):
                made = self._transform(sample)
        else:
            made = self._transform(sample, generator=torch.Generator().manual_seed(seed))
        if isinstance(made, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(made))
        if not isinstance(made, Tensor):
            raise JobError(
                f"the view transform {qualified_name(self._transform)} returns a {type(made).__name__}: a view is a "
                "tensor or an array, as the teachers take it"
            )
        return made.detach().cpu()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator that a transform may draw from, and restore their states afterwards."""
    of_random, of_numpy = random.getstate(), np.random.get_state()
    # Views are made on the host (docs/adr/0013), so the generators of accelerators are left alone.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed accelerators
        random.seed(seed)
        # NumPy takes seeds of 32 bits; view seeds have 63.
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(of_random)
            np.random.set_state(of_numpy)


_EXACT = 1 << 53
"""float64 holds integers up to here exactly; float32 and bool values always."""


class RecordedTransform:
    """A kornia augmentation, or an `AugmentationSequential` of them, with the parameters of every view recorded.

    Args:
        augmentation: takes float tensors [1, channels, height, width]; samples are [channels, height, width], float,
            or uint8 that is scaled to 0 … 1. Parameters are drawn for batches of one, independent of other samples.
        arguments: arguments that it was made with, as a part of its identity.
    """

    needs_main_thread = False

    def __init__(self, augmentation: Any, *, arguments: Mapping[str, Any] | None = None) -> None:
        if not hasattr(augmentation, "forward_parameters"):
            raise JobError(
                f"kornia's {type(augmentation).__name__} does not return its parameters, so its views cannot be "
                "recorded: use an AugmentationSequential of augmentations"
            )
        self._augmentation = augmentation
        self.identity = transform_identity(augmentation, arguments or {})
        self.libraries = libraries_of(augmentation)
        self._columns: tuple[str, ...] | None = None
        self._like: Any = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the columns, known after `probe` or `draw`."""
        if self._columns is None:
            raise JobError("the parameters of this augmentation are known after a first sample: call `probe` first")
        return self._columns

    def probe(self, sample: Tensor) -> None:
        """Determine the parameters that are drawn for a sample of this shape."""
        if self._columns is None:
            with seeded(0):
                self._like = self._drawn(sample)
            self._columns = tuple(name for name, _ in _leaves(self._like))

    def draw(self, sample: Tensor, seed: int) -> NDArray[np.float64]:
        """Return the parameters of the view with this seed, [parameters].

        Raises:
            JobError: other parameters than for earlier samples, or numbers that float64 does not hold.
        """
        self.probe(sample)
        with seeded(seed):
            drawn = dict(_leaves(self._drawn(sample)))
        if tuple(drawn) != self._columns:
            raise JobError(
                "this augmentation draws other parameters for other samples (random_apply, or inputs of several sizes),"
                " which do not fit into equal rows: wrap it in a function, and its views are seeded instead"
            )
        for name, value in drawn.items():
            if value.is_integer() and abs(value) > _EXACT:
                raise JobError(
                    f"{name} is {value:g}, which float64 does not hold exactly: this augmentation cannot be recorded"
                )
        return np.array(list(drawn.values()), dtype=np.float64)

    def view(self, sample: Tensor, *, seed: int, parameters: NDArray[np.float64]) -> Tensor:
        """Return the view of a sample with these parameters."""
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
            f"{list(sample.shape)}: the transfer set has to return such images"
        )
    return sample.float() / 255 if sample.dtype == torch.uint8 else sample


def _leaves(drawn: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield each number that kornia drew, with the name of its column."""
    if isinstance(drawn, Tensor):
        for index, value in enumerate(drawn.flatten().tolist()):
            yield f"{path}.{index}", float(value)
    elif isinstance(drawn, Mapping | list):
        named = sorted(drawn.items()) if isinstance(drawn, Mapping) else [(item.name, item.data) for item in drawn]
        for name, value in named:
            yield from _leaves(value, f"{path}/{name}" if path else str(name))
    elif drawn is not None:
        raise JobError(f"kornia drew a {type(drawn).__name__} for {path!r}, which no column of numbers holds")


def _filled(like: Any, values: Mapping[str, float], path: str = "") -> Any:
    """Return kornia's parameters with other numbers."""
    if isinstance(like, Tensor):
        numbers = [values[f"{path}.{index}"] for index in range(like.numel())]
        return torch.tensor(numbers, dtype=torch.float64).to(like.dtype).reshape(like.shape)
    if isinstance(like, Mapping):
        return {name: _filled(like[name], values, f"{path}/{name}" if path else str(name)) for name in like}
    if isinstance(like, list):
        return [
            item._replace(data=_filled(item.data, values, f"{path}/{item.name}" if path else str(item.name)))
            for item in like
        ]
    return like


def view_seeds(key: str, ids: IdArray, views_B: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the seed of each view, a function of key, id and view: a resumed or reordered run uses the same seeds.

    Args:
        key: `views.seed_key` of the store.
        ids: sample ids, shape [B].
        views_B: view numbers from 0, shape [B].
    Returns:
        uint64, shape [B]: BLAKE2b of key, id and view, below 2^63, which every library accepts.
    """
    seeds = np.empty(len(ids), dtype=np.uint64)
    for row, (sample_id, view) in enumerate(zip(ids.tolist(), views_B.tolist(), strict=True)):
        kind = "i" if isinstance(sample_id, int) else "s"
        text = f"{key}\0{kind}{sample_id}\0{view}".encode()
        seeds[row] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    return seeds


def as_view_transform(transform: Any, *, arguments: Mapping[str, Any] | None = None) -> ViewTransform:
    """Return a transform of any kind as a `ViewTransform`; raise JobError if it is none.

    Args:
        transform: an object with `draw` and `view`; a kornia augmentation, whose parameters are recorded; or any
            callable from a sample to a view, which is seeded.
        arguments: arguments that it was made with.
    """
    if callable(getattr(transform, "draw", None)) and callable(getattr(transform, "view", None)):
        return cast(ViewTransform, transform)
    if type(transform).__module__.partition(".")[0] == "kornia":
        return RecordedTransform(transform, arguments=arguments)
    if not callable(transform):
        raise JobError(f"a {type(transform).__name__} is no view transform: give a callable from a sample to a view")
    return SeededTransform(transform, arguments=arguments)


def load_view_transform(
    reference: str, *, arguments: Mapping[str, Any] | None = None, base: Path | None = None
) -> ViewTransform:
    """Return the transform that a reference names.

    Args:
        reference: `package.module:name` or `file.py:name` of a function or class that returns the transform, or of a
            transform that is a torch module.
        arguments: arguments of that function or class.
        base: folder that file references are relative to.
    Raises:
        ReferenceLoadError: nothing there. JobError: wrong arguments, or no transform.
    """
    found = load_reference(reference, base=base)
    keywords = dict(arguments or {})
    if isinstance(found, nn.Module) or not callable(found):
        return as_view_transform(found, arguments=keywords)
    try:
        made = found(**keywords)
    except SoftLabelsError:
        raise
    except Exception as error:  # user code may raise anything
        raise JobError(
            f"the view transform {reference!r} called with {keywords} failed with {type(error).__name__}: {error}; it "
            "is called once and returns the callable that makes views"
        ) from error
    return as_view_transform(made, arguments=keywords)


def transform_identity(transform: object, arguments: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a transform's name, its source file and its settings as Python prints them."""
    maker = transform if inspect.isroutine(transform) else type(transform)
    settings = _ADDRESS.sub("", repr(_settings(transform)))
    text = "\0".join([qualified_name(transform), _own_source(maker), settings, repr(sorted(arguments.items()))])
    return hashlib.sha256(text.encode()).hexdigest()


def libraries_of(transform: object) -> Mapping[str, str]:
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
