"""How is a student kept? As safetensors, the whole file or none."""

from __future__ import annotations

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

from softlabels_client.training.whole_files import whole_file


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
