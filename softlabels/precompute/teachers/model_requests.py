"""Model requests and loaded models: what the registry of model sources asks a source for, and what it gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from softlabels.documents import Document, parse_document
from softlabels.errors import JobError
from softlabels.precompute.job import TeacherTable
from softlabels.precompute.teachers.checkpoints import read_state, weights_sha256
from softlabels.precompute.teachers.teacher import Gives

D = TypeVar("D", bound=Document)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model and what its source knows about it.

    Attributes:
        model: returns logits alone.
        sha256: digest of the file that it came from; None where the weights in memory are to be digested.
        weights: name of that file.
        code: the object that made it, where that has source code.
        revision: commit that a name on a hub was resolved to.
        class_names, last_layer, gives: as in `Teacher`.
        libraries: names of the libraries whose versions the manifest records.
    """

    model: nn.Module
    sha256: str | None = None
    weights: str | None = None
    code: Any = None
    revision: str | None = None
    class_names: tuple[str, ...] | None = None
    last_layer: nn.Module | None = None
    gives: Gives = "rows"
    libraries: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """A model to load.

    Attributes:
        location: what follows the kind and its colon in `model`: a file, or a name on a hub.
        table: the teacher's table in the job.
        base: folder that relative paths start from.
        device: torch device that the model is to run on.
        label: name of the teacher, for messages.
    """

    location: str
    table: TeacherTable
    base: Path
    device: torch.device
    label: str

    @property
    def path(self) -> Path:
        """The location as a file."""
        return self.base / self.location

    def settings(self, kind: type[D]) -> D:
        """Return the table's `arguments` as `kind`. Raises JobError, also where the table brings `weights`."""
        if self.table.weights is not None:
            raise JobError(f"{self.label}: {self.table.model} holds its own weights: leave `weights` out")
        return parse_document(dict(self.table.arguments), kind, what=f"{self.label}: arguments", error=JobError)

    def with_weights(self, loaded: LoadedModel) -> LoadedModel:
        """Return the model with the weights that the job brings, if any. Raises JobError if they do not fit."""
        if self.table.weights is None:
            return loaded
        path = self.base / self.table.weights
        state = read_state(path, label=self.label)
        try:
            loaded.model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise JobError(f"{self.label}: {path.name} does not fit the model: {error}") from error
        return replace(loaded, sha256=weights_sha256(path), weights=path.name)
