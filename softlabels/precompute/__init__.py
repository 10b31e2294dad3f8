"""Precompute: run teachers once over a transfer set and write their targets to a store."""

from __future__ import annotations

from softlabels.extras import needs_extra

with needs_extra("precompute", "running teachers"):
    import safetensors as _safetensors
    import torch as _torch

from softlabels.precompute.job import Job, load_job
from softlabels.precompute.runner import precompute, resume
from softlabels.precompute.teachers import Teacher, teacher_from_module

__all__ = ["Job", "Teacher", "load_job", "precompute", "resume", "teacher_from_module"]

del _safetensors, _torch
