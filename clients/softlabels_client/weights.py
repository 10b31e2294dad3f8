"""How is a student kept? As safetensors, the whole file or none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from softlabels.errors import MissingExtraError

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
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_model(student, str(partial), metadata=dict(metadata or {}))
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
