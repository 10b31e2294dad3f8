"""Transfer sets from where users have them: one file a source, and the short names that job files call them by."""

from __future__ import annotations

from softlabels.transfer_sets.loading import KINDS, check_source, load_transfer_set
from softlabels.transfer_sets.names import KnowsItsIds, examine_ids

__all__ = ["KINDS", "KnowsItsIds", "check_source", "examine_ids", "load_transfer_set"]
