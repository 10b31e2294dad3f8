"""Deterministic epoch order, split into batches for ranks and resumable at a cursor."""

from __future__ import annotations

from softlabels.order.epoch_order import EpochOrder
from softlabels.order.rank_batches import EpochConfig, EpochOptions, RankBatches, Remainder, StepBatch

__all__ = ["EpochConfig", "EpochOptions", "EpochOrder", "RankBatches", "Remainder", "StepBatch"]
