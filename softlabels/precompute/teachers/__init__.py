"""Teachers: models from Python references, saved programs, ONNX graphs and model hubs, frozen and described."""

from __future__ import annotations

from softlabels.precompute.teachers.class_alignment import align_classes, class_list_of_store
from softlabels.precompute.teachers.model_sources import load_teacher
from softlabels.precompute.teachers.teacher import Head, Teacher, frozen, state_sha256, teacher_from_module

__all__ = [
    "Head",
    "Teacher",
    "align_classes",
    "class_list_of_store",
    "frozen",
    "load_teacher",
    "state_sha256",
    "teacher_from_module",
]
