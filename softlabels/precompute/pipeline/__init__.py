"""Running shards: teachers on the device, prefetched inputs, and a writer thread, one stage each."""

from __future__ import annotations
