"""Which sample comes when: the order of an epoch, and how ranks share it."""

from __future__ import annotations

from softlabels.order.epoch_order import EpochOrder
from softlabels.order.rank_batches import RankBatches, Remainder, StepBatch

__all__ = ["EpochOrder", "RankBatches", "Remainder", "StepBatch"]
