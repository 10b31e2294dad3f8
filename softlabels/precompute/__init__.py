"""Running teachers once: jobs, teachers, shards, and the run that turns them into a store."""

from __future__ import annotations

from softlabels.errors import MissingExtraError

try:
    import safetensors as _safetensors
    import torch as _torch
except ImportError as error:
    raise MissingExtraError(
        "precompute runs teachers with torch and safetensors, which are not installed: pip install "
        "'softlabels[precompute]'",
        extra="precompute",
    ) from error

from softlabels.precompute.job import Job, load_job
from softlabels.precompute.runner import precompute, resume
from softlabels.precompute.teachers import Teacher, teacher_from_module

__all__ = ["Job", "Teacher", "load_job", "precompute", "resume", "teacher_from_module"]

del _safetensors, _torch
