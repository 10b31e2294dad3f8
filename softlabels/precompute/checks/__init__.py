"""Checks of teachers and data: before a job, when it is resumed, and against a finished store."""

from __future__ import annotations
