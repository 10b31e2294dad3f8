"""Which sample comes when: the order of an epoch, and how ranks share it."""

from __future__ import annotations

from softlabels.order.batches import RankBatches, Remainder, StepBatch
from softlabels.order.epoch import EpochOrder

__all__ = ["EpochOrder", "RankBatches", "Remainder", "StepBatch"]
