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

from softlabels_client.training.tensor_trees import pack, unpack
from softlabels_client.training.whole_files import PARTIAL, whole_file

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
        """Keep a state, a tree as `softlabels_client.training.tensor_trees` says; then remove what is too old.

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
