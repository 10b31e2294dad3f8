"""Before the run: the job made ready, its batch size, and the forecast of time, bytes and error."""

from __future__ import annotations
