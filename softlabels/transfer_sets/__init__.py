"""Transfer sets from where users have them: one file a source, and the short names that job files call them by."""

from __future__ import annotations

from softlabels.transfer_sets.loading import KINDS, check_source, load_transfer_set

__all__ = ["KINDS", "check_source", "load_transfer_set"]
