"""Transfer sets from where users have them: one file a source, and the short names that job files call them by."""

from __future__ import annotations

from softlabels.transfer_sets.sample_ids import SupportsIdSpec, examine_ids
from softlabels.transfer_sets.sources import KINDS, check_source, load_transfer_set

__all__ = ["KINDS", "SupportsIdSpec", "check_source", "examine_ids", "load_transfer_set"]
