"""Generated faults: layers times operations, tried by readers, servers, clients and commands."""

from __future__ import annotations
