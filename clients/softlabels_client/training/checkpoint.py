"""Where does an interrupted training go on? Checkpoints in a folder: safetensors files that are whole or not there.

A checkpoint is one file, `step-000000001200.safetensors`: every tensor of the training's state (the student's weights
under `state/student/`), and in its metadata `softlabels.checkpoint`, the form, `document`, the rest of the state as
JSON, and `blake2b`, a checksum over both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softlabels.errors import (
    ChecksumError,
    ConflictError,
    FormatVersionError,
    ManifestError,
    MissingExtraError,
    RequestError,
)

try:
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
    from torch import Tensor
except ImportError as error:
    raise MissingExtraError(
        "keeping checkpoints needs torch and safetensors, which are not installed: `pip install softlabels[torch]`",
        extra="torch",
    ) from error

import os
from collections.abc import Iterator
from contextlib import contextmanager

from softlabels.errors import MissingExtraError

FORMAT = "softlabels-checkpoint/1"
_NAME = re.compile(r"step-(\d{12})\.safetensors")


class CheckpointFolder:
    """A training's checkpoints, for one training at a time.

    Args:
        path: the folder; made where it is missing, its parent must be there.
        every: steps between checkpoints; None for one after each epoch. There is always one at the end.
        keep: how many are kept, the newest; older ones are removed.
        resume: go on where the newest stands. Without it, a folder that holds checkpoints is refused.
    Raises:
        RequestError: a number out of range, or there is no parent.
        ConflictError: the folder holds checkpoints, and nobody said `resume`.
    """

    def __init__(self, path: str | Path, *, every: int | None = None, keep: int = 3, resume: bool = False) -> None:
        for name, value in (("every", 1 if every is None else every), ("keep", keep)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(f"{name} is {value!r}; it is a whole number of 1 or more")
        self.path, self.every, self.resume = Path(path), every, resume
        self._keep = keep
        if not self.path.parent.is_dir():
            raise RequestError(f"there is no folder {str(self.path.parent)!r} to keep checkpoints in: make it first")
        self.path.mkdir(exist_ok=True)
        for partial in self.path.glob(f".*{PARTIAL}"):  # of a process that was killed while it wrote
            partial.unlink(missing_ok=True)
        if self.steps and not resume:
            raise ConflictError(
                f"{str(self.path)!r} holds checkpoints of a training, the newest at step {self.steps[-1]}: say that it "
                "is to be resumed, or choose another folder"
            )

    @property
    def steps(self) -> list[int]:
        """After how many steps there is a checkpoint, the newest last."""
        return sorted(int(found[1]) for entry in self.path.iterdir() if (found := _NAME.fullmatch(entry.name)))

    def write(self, step: int, state: Any) -> Path:
        """Keep a state, a tree as `softlabels_client.training.checkpoint` says; then remove what is too old.

        Raises:
            RequestError: the state holds what cannot be kept. OSError: the disk is full.
        """
        packed, tensors = pack(state)
        document = json.dumps(packed)
        metadata = {"softlabels.checkpoint": FORMAT, "document": document, "blake2b": _checksum(document, tensors)}
        path = self._path(step)
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata=metadata)
        for old in self.steps[: -self._keep]:
            self._path(old).unlink(missing_ok=True)
        return path

    def newest(self) -> Any:
        """The state that was kept last, None where there is none.

        Raises:
            ChecksumError, ManifestError: the file is damaged; without it the one before would be taken.
            FormatVersionError: a newer softlabels wrote it.
        """
        return read_checkpoint(self._path(self.steps[-1])) if self.steps else None

    def _path(self, step: int) -> Path:
        return self.path / f"step-{step:012}.safetensors"


def read_checkpoint(path: Path) -> Any:
    """The state in a checkpoint's file; raises as `CheckpointFolder.newest` does."""
    advice = f"{path} is damaged: remove it, and the training goes on from the checkpoint before, or from its beginning"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("softlabels.checkpoint") != FORMAT:
                raise FormatVersionError(
                    f"{path} is of the form {metadata.get('softlabels.checkpoint')!r}, this softlabels knows "
                    f"{FORMAT!r}: upgrade, or choose another folder"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ManifestError(f"{advice} ({error})") from error
    document = metadata.get("document", "")
    if metadata.get("blake2b") != _checksum(document, tensors):
        raise ChecksumError(advice)
    return unpack(json.loads(document), tensors)


def _checksum(document: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(document.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise MissingExtraError(
        "keeping a training's state needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

TENSOR, TUPLE, DICT = "tensor", "tuple", "dict"


def pack(tree: Any, *, path: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """A tree as JSON and tensors.

    Returns:
        What `json.dumps` takes, and the tensors by the names that stand in it: copies in the host's memory, so that
        they stay what they are while the training goes on.
    Raises:
        RequestError: something that is none of these things, named by its path.
    """
    tensors: dict[str, Tensor] = {}
    return _packed(tree, path, tensors), tensors


def unpack(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `pack` was given.

    Raises:
        ManifestError: what was kept is no such tree.
    """
    if isinstance(document, list):
        return [unpack(entry, tensors) for entry in document]
    if not isinstance(document, dict):
        return document
    ((kind, value),) = document.items()
    if kind == TENSOR and value in tensors:
        return tensors[value]
    if kind == TUPLE:
        return tuple(unpack(entry, tensors) for entry in value)
    if kind == DICT:
        return {key: unpack(entry, tensors) for key, entry in value}
    raise ManifestError(f"a kept state names the {kind} {value!r}, which is not there")


def _packed(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Tensor):
        _refuse_unkeepable(tree, path)
        tensors[path] = tree.detach().to("cpu", copy=True).contiguous()
        return {TENSOR: path}
    if isinstance(tree, list | tuple):
        entries = [_packed(entry, f"{path}/{number}", tensors) for number, entry in enumerate(tree)]
        return entries if isinstance(tree, list) else {TUPLE: entries}
    if isinstance(tree, Mapping) and all(isinstance(key, int | str) for key in tree):
        return {DICT: [[key, _packed(entry, f"{path}/{key}", tensors)] for key, entry in tree.items()]}
    raise RequestError(
        f"{path} is a {type(tree).__name__}: a checkpoint keeps tensors, numbers, words, lists, tuples and "
        "dictionaries, so a training with this state cannot be resumed exactly"
    )


def _refuse_unkeepable(tensor: Tensor, path: str) -> None:
    if tensor.layout != torch.strided or tensor.is_complex():
        raise RequestError(f"{path} is a {tensor.layout} tensor of {tensor.dtype}: a checkpoint keeps dense real ones")


PARTIAL = ".partial"
"""Ending of a file that is still being written."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the block a place to write to; what it wrote is at `path` once it ends well, and nowhere otherwise.

    Raises:
        OSError: the folder does not exist, or the disk is full; what was at `path` before is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


try:
    from safetensors.torch import save_model
    from torch import nn
except ImportError as error:
    raise MissingExtraError(
        "keeping a student's weights needs torch and safetensors, which are not installed: `pip install "
        "softlabels[torch]`",
        extra="torch",
    ) from error


def save_student(student: nn.Module, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Keep a student's weights as safetensors: the whole file or none, whatever is interrupted.

    Args:
        student: tied weights are kept once.
        path: replaced where it exists.
        metadata: short facts to keep with the weights.
    Raises:
        OSError: the folder does not exist, or the disk is full.
    """
    with whole_file(Path(path)) as partial:
        save_model(student, str(partial), metadata=dict(metadata or {}))
