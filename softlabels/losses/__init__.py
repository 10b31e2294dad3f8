"""Distillation losses over batches of soft targets that carry their own temperature.

Every loss has the form `loss(student_logits_BC, targets, *, weights...)`. T comes with the targets and is never a
separate argument, so T² is applied exactly once and for the right T. The losses with a name (`make_loss`) return
`LossParts`: Hinton's objective, decoupled distillation and correlations (`distillation`); the first two can compare
z-scores instead of logits (`standardise_logits`). A further loss is one more function of that form, built from `terms`,
and a class in `loss_registry`.

Shapes: B rows, C classes. p is the target's distribution, q the student's, T the targets' temperature, z the student's
logits, v the teacher's. Arithmetic is in float32, or float64 for a float64 student.
"""

from __future__ import annotations

from softlabels.extras import needs_extra

with needs_extra("torch", "computing a distillation loss"):
    from softlabels.losses.distillation import (
        decoupled_loss,
        distillation_loss,
        hard_loss,
        logit_matching_loss,
        relation_loss,
        soft_loss,
    )
    from softlabels.losses.loss_registry import (
        LOSS_NAMES,
        DecoupledLoss,
        DistillationLoss,
        NamedLoss,
        RelationLoss,
        make_loss,
    )
    from softlabels.losses.target_batch import SoftTargetBatch
    from softlabels.losses.terms import Deviation, LossParts, standardise_logits

__all__ = [
    "LOSS_NAMES",
    "DecoupledLoss",
    "Deviation",
    "DistillationLoss",
    "LossParts",
    "NamedLoss",
    "RelationLoss",
    "SoftTargetBatch",
    "decoupled_loss",
    "distillation_loss",
    "hard_loss",
    "logit_matching_loss",
    "make_loss",
    "relation_loss",
    "soft_loss",
    "standardise_logits",
]
