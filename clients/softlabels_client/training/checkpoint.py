"""Checkpoints of a training and a student's weights as safetensors files, each written whole or not at all.

A checkpoint is one file, `step-000000001200.safetensors`. It holds every tensor of the training's state (the student's
weights under `state/student/`). Its metadata hold `softlabels.checkpoint`, the format; `run`, a digest of the weights
that the training began with; `step`; `document`, the rest of the state as JSON; and `blake2b`, a checksum over all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softlabels.atomic_files import TEMPORARY, atomic_path
from softlabels.errors import (
    CheckpointMismatchError,
    ChecksumError,
    ConflictError,
    FormatVersionError,
    ManifestError,
    RequestError,
)
from softlabels.extras import needs_extra

with needs_extra("torch", "saving a student or a checkpoint"):
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save_file, save_model
    from torch import Tensor, nn

FORMAT = "softlabels-checkpoint/3"
UNBOUND_FORMATS = ("softlabels-checkpoint/1", "softlabels-checkpoint/2")
"""Earlier formats, without run and step. Format 2 added the sums for the accuracy and left out the loader's state."""

TENSOR, TUPLE, DICT = "tensor", "tuple", "dict"
_FILE_NAME = re.compile(r"step-(\d{12})\.safetensors")


class CheckpointFolder:
    """The checkpoints of one training.

    Args:
        path: folder; made if it does not exist, but its parent must.
        every: optimizer steps between checkpoints; None writes one after each epoch. There is always one at the end.
        keep: newest checkpoints to keep; older ones are removed.
        resume: continue from the newest checkpoint. Without it, a folder that holds checkpoints is refused.
    Attributes:
        run: digest of what the training began with; checkpoints of different runs in one folder are refused.
    Raises:
        RequestError: a number out of range, or the parent folder does not exist.
        ConflictError: the folder holds checkpoints and `resume` is False.
    """

    def __init__(self, path: str | Path, *, every: int | None = None, keep: int = 3, resume: bool = False) -> None:
        for name, value in (("every", 1 if every is None else every), ("keep", keep)):
            if type(value) is not int or value < 1:
                raise RequestError(f"{name} is {value!r}; it must be an integer of 1 or more")
        self.path, self.every, self.resume = Path(path), every, resume
        self._keep, self.run = keep, ""
        if not self.path.parent.is_dir():
            raise RequestError(f"there is no folder {str(self.path.parent)!r} for the checkpoints: make it first")
        self.path.mkdir(exist_ok=True)
        for partial in self.path.glob(f".*{TEMPORARY}"):  # left by a process that was killed while it wrote
            partial.unlink(missing_ok=True)
        if self.steps and not resume:
            raise ConflictError(
                f"{str(self.path)!r} holds checkpoints of a training, the newest at step {self.steps[-1]}: resume it, "
                "or choose another folder"
            )

    @property
    def steps(self) -> list[int]:
        """Steps that there is a checkpoint of, in increasing order."""
        return sorted(int(found[1]) for entry in self.path.iterdir() if (found := _FILE_NAME.fullmatch(entry.name)))

    def write(self, step: int, state: Any) -> Path:
        """Write a checkpoint, then remove the oldest ones beyond `keep`.

        Args:
            step: optimizer steps done.
            state: a tree as `pack` takes it; RequestError is raised if it holds something else.
        """
        packed, tensors = pack(state)
        document = json.dumps(packed)
        metadata = {"softlabels.checkpoint": FORMAT, "run": self.run, "step": str(step), "document": document}
        metadata["blake2b"] = _checksum(metadata, tensors)
        path = self._path(step)
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata=metadata)
        # Only when the new one is in place, so that there is a whole checkpoint at every moment.
        for old in self.steps[: -self._keep]:
            self._path(old).unlink(missing_ok=True)
        return path

    def newest(self) -> Any:
        """Return the state of the newest checkpoint, or None without any.

        Raises:
            CheckpointMismatchError: it is that of another step than its name says, or the folder holds checkpoints of
                different runs.
            ChecksumError, ManifestError, FormatVersionError: as `read_checkpoint`.
        """
        steps = self.steps
        if not steps:
            return None
        path = self._path(steps[-1])
        saved = parse_checkpoint(path.read_bytes(), where=str(path))
        if saved.step not in (None, steps[-1]):
            raise CheckpointMismatchError(
                f"{path} is the checkpoint of step {saved.step}, under the name of another: a file was copied over it; "
                "remove it to resume from the checkpoint before it",
                differing=["step"],
            )
        for step in steps[:-1] if saved.run is not None else ():
            if _run_in(self._path(step)) not in (None, saved.run):
                raise CheckpointMismatchError(
                    f"{path} and {self._path(step).name} are of trainings that began with different weights: remove "
                    "those that do not belong here",
                    differing=["run"],
                )
        self.run = saved.run or ""
        return saved.state

    def _path(self, step: int) -> Path:
        return self.path / f"step-{step:012}.safetensors"


@dataclass(frozen=True)
class SavedCheckpoint:
    """Content of a checkpoint file; run and step are None in formats that do not hold them."""

    run: str | None
    step: int | None
    state: Any


def read_checkpoint(path: Path) -> Any:
    """Return the state in a checkpoint file; raises as `parse_checkpoint`."""
    return parse_checkpoint(path.read_bytes(), where=str(path)).state


def parse_checkpoint(raw: bytes, *, where: str) -> SavedCheckpoint:
    """Return what a checkpoint file's bytes hold, in memory of its own: a file may change after it was checked.

    Raises:
        ChecksumError, ManifestError: the file is damaged.
        FormatVersionError: a version of softlabels with another checkpoint format wrote it.
    """
    advice = f"{where} is damaged: remove it to resume from the checkpoint before it, or from the beginning"
    try:
        tensors = load(raw)
        metadata = _metadata(raw)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ManifestError(f"{advice} ({error})") from error
    written_as = metadata.get("softlabels.checkpoint")
    if written_as not in (FORMAT, *UNBOUND_FORMATS):
        raise FormatVersionError(
            f"{where} has the format {written_as!r}; this version of softlabels reads "
            f"{' and '.join(map(repr, (*UNBOUND_FORMATS, FORMAT)))}: upgrade softlabels, or choose another folder"
        )
    if metadata.get("blake2b") != _checksum(metadata, tensors):
        raise ChecksumError(advice)
    try:
        state = unpack(json.loads(metadata["document"]), tensors)
        if written_as in UNBOUND_FORMATS:
            return SavedCheckpoint(None, None, state)
        return SavedCheckpoint(metadata["run"], int(metadata["step"]), state)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestError(f"{advice} ({error!r})") from error


def save_student(student: nn.Module, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Save a student's weights, tied ones once, as safetensors with these metadata: the whole file or nothing.

    Raises:
        OSError: the folder does not exist, or the disk is full.
    """
    with atomic_path(Path(path)) as partial:
        save_model(student, str(partial), metadata=dict(metadata or {}))


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into JSON and tensors.

    Args:
        tree: tensors, numbers, strings, None, lists, tuples and dictionaries with string or integer keys, as every
            `state_dict` of torch is.
    Returns:
        What `json.dumps` takes, and the tensors by the names that it refers to: copies on the host, so that the
        training may go on while they are written.
    Raises:
        RequestError: the tree holds something else; the message names its path.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(tree, "state", tensors), tensors


def unpack(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that `pack` split: floats equal to the bit, tuples as tuples.

    Raises:
        ManifestError: the document refers to a tensor or a type that does not exist.
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
    raise ManifestError(f"the saved state refers to the {kind} {value!r}, which does not exist")


def _pack(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Tensor):
        if tree.layout != torch.strided or tree.is_complex():
            raise RequestError(f"{path} is a {tree.layout} tensor of {tree.dtype}: a checkpoint holds dense real ones")
        tensors[path] = tree.detach().to("cpu", copy=True).contiguous()
        return {TENSOR: path}
    if isinstance(tree, list | tuple):
        entries = [_pack(entry, f"{path}/{number}", tensors) for number, entry in enumerate(tree)]
        return entries if isinstance(tree, list) else {TUPLE: entries}
    if isinstance(tree, Mapping) and all(isinstance(key, int | str) for key in tree):
        # Pairs, because JSON would turn integer keys, as in an optimizer's state, into strings.
        return {DICT: [[key, _pack(entry, f"{path}/{key}", tensors)] for key, entry in tree.items()]}
    raise RequestError(
        f"{path} is a {type(tree).__name__}: a checkpoint holds tensors, numbers, strings, lists, tuples and "
        "dictionaries, so a training with this state cannot be resumed exactly"
    )


def weights_digest(student: nn.Module) -> str:
    """Return a digest of a student's weights: 32 hex digits."""
    document, tensors = pack(student.state_dict())
    return _checksum({"document": json.dumps(document)}, tensors)


def _metadata(raw: bytes) -> dict[str, Any]:
    """Return the metadata of a safetensors file that begins so."""
    found = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
    if not isinstance(found, dict):
        raise ValueError("metadata are no table")
    return found


def _run_in(path: Path) -> str | None:
    """Return the run of a checkpoint whose contents are not read; None if there is none, or it is damaged."""
    try:
        with path.open("rb") as file:
            size = file.read(8)
            run = _metadata(size + file.read(int.from_bytes(size, "little"))).get("run")
    except (OSError, ValueError, AttributeError, RecursionError, OverflowError, MemoryError):
        return None
    return run if isinstance(run, str) else None


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of a checkpoint of the format that its metadata name."""
    digest = hashlib.blake2b(digest_size=16)
    if metadata.get("softlabels.checkpoint", UNBOUND_FORMATS[0]) not in UNBOUND_FORMATS:
        bound = [str(metadata.get(name)) for name in ("softlabels.checkpoint", "run", "step")]
        digest.update(json.dumps(bound).encode())
    digest.update(str(metadata.get("document", "")).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
